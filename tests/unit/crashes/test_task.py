"""The child judges a start that may follow the death of a whole worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
from unit.specimens import replay_mark

from celery_resilience.crashes import task
from celery_resilience.crashes.policy import MAX_REDELIVERIES_UNSTORED
from celery_resilience.crashes.task import StartGuard, start_key
from celery_resilience.errors import (
    SchemaMismatch,
    SendAgain,
    StoreUnavailable,
    TooManyCrashes,
)

WINDOW_S = 100.0


class Starts:
    """`StartStore` in memory; `away` makes it not answer."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, bool, str]] = []
        self.windows: list[float] = []
        self.away: set[str] = set()
        self.told: list[tuple[str, dict[str, Any]]] = []

    def _ask(self, method: str) -> None:
        if method in self.away:
            raise StoreUnavailable("away")

    def unfinished(self, key: str, *, window_s: float) -> list[bool]:
        self._ask("unfinished")
        self.windows.append(window_s)
        return [is_alone for known, is_alone, _ in self.rows if known == key]

    def record(self, key: str, *, is_alone: bool, worker: str) -> None:
        self._ask("record")
        self.rows.append((key, is_alone, worker))

    def clear(self, key: str) -> None:
        self._ask("clear")
        self.rows = [row for row in self.rows if row[0] != key]

    def clear_worker(self, worker: str) -> None:
        self._ask("clear_worker")
        self.rows = [row for row in self.rows if row[2] != worker]


@pytest.fixture
def starts() -> Starts:
    """An empty store."""
    return Starts()


def a_guard(starts: Starts | None, worker: str = "w1") -> StartGuard:
    """A guard with a limit of three."""
    return StartGuard(
        lambda: starts,
        max_crashes=3,
        window_s=WINDOW_S,
        worker=worker,
        tell=lambda id, facts: starts.told.append((id, facts)),
    )


def begin(
    guard: StartGuard,
    marks: dict[str, Any] | None = None,
    *,
    is_redelivered: bool = True,
    max_crashes: int | None = None,
) -> Callable[[], None] | None:
    """Start the first attempt of one task."""
    return guard.before(
        "task-1",
        0,
        marks or {},
        is_redelivered=is_redelivered,
        max_crashes=max_crashes,
    )


def sent_again(raised: Any) -> dict[str, Any]:
    """The marks of a message that is sent again."""
    assert raised.value.delay_s == 0
    return {k: v for k, v in raised.value.marks.items() if v is not None}


def test_a_first_delivery_costs_nothing(starts: Starts) -> None:
    """The store is not even asked for."""

    def no_store() -> Any:
        raise AssertionError("asked")

    guard = StartGuard(
        no_store,
        max_crashes=3,
        window_s=WINDOW_S,
        worker="w1",
        tell=lambda id, facts: None,
    )

    assert begin(guard, is_redelivered=False) is None
    assert begin(guard, {"crashes": 1}, is_redelivered=False) is None


def test_a_redelivered_run_is_recorded_and_cleared(starts: Starts) -> None:
    """Before it starts, and when it has ended."""
    ended = begin(a_guard(starts))

    assert starts.rows == [(start_key("task-1", 0, {}), False, "w1")]
    assert starts.windows == [WINDOW_S]
    assert ended is not None
    ended()
    assert starts.rows == []


def test_a_start_that_never_ended_makes_it_a_suspect(starts: Starts) -> None:
    """It is sent again to run alone, and this start is not recorded."""
    begin(a_guard(starts))

    with pytest.raises(SendAgain) as raised:
        begin(a_guard(starts, "w2"))

    assert raised.value.reason == "suspect"
    assert sent_again(raised) == {"alone": True, "unrecorded": 1}
    assert len(starts.rows) == 1


def test_a_suspect_runs_alone_and_is_recorded_so(starts: Starts) -> None:
    """Also on its first delivery."""
    begin(a_guard(starts))

    ended = begin(
        a_guard(starts, "w2"), {"alone": True, "unrecorded": 1}, is_redelivered=False
    )

    assert ended is not None
    assert [is_alone for _, is_alone, _ in starts.rows] == [False, True]


def test_the_main_process_is_told_what_the_store_knows(starts: Starts) -> None:
    """If this child dies, the deaths of whole workers before it count too."""
    marks = {"alone": True, "unrecorded": 1}
    begin(a_guard(starts), marks, is_redelivered=False)
    begin(a_guard(starts), {"alone": True, "crashes": 1}, is_redelivered=False)

    begin(a_guard(starts), {"alone": True, "crashes": 1}, is_redelivered=False)

    assert [facts for _, facts in starts.told] == [
        {"runs_before": 0},
        {"runs_before": 1},
        {"runs_before": 2},
    ]


def test_a_worker_that_dies_of_it_three_times_fails_it(starts: Starts) -> None:
    """The first run unrecorded, the second beside others, the third alone."""
    begin(a_guard(starts))
    marks = {"alone": True, "unrecorded": 1}
    begin(a_guard(starts), marks, is_redelivered=False)

    with pytest.raises(TooManyCrashes, match="3 runs") as raised:
        begin(a_guard(starts), marks)

    assert raised.value.runs == 3
    assert starts.rows == []


def test_the_tasks_own_limit_beats_the_apps(starts: Starts) -> None:
    """`max_crashes` of a task."""
    with pytest.raises(SendAgain):
        begin(a_guard(starts), max_crashes=2)

    assert begin(a_guard(starts), max_crashes=9) is not None


def test_a_child_that_died_before_counts(starts: Starts) -> None:
    """Its runs are in the message's mark."""
    with pytest.raises(SendAgain):
        begin(a_guard(starts), {"crashes": 1})


def test_a_store_that_is_away_lets_it_run(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    """Uncounted, and it says so: a task is not lost for a store."""
    starts.away = {"unfinished"}

    with caplog.at_level(logging.WARNING, "celery_resilience.crashes"):
        assert begin(a_guard(starts)) is None

    assert "task-1 runs uncounted: away" in caplog.text


def test_tables_of_another_release_let_it_run(starts: Starts) -> None:
    """Whatever is wrong with the store, the task is not failed for it."""

    def no_tables(key: str, *, window_s: float) -> list[bool]:
        raise SchemaMismatch

    starts.unfinished = no_tables  # type: ignore[method-assign]

    assert begin(a_guard(starts)) is None


def test_a_store_that_hangs_lets_it_run(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a while: its soft limit is held back meanwhile."""
    asked = Event()

    def hangs(key: str, *, window_s: float) -> list[bool]:
        asked.wait(30)
        return []

    starts.unfinished = hangs  # type: ignore[method-assign]
    monkeypatch.setattr(task, "TASK_WAITS_S", 0.01)

    assert begin(a_guard(starts)) is None
    asked.set()
    assert "the store did not answer" in caplog.text


@pytest.mark.parametrize("method", ["record", "clear"])
def test_a_store_that_goes_away_meanwhile_changes_no_outcome(
    starts: Starts, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Neither before the body nor after it."""
    starts.away = {method}

    with caplog.at_level(logging.WARNING, "celery_resilience.crashes"):
        ended = begin(a_guard(starts))
        if ended is not None:
            ended()

    assert (ended is None) == (method == "record")
    assert "away" in caplog.text


def test_a_worker_that_is_asked_to_stop_forgets_its_starts(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    """And only its own; a store that is away is told."""
    begin(a_guard(starts, "w1"))
    starts.record("other", is_alone=False, worker="w2")

    a_guard(starts, "w1").forget_worker()

    assert [worker for _, _, worker in starts.rows] == ["w2"]
    a_guard(None).forget_worker()
    starts.away = {"clear_worker"}
    with caplog.at_level(logging.WARNING, "celery_resilience.crashes"):
        a_guard(starts, "w2").forget_worker()
    assert "may count as crashes" in caplog.text


# --- without a store ------------------------------------------------------------------


def test_without_a_store_redeliveries_are_counted_on_the_message() -> None:
    """It is sent again first, so that the count survives the next death."""
    with pytest.raises(SendAgain) as raised:
        begin(a_guard(None))

    assert raised.value.reason == "redelivered"
    assert sent_again(raised) == {"redeliveries": 1}


def test_without_a_store_a_suspect_runs_alone_too() -> None:
    """When the next death would be the last allowed one."""
    with pytest.raises(SendAgain) as raised:
        begin(a_guard(None), {"redeliveries": 1})

    assert sent_again(raised) == {"redeliveries": 2, "alone": True}
    assert (
        begin(a_guard(None), {"redeliveries": 2, "alone": True}, is_redelivered=False)
        is None
    )


def test_without_a_store_no_message_loops() -> None:
    """After many redeliveries it is failed, saying why."""
    marks = {"redeliveries": MAX_REDELIVERIES_UNSTORED}

    with pytest.raises(TooManyCrashes, match="there is no store") as raised:
        begin(a_guard(None), marks)

    assert raised.value.runs == MAX_REDELIVERIES_UNSTORED + 1
    assert "alone" not in marks


def test_without_a_store_one_redelivery_less_still_runs() -> None:
    """The limit is exact."""
    with pytest.raises(SendAgain):
        begin(a_guard(None), {"redeliveries": MAX_REDELIVERIES_UNSTORED - 1})


# --- the key --------------------------------------------------------------------------


def test_a_key_names_one_attempt_since_its_last_counted_crash() -> None:
    """Another attempt, crash, replay or task has another key."""
    keys = [
        start_key("a", 0, {}),
        start_key("b", 0, {}),
        start_key("a", 1, {}),
        start_key("a", 0, {"crashes": 1}),
        start_key("a", 0, replay_mark("r", "t", 1)),
        start_key("a", 0, replay_mark("r", "t", 2)),
        start_key("a\0" + "0", 0, {}),
    ]

    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)
    assert start_key("a", 0, {"alone": True, "snoozes": 3}) == keys[0]
    assert len(start_key("\ud800\0", 0, {})) == 32
