"""How many crashes are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.crashes.policy import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    AfterCrash,
    Step,
    after_crash,
    before_start,
)

NOW = 1_000_000.0
WINDOW_S = 1_000.0


def judged(
    marks: dict[str, Any],
    *,
    max_crashes: int = 3,
    now: float = NOW,
    runs_before: int = 0,
) -> AfterCrash:
    """A child's death, with our own window."""
    return after_crash(
        marks,
        max_crashes=max_crashes,
        window_s=WINDOW_S,
        now=now,
        runs_before=runs_before,
    )


# --- a child died ---------------------------------------------------------------------


def test_the_first_crash_runs_again_soon() -> None:
    """Counted on the message, with the time from which the window counts."""
    verdict = judged({})

    assert (verdict.runs, verdict.delay_s) == (1, FIRST_DELAY_S)
    assert verdict.marks["crashes"] == 1
    assert verdict.marks["crashed_at"] == NOW


def test_the_last_allowed_run_is_alone() -> None:
    """It decides, so that nobody else's death may be taken for its own."""
    assert [
        judged({"crashes": n}, max_crashes=4).marks.get("alone") for n in range(3)
    ] == [
        None,
        None,
        True,
    ]
    assert judged({}, max_crashes=2).marks["alone"] is True


def test_at_the_limit_there_is_no_further_run() -> None:
    """And no mark, for nothing is sent again."""
    verdict = judged({"crashes": 2, "crashed_at": NOW - 1})

    assert verdict == AfterCrash(runs=3, delay_s=None)
    assert judged({}, max_crashes=1) == AfterCrash(runs=1, delay_s=None)


def test_the_wait_is_doubled_up_to_a_cap() -> None:
    """A host that is out of memory is not hit at once again."""
    waits = [judged({"crashes": n}, max_crashes=100).delay_s for n in range(9)]

    assert waits == [1, 2, 4, 8, 16, 32, MAX_DELAY_S, MAX_DELAY_S, MAX_DELAY_S]


def test_a_mark_of_an_unrecorded_start_is_taken_away() -> None:
    """The message that is sent again is another delivery."""
    marks = judged({"crashes": 1, "unrecorded": 1}).marks

    assert "unrecorded" in marks
    assert marks["unrecorded"] is None


@pytest.mark.parametrize(
    ("age_s", "runs"), [(0.0, 3), (WINDOW_S, 3), (WINDOW_S + 1, 1), (10 * WINDOW_S, 1)]
)
def test_the_window_forgets(age_s: float, runs: int) -> None:
    """A task that crashes once a month is not failed for it."""
    verdict = judged({"crashes": 2, "crashed_at": NOW - age_s})

    assert verdict.runs == runs
    if runs == 1:
        assert verdict.marks["crashed_at"] == NOW
        assert verdict.marks["crashes"] == 1


def test_the_window_counts_from_the_first_crash() -> None:
    """Each further one does not prolong it."""
    verdict = judged({"crashes": 1, "crashed_at": NOW - 900})

    assert verdict.marks["crashed_at"] == NOW - 900


def test_a_clock_that_went_back_forgets_nothing() -> None:
    """Workers' clocks differ."""
    assert judged({"crashes": 2, "crashed_at": NOW + 50}).runs == 3


@given(st.integers(1, 12), st.lists(st.floats(0, 50), max_size=40))
def test_a_message_never_has_more_crashes_than_allowed(
    max_crashes: int, gaps: list[float]
) -> None:
    """Within the window, sent again and again."""
    marks: dict[str, Any] = {}
    now, runs, was_alone = NOW, 0, False
    for gap in gaps[:20]:  # 20 times 50 s are within the window
        now += gap
        verdict = judged(marks, max_crashes=max_crashes, now=now)
        runs += 1
        assert verdict.runs == runs
        if verdict.delay_s is None:
            assert runs == max_crashes
            assert was_alone or max_crashes == 1
            return
        was_alone = verdict.marks["alone"] is True
        marks = {k: v for k, v in {**marks, **verdict.marks}.items() if v is not None}
    assert runs < max_crashes or not gaps[:20]


# --- a worker died --------------------------------------------------------------------

#: crashes, unrecorded, earlier, is_alone, limit, what to do, runs
STARTS = [
    # nothing is known against it
    (0, 0, [], False, 3, Step.RUN, 0),
    (0, 0, [], True, 3, Step.RUN, 0),
    # delivered before: the first delivery may have started, unrecorded
    (0, 1, [], False, 3, Step.RUN, 1),
    (0, 1, [], False, 2, Step.RUN_ALONE_FIRST, 1),
    (0, 1, [], False, 1, Step.RUN_ALONE_FIRST, 1),
    (0, 1, [], True, 1, Step.RUN, 1),
    # a start that never ended makes it a suspect
    (0, 0, [False], False, 9, Step.RUN_ALONE_FIRST, 1),
    (0, 1, [False], False, 9, Step.RUN_ALONE_FIRST, 2),
    (0, 1, [False], True, 3, Step.RUN, 2),
    # alone at the limit: it was its own doing
    (0, 1, [False, True], True, 3, Step.FAIL, 3),
    (0, 1, [False, True], False, 3, Step.FAIL, 3),
    (0, 0, [True], False, 1, Step.FAIL, 1),
    (2, 0, [True], True, 3, Step.FAIL, 3),
    # alone, and below the limit: once more
    (0, 1, [True], True, 3, Step.RUN, 2),
    (0, 1, [True], False, 3, Step.RUN_ALONE_FIRST, 2),
    # beside others, however often: no verdict
    (0, 1, [False] * 9, True, 3, Step.RUN, 10),
    (0, 1, [True, False], True, 3, Step.RUN, 3),
    (0, 1, [True, False], False, 3, Step.RUN_ALONE_FIRST, 3),
    # crashes of children count too
    (2, 0, [], False, 3, Step.RUN_ALONE_FIRST, 2),
    (2, 0, [], True, 3, Step.RUN, 2),
    (5, 0, [], True, 3, Step.RUN, 5),
]


@pytest.mark.parametrize(
    ("crashes", "unrecorded", "earlier", "is_alone", "limit", "step", "runs"), STARTS
)
def test_a_start_is_judged_by_those_that_never_ended(
    crashes: int,
    unrecorded: int,
    earlier: list[bool],
    is_alone: bool,
    limit: int,
    step: Step,
    runs: int,
) -> None:
    """Run, run alone first, or fail."""
    assert before_start(
        crashes=crashes,
        unrecorded=unrecorded,
        earlier=earlier,
        is_alone=is_alone,
        max_crashes=limit,
    ) == (step, runs)


starts = st.fixed_dictionaries(
    {
        "crashes": st.integers(0, 6),
        "unrecorded": st.integers(0, 1),
        "earlier": st.lists(st.booleans(), max_size=6),
        "is_alone": st.booleans(),
        "max_crashes": st.integers(1, 5),
    }
)


@given(starts)
def test_a_verdict_needs_a_run_alone_that_never_ended(start: dict[str, Any]) -> None:
    """No task is failed for what its neighbour did."""
    step, runs = before_start(**start)

    if step is Step.FAIL:
        assert start["earlier"][-1] is True
        assert runs >= start["max_crashes"]


@given(starts)
def test_at_the_limit_nothing_runs_beside_others(start: dict[str, Any]) -> None:
    """A suspect waits until it is alone."""
    step, runs = before_start(**start)

    if step is Step.RUN and not start["is_alone"]:
        assert not start["earlier"]
        assert runs + 1 < start["max_crashes"]


# --- a whole life ---------------------------------------------------------------------


@dataclass
class Life:
    """One message whose every run ends with its child or its worker."""

    max_crashes: int
    marks: dict[str, Any] = field(default_factory=dict)
    starts: dict[Any, list[bool]] = field(default_factory=dict)
    is_redelivered: bool = False
    runs: int = 0
    alone_runs: int = 0
    is_failed: bool = False

    def deliver(self, dies: str) -> None:
        """The worker takes it, and asks as `StartGuard` and the main process do."""
        key = self.marks.get("crashes", 0)
        is_alone = bool(self.marks.get("alone"))
        runs_before = unrecorded = 0
        if self.is_redelivered or is_alone:
            unrecorded = int(self.marks.get("unrecorded", 0)) if is_alone else 1
            step, runs_before = before_start(
                crashes=key,
                unrecorded=unrecorded,
                earlier=self.starts.get(key, []),
                is_alone=is_alone,
                max_crashes=self.max_crashes,
            )
            if step is Step.FAIL:
                self.is_failed = True
                return
            if step is Step.RUN_ALONE_FIRST:
                self.mark({"alone": True, "unrecorded": unrecorded or None})
                return
            self.starts.setdefault(key, []).append(is_alone)
        self.runs += 1
        self.alone_runs += is_alone
        if dies == "worker":
            self.is_redelivered = True
            return
        verdict = judged(
            self.marks,
            max_crashes=self.max_crashes,
            runs_before=runs_before - unrecorded,
        )
        if verdict.delay_s is None:
            self.is_failed = True
        else:
            self.mark(dict(verdict.marks))

    def mark(self, marks: dict[str, Any]) -> None:
        """It is sent again: a new message."""
        merged = {**self.marks, **marks}
        self.marks = {k: v for k, v in merged.items() if v is not None}
        self.is_redelivered = False


def lived(max_crashes: int, deaths: Sequence[str]) -> Life:
    """A life with these deaths, and then the last one for ever."""
    life = Life(max_crashes)
    for number in range(1_000):
        life.deliver(deaths[min(number, len(deaths) - 1)])
        if life.is_failed:
            return life
    raise AssertionError("it loops")


@pytest.mark.parametrize("max_crashes", range(1, 8))
def test_a_task_that_kills_its_child_runs_as_often_as_allowed(max_crashes: int) -> None:
    """And no more; the last time alone."""
    life = lived(max_crashes, ["child"])

    assert life.runs == max_crashes
    assert life.alone_runs == (1 if max_crashes > 1 else 0)


@pytest.mark.parametrize("max_crashes", range(2, 8))
def test_a_task_that_kills_its_worker_runs_as_often_as_allowed(
    max_crashes: int,
) -> None:
    """From the third run on alone, for it is a suspect by then."""
    life = lived(max_crashes, ["worker"])

    assert life.runs == max_crashes
    assert life.alone_runs >= 1


@given(
    st.integers(1, 6),
    st.lists(st.sampled_from(["child", "worker"]), min_size=1, max_size=30),
)
def test_no_message_loops_and_none_is_failed_unseen(
    max_crashes: int, deaths: list[str]
) -> None:
    """Whatever dies: a bounded number of runs, a lone one before a worker's verdict."""
    life = lived(max_crashes, deaths)

    assert max_crashes <= life.runs <= max_crashes * (max_crashes + 1) // 2 + 1
    if max_crashes > 1:
        assert life.alone_runs >= 1


@pytest.mark.parametrize(
    "deaths", [["worker", "child"], ["worker", "worker", "child", "child"]]
)
def test_deaths_of_workers_and_children_count_together(deaths: list[str]) -> None:
    """Three runs, whatever died; but for the first, which may not have been one."""
    assert lived(3, deaths).runs == 3 + 1
