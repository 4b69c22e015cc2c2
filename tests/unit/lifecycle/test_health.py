"""Whether a worker is alive, and whether it is ready."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.lifecycle.health import (
    CHILDREN_STUCK_S,
    LOOP_STUCK_S,
    POOL_STUCK_S,
    Seen,
    Since,
    live,
    ready,
)

SECONDS = st.none() | st.floats(0, 200)
SEEN = st.builds(
    Seen,
    is_draining=st.booleans(),
    is_connected=st.booleans(),
    loop_age_s=SECONDS,
    children=st.none() | st.integers(0, 8),
    children_stuck_s=SECONDS,
    work_waits_s=SECONDS,
    store=st.sampled_from(["", "away"]),
)

WELL = Seen(is_connected=True, loop_age_s=0.5, children=2)


@given(SEEN, SEEN)
def test_the_broker_and_the_store_never_end_a_worker(seen: Seen, other: Seen) -> None:
    """Without its broker a worker is live if it is with it; the store has no say."""
    away = replace(seen, is_connected=False, store="away")

    assert live(replace(seen, store=other.store)) == live(seen)
    assert live(away).is_well >= live(seen).is_well


@given(SEEN)
def test_what_is_ready_is_live(seen: Seen) -> None:
    """And connected, takes tasks, and has its store."""
    if ready(seen).is_well:
        assert live(seen).is_well
        assert seen.is_connected
        assert not seen.is_draining
        assert not seen.store


@given(SEEN)
def test_children_that_cannot_answer_are_never_hidden(seen: Seen) -> None:
    """Not by a drain, nor by a broker that is away."""
    stuck = replace(seen, children_stuck_s=CHILDREN_STUCK_S)

    assert not live(stuck).is_well


def test_a_well_worker_is_both() -> None:
    """With nothing to say."""
    assert live(WELL).reasons == ready(WELL).reasons == ()


def test_each_reason_is_told() -> None:
    """In words, with its seconds."""
    seen = Seen(
        is_connected=True,
        loop_age_s=LOOP_STUCK_S + 1,
        children=2,
        children_stuck_s=CHILDREN_STUCK_S,
        work_waits_s=POOL_STUCK_S,
    )

    assert live(seen).reasons == (
        "the main loop has not turned for 61 s",
        "none of the 2 children could answer for 5 s",
        "the pool has accepted nothing for 60 s",
    )


def test_a_moment_is_no_reason() -> None:
    """Each has its bound."""
    seen = replace(
        WELL,
        loop_age_s=LOOP_STUCK_S,
        children_stuck_s=CHILDREN_STUCK_S - 0.1,
        work_waits_s=POOL_STUCK_S - 0.1,
    )

    assert live(seen).is_well


def test_a_drain_has_a_deadline_of_its_own() -> None:
    """Its main loop waits for the pool, and takes nothing: that is no stuck worker."""
    seen = replace(WELL, is_draining=True, loop_age_s=500, work_waits_s=500)

    assert live(seen).is_well
    assert ready(seen).reasons == ("it drains",)


def test_a_break_begins_anew() -> None:
    """Only what lasts counts."""
    since = Since()

    assert [since.look(True, 1.0), since.look(True, 3.0)] == [0.0, 2.0]
    assert since.look(False, 4.0) is None
    assert since.look(True, 9.0) == 0.0
