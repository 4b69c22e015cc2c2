"""What memory asks for, decided from numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.memory.policy import (
    CONTAINER_IS_FULL,
    FRESH_IN_A_ROW,
    FRESH_RUNS,
    GRACE_S,
    LOOK_CLOSELY_S,
    LOOK_S,
    NO_GRACE_ABOVE,
    SUSTAINED_S,
    TRIM_EVERY_S,
    Act,
    Brake,
    Sustained,
    Trims,
    act_on_run,
    container_level,
    is_over,
    next_look_s,
    share_of,
)

sizes = st.integers(min_value=1, max_value=1 << 40)
seconds = st.floats(min_value=0, max_value=1e6)


@pytest.mark.parametrize(
    ("amount", "kib"),
    [
        (1.0, 1_024),
        (300, 307_200),
        ("25%", 250_000),
        ("100%", 1_000_000),
        ("0.1%", 1e3),
    ],
)
def test_an_amount_is_mib_or_a_share(amount: float | str, kib: int) -> None:
    """Of the whole."""
    assert share_of(amount, 1_000_000) == kib


@given(sizes, sizes)
def test_the_limit_itself_is_allowed(growth: int, limit: int) -> None:
    """What is gained is over it from the next KiB on."""
    assert is_over(growth, limit) is (growth > limit)
    assert not is_over(limit, limit)


# --- trimming -----------------------------------------------------------------------------


def test_a_useful_trim_may_come_again_at_once() -> None:
    """A task that spikes at each run is worth a trim at each."""
    trims = Trims()

    assert trims.may_trim(0)
    trims.trimmed(100, 94, 0)
    assert trims.may_trim(0)


def test_a_useless_trim_does_not_come_again_soon() -> None:
    """It costs up to a tenth of a second."""
    trims = Trims()
    trims.trimmed(100, 96, 5)

    assert not trims.may_trim(5 + TRIM_EVERY_S - 0.1)
    assert trims.may_trim(5 + TRIM_EVERY_S)


# --- the brake ------------------------------------------------------------------------------


@given(st.lists(st.integers(min_value=1, max_value=100)))
def test_the_brake_is_for_fresh_children_in_a_row(runs_of_children: list[int]) -> None:
    """One that lived longer in between, and they are no sign of a wrong limit."""
    brake, in_a_row, seen = Brake(), 0, False
    for runs in runs_of_children:
        brake = brake.over(runs)
        in_a_row = in_a_row + 1 if runs <= FRESH_RUNS else 0
        seen = seen or in_a_row >= FRESH_IN_A_ROW
        assert brake.is_on is seen


def test_the_brake_forgives_fresh_children_only() -> None:
    """What comes later is growth."""
    on = Brake().over(1).over(FRESH_RUNS)

    assert on.forgives(1)
    assert on.forgives(FRESH_RUNS)
    assert not on.forgives(FRESH_RUNS + 1)
    assert not Brake().over(1).forgives(1)


# --- a run with a limit ----------------------------------------------------------------------


@given(sizes, sizes, st.none() | seconds, st.booleans())
def test_a_run_below_its_limit_is_left_alone(
    used: int, limit: int, signalled_for_s: float | None, hears: bool
) -> None:
    """And one that is above it never goes on for ever."""
    act = act_on_run(used, limit, signalled_for_s=signalled_for_s, hears=hears)

    assert (act is Act.NOTHING) or used > limit
    if used <= limit:
        assert act is Act.NOTHING
    elif used > limit * NO_GRACE_ABOVE or not hears:
        assert act is Act.KILL
    elif signalled_for_s is None:
        assert act is Act.SIGNAL
    else:
        assert (act is Act.KILL) is (signalled_for_s >= GRACE_S)


def test_runs_near_their_limit_are_looked_at_closely() -> None:
    """And all of them where nothing else holds them."""
    assert next_look_s(0.2, is_enforced=True) == LOOK_S
    assert next_look_s(0.6, is_enforced=True) == LOOK_CLOSELY_S
    assert next_look_s(0.0, is_enforced=False) == LOOK_CLOSELY_S


# --- a process without children ---------------------------------------------------------------


def test_growth_must_last() -> None:
    """From the end of a run on."""
    process = Sustained(100)

    assert not process.is_sustained(500, 0)
    assert not process.is_sustained(500, 2 * SUSTAINED_S)
    process.run_ended(500, 20)
    process.run_ended(500, 22)
    assert not process.is_sustained(500, 20 + SUSTAINED_S - 0.1)
    assert process.is_sustained(500, 20 + SUSTAINED_S)


@pytest.mark.parametrize("how", ["at the end of a run", "in between"])
def test_what_is_given_back_was_no_growth(how: str) -> None:
    """One figure below the limit begins all anew."""
    process = Sustained(100)
    process.run_ended(500, 0)
    if how == "in between":
        process.is_sustained(100, 2)
    else:
        process.run_ended(100, 2)

    assert not process.is_sustained(500, 2 * SUSTAINED_S)


# --- the container ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "level"), [(0, 0), (79, 0), (80, 1), (89, 1), (90, 2), (94, 2), (95, 3)]
)
def test_a_container_fills_in_steps(used: int, level: int) -> None:
    """Two that are said, and one that is acted upon."""
    assert container_level(used, 100) == level


@given(sizes, sizes)
def test_a_container_is_full_near_its_limit_only(used: int, limit: int) -> None:
    """Never below."""
    assert (container_level(used, limit) == 3) is (used / limit >= CONTAINER_IS_FULL)
