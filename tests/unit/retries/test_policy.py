"""How often, how far apart and until when a task is tried again."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from celery_resilience import On
from celery_resilience.message import HEADER, RETRY, has_past, marks_of
from celery_resilience.retries.policy import (
    REMEMBERED,
    Again,
    GiveUp,
    History,
    decide,
    wait_s,
)

SECONDS = st.floats(0.001, 604_800)
CHANCES = st.floats(0, 1)


@st.composite
def rules(draw: st.DrawFn) -> On:
    """Rules with any limits."""
    least, most = sorted((draw(SECONDS), draw(SECONDS)))
    attempts = draw(st.none() | st.integers(1, 50))
    deadline_s = draw(SECONDS if attempts is None else st.none() | SECONDS)
    return On(
        OSError, attempts=attempts, backoff_s=(least, most), deadline_s=deadline_s
    )


def run(
    rule: On, chances: list[float], *, hint_s: float | None = None, step_s: float = 0.0
) -> tuple[list[Again], GiveUp | None]:
    """Fail again and again; each attempt takes *step_s* seconds."""
    now, history, found = 1_000.0, None, []
    for attempt, chance in enumerate(chances, 1):
        verdict = decide(
            rule,
            history,
            attempt=attempt,
            exception="OSError",
            hint_s=hint_s,
            now=now,
            chance=chance,
        )
        if isinstance(verdict, GiveUp):
            return found, verdict
        found.append(verdict)
        # As it comes back from a broker.
        history = History.from_mark(json.loads(json.dumps(verdict.history.to_mark())))
        now += verdict.delay_s + step_s
    return found, None


@given(rules(), st.integers(1, 1_000_000), CHANCES)
def test_a_wait_is_between_its_bounds(rule: On, failures: int, chance: float) -> None:
    """Never 0, and after any number of failures."""
    least, most = rule.backoff_s

    found = wait_s(rule, failures, hint_s=0, left_s=float("inf"), chance=chance)

    assert found is not None
    assert least <= found <= most


@given(rules(), st.integers(1, 30))
def test_the_longest_wait_doubles(rule: On, failures: int) -> None:
    """Up to the most."""
    least, most = rule.backoff_s

    found = wait_s(rule, failures, hint_s=0, left_s=float("inf"), chance=1)

    assert found == pytest.approx(min(most, least * 2**failures))


@given(rules(), st.integers(1, 50), CHANCES, SECONDS)
def test_what_a_server_asks_for_is_the_least(
    rule: On, failures: int, chance: float, hint_s: float
) -> None:
    """Only chance is added to it: a tenth, or as much as the least wait."""
    least, most = rule.backoff_s

    found = wait_s(rule, failures, hint_s=hint_s, left_s=1e9, chance=chance)

    assert found is not None
    assert hint_s <= found <= max(most, hint_s + max(least, hint_s / 10) * 1.001)


@given(rules(), st.integers(1, 50), CHANCES, st.floats(0, 1e6), st.floats(-1, 1e6))
def test_no_wait_is_longer_than_what_is_left(
    rule: On, failures: int, chance: float, hint_s: float, left_s: float
) -> None:
    """There is none where the least does not fit."""
    found = wait_s(rule, failures, hint_s=hint_s, left_s=left_s, chance=chance)

    assert (found is None) == (max(rule.backoff_s[0], hint_s) > left_s)
    if found is not None:
        assert hint_s <= found <= left_s


@given(rules(), st.lists(CHANCES, min_size=60, max_size=60), st.floats(0, 10))
def test_a_task_is_tried_again_until_its_first_limit(
    rule: On, chances: list[float], step_s: float
) -> None:
    """As often as the rule says, and no attempt begins behind the deadline."""
    found, end = run(rule, chances, step_s=step_s)

    waited_s = sum(it.delay_s for it in found) + step_s * max(len(found) - 1, 0)
    if rule.attempts is not None:
        assert len(found) < rule.attempts
        assert end != GiveUp("attempts") or len(found) == rule.attempts - 1
    if rule.deadline_s is not None:
        assert waited_s <= rule.deadline_s * 1.0001 + 0.001
    assert end is not None or len(found) == 60


@given(st.floats(1, 604_800), st.floats(1, 604_800))
def test_a_hint_behind_the_deadline_ends_it_at_once(
    hint_s: float, deadline_s: float
) -> None:
    """It would be for nothing."""
    assume(hint_s > deadline_s)
    rule = On(OSError, backoff_s=0.5, deadline_s=deadline_s)

    assert run(rule, [0.5], hint_s=hint_s) == ([], GiveUp("deadline"))


def test_a_hint_of_years_ends_it() -> None:
    """A week is the longest wait, also without a deadline."""
    assert run(On(OSError), [0.5], hint_s=604_801) == ([], GiveUp("deadline"))


def test_each_rule_counts_for_itself() -> None:
    """The deadline is counted from the first failure by any of them."""
    line, full = On(OSError, attempts=2), On(KeyError, attempts=3, deadline_s=100)
    history = History(900.0, {line.key: 1})

    def ask(rule: On, now: float, history: History) -> Again | GiveUp:
        return decide(
            rule,
            history,
            attempt=2,
            exception="X",
            hint_s=None,
            now=now,
            chance=0,
        )

    assert ask(line, 901, history) == GiveUp("attempts")
    first = ask(full, 901, history)
    assert isinstance(first, Again)
    assert first.history.spent == {line.key: 1, full.key: 1}
    assert first.history.since == 900
    assert isinstance(ask(full, 998, first.history), Again)
    assert ask(full, 999.5, first.history) == GiveUp("deadline")


def test_a_clock_that_is_behind_prolongs_nothing() -> None:
    """A failure is not later than the present."""
    rule = On(OSError, deadline_s=10)

    found = decide(
        rule,
        History(5_000.0, {}),
        attempt=2,
        exception="X",
        hint_s=None,
        now=1_000.0,
        chance=1,
    )

    assert isinstance(found, Again)
    assert found.history.since == 1_000.0


def test_a_message_remembers_the_last_failures() -> None:
    """And not so many that it grows for ever."""
    rule = On(OSError, attempts=REMEMBERED + 10, backoff_s=1)

    found, end = run(rule, [0.5] * 100, step_s=2)

    assert end == GiveUp("attempts")
    kept = found[-1].history.failures
    assert [attempt for attempt, *_ in kept] == list(range(10, REMEMBERED + 10))
    assert kept[0] == (10, 1_000.0 + 9 * 3, "OSError", 1.0)


# --- the mark --------------------------------------------------------------------------

GOOD = {"since": 1.5, "spent": {"a": 1}, "failures": [[1, 2.5, "OSError", 3]]}


@pytest.mark.parametrize(
    "change",
    [
        {"since": "1"},
        {"since": float("nan")},
        {"since": True},
        {"spent": [1]},
        {"spent": {"a": -1}},
        {"failures": None},
        {"failures": [[1, 2.5, "OSError"]]},
        {"failures": [[1, 2.5, 7, 3]]},
        {"failures": ["four"]},
        {"failures": [[1, float("inf"), "OSError", 3]]},
    ],
)
def test_a_mark_of_somebody_elses_does_not_count(change: dict[str, object]) -> None:
    """Anybody may write a header."""
    assert marks_of({HEADER: {RETRY: GOOD}}) == {RETRY: GOOD}
    assert marks_of({HEADER: {RETRY: {**GOOD, **change}}}) == {}


@pytest.mark.parametrize(
    "mark", [5, {"due": "x"}, {"due": float("inf")}, {"budget": ""}, {"budget": 5}]
)
def test_neither_does_a_wait(mark: object) -> None:
    """It would hold a task for ever."""
    assert marks_of({HEADER: {"retry_wait": mark}}) == {}
    good = {"due": 5.0, "budget": "bank"}
    assert marks_of({HEADER: {"retry_wait": good}}) == {"retry_wait": good}


def test_a_retry_has_no_past_to_report() -> None:
    """Its success is not told to the collector, as that of a replay is."""
    assert not has_past({HEADER: {RETRY: GOOD, "retry_wait": {}, "key": ["k", ""]}})
    assert has_past({HEADER: {RETRY: GOOD, "snoozes": 1}})
