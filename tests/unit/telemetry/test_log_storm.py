"""Of many failures of one group the first are told one by one, and all are counted."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.telemetry.log_storm import MAX_GROUPS, Storms, Summary


def take(storms: Storms, fingerprint: str, now: float) -> tuple[bool, list[Summary]]:
    """A failure, as the log takes it."""
    due = storms.due(now)
    is_told = storms.is_told(fingerprint, now)
    if not is_told:
        storms.added(fingerprint, {"fingerprint": fingerprint, "at": now})
    return is_told, due


def test_the_first_of_a_window_are_told() -> None:
    """The rest waits for its end, with the last one's facts."""
    storms = Storms(limit=2, window_s=60)

    told = [take(storms, "a", now)[0] for now in (0, 1, 2, 3)]

    assert told == [True, True, False, False]
    assert storms.due(59.9) == []
    assert storms.due_in_s(50) == 10
    assert storms.due(60) == [Summary(2, {"fingerprint": "a", "at": 3})]
    assert storms.due(60) == []


def test_a_storm_that_goes_on_is_only_summed_up() -> None:
    """One summary a window, and nothing in full, until a window brings few."""
    storms = Storms(limit=2, window_s=10)
    for _ in range(5):
        take(storms, "a", 0)

    assert take(storms, "a", 10) == (False, [Summary(3, {"fingerprint": "a", "at": 0})])
    for _ in range(2):
        assert take(storms, "a", 11)[0] is False
    told, due = take(storms, "a", 20)
    assert (told, [it.more for it in due]) == (False, [3])

    (rest,) = storms.due(30)
    assert rest.more == 1
    assert take(storms, "a", 31) == (True, [])


def test_a_trickle_is_never_summed_up() -> None:
    """One failure a window is told each time."""
    storms = Storms(limit=2, window_s=10)

    assert all(take(storms, "a", now) == (True, []) for now in range(0, 1_000, 9))


def test_nothing_waits_where_nothing_was_left_out() -> None:
    """No thread is needed then."""
    storms = Storms(limit=2, window_s=10)
    take(storms, "a", 0)

    assert storms.due_in_s(0) is None
    assert storms.rest() == []


def test_groups_without_end_are_forgotten_and_summed_up() -> None:
    """The one that began first gives way, and what waited of it is told."""
    storms = Storms(limit=1, window_s=60)
    for _ in range(3):
        take(storms, "a", 0)

    due = [it for n in range(MAX_GROUPS * 2) for it in take(storms, f"g{n}", 1)[1]]

    assert [it.more for it in due] == [2]
    assert len(storms._groups) <= MAX_GROUPS


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0, 20)), min_size=1, max_size=200
    )
)
def test_every_failure_is_told_or_counted_once(
    failures: list[tuple[str, float]],
) -> None:
    """Whenever they come, and in whichever group."""
    storms, now = Storms(limit=3, window_s=15), 0.0
    seen: Counter[str] = Counter()
    for fingerprint, passed in failures:
        now += passed
        told, due = take(storms, fingerprint, now)
        seen[fingerprint] += told
        for summary in due:
            seen[summary.last["fingerprint"]] += summary.more
    for summary in storms.rest():
        seen[summary.last["fingerprint"]] += summary.more

    assert seen == Counter(fingerprint for fingerprint, _ in failures)
