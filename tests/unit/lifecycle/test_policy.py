"""What a worker's end means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.lifecycle.policy import (
    FIRST_IDLE_S,
    IDLE_S,
    ExitCode,
    StopConditions,
    exit_code,
    is_idle_long_enough,
    meaning,
)

COUNTS = st.integers(0, 3)
WANTED = st.sampled_from([ExitCode.DRAINED, ExitCode.RECYCLED])


@given(
    celery=st.none() | st.integers(0, 3),
    was_asked=st.booleans(),
    wanted=WANTED,
    put_back=COUNTS,
    lost=COUNTS,
)
def test_an_exit_code_tells_the_worst_that_happened(
    celery: int | None, was_asked: bool, wanted: int, put_back: int, lost: int
) -> None:
    """An error of the worker's own, then work cut off, put back, and the reason."""
    code = exit_code(
        celery=celery, was_asked=was_asked, wanted=wanted, put_back=put_back, lost=lost
    )

    if celery and not was_asked:
        assert code == celery
    elif lost:
        assert code == 76
    elif put_back:
        assert code == 75
    else:
        assert code == wanted
    assert (code == 0) <= (put_back == lost == 0)


def test_a_drain_that_cut_nothing_off_is_well_whatever_asked_for_it() -> None:
    """Celery ends with 1 after Ctrl-C."""
    assert exit_code(celery=1, was_asked=True, wanted=0, put_back=0, lost=0) == 0


def test_every_exit_code_has_words() -> None:
    """Each its own; another number is an error's."""
    words = [meaning(code) for code in ExitCode]

    assert len(set(words)) == len(words)
    assert meaning(1) == "an error"


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (StopConditions(), ""),
        (StopConditions(after_s=3600), "stops after 3600 s"),
        (
            StopConditions(after_tasks=5, when_empty=True),
            "stops after 5 tasks or when its queues are empty",
        ),
    ],
)
def test_stop_conditions_are_told(conditions: StopConditions, words: str) -> None:
    """In the line of the start."""
    assert conditions.words() == words


def test_a_worker_that_has_just_started_waits_longer_for_its_first_message() -> None:
    """Messages that it has asked for may be on their way."""
    between = (IDLE_S + FIRST_IDLE_S) / 2

    assert is_idle_long_enough(idle_for_s=between, was_ever_busy=True)
    assert not is_idle_long_enough(idle_for_s=between, was_ever_busy=False)
    assert is_idle_long_enough(idle_for_s=FIRST_IDLE_S, was_ever_busy=False)
    assert not is_idle_long_enough(idle_for_s=IDLE_S / 2, was_ever_busy=True)
