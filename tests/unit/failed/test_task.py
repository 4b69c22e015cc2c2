"""The child asks the store before it runs a replayed message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from unit.specimens import a_failed_document, a_summary, replay_mark

from celery_resilience.errors import (
    DropDelivery,
    SchemaMismatch,
    SendAgain,
    StoreUnavailable,
)
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.record import State
from celery_resilience.failed.task import RETRY_S, ReplayFence

NOW = 1_000.0
MARKS = replay_mark("r" * 32, "t1")


class Store:
    """A store in memory that gives one answer."""

    def __init__(self, answer: bool | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str, str]] = []

    def start(self, id: str, *, token: str, copy: str) -> bool:
        self.asked.append((id, token, copy))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def fence(store: Any) -> ReplayFence:
    """A fence before *store*."""
    return ReplayFence(
        lambda: store, namespace="shop", clock=lambda: NOW, redelivered_within_s=100
    )


def test_a_copy_that_may_run_passes() -> None:
    """The store is asked with all that names the copy."""
    store = Store(True)

    fence(store).before(MARKS)

    assert store.asked == [("r" * 32, "t1", "c")]


def test_a_copy_that_may_not_run_is_dropped() -> None:
    """Acknowledged and counted, never run."""
    with pytest.raises(DropDelivery) as dropped:
        fence(Store(False)).before(MARKS)

    assert dropped.value.reason == "replay_duplicate"


def test_a_store_that_does_not_answer_makes_it_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Running unasked could run it twice."""
    with (
        caplog.at_level(logging.WARNING, "celery_resilience.failed"),
        pytest.raises(SendAgain) as again,
    ):
        fence(Store(StoreUnavailable("away"))).before(MARKS)

    assert again.value.reason == "store_unavailable"
    assert again.value.delay_s == RETRY_S
    assert again.value.marks == {}
    assert "away" in caplog.text


def test_tables_of_another_release_make_it_wait() -> None:
    """As a store that is away: it is not failed unrun."""
    with pytest.raises(SendAgain):
        fence(Store(SchemaMismatch())).before(MARKS)


def test_a_worker_without_a_store_runs_it_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A replay is never lost for want of a setting."""
    with caplog.at_level(logging.WARNING, "celery_resilience.failed"):
        fence(None).before(MARKS)

    assert "unfenced" in caplog.text


def test_the_store_is_asked_for_at_each_use() -> None:
    """A forked child opens its own."""
    stores = iter([Store(True), Store(False)])
    asking = fence(None)
    asking._store = lambda: next(stores)  # type: ignore[assignment,return-value]

    asking.before(MARKS)
    with pytest.raises(DropDelivery):
        asking.before(MARKS)


class Records:
    """A store in memory that lists one record, or fails."""

    def __init__(self, found: Any) -> None:
        self.found = found
        self.wanted: list[Filter] = []

    def list(self, wanted: Filter) -> Iterator[Any]:
        self.wanted.append(wanted)
        if isinstance(self.found, Exception):
            raise self.found
        return iter(self.found)


@pytest.mark.parametrize(
    ("facts", "is_dropped"),
    [
        (None, False),
        ({"state": State.UNRESOLVED, "replays": 1}, False),
        ({"state": State.DISCARDED, "replays": 1}, False),
        ({"state": State.REPLAYING, "replays": 0}, True),
        ({"state": State.RESOLVED, "replays": 1, "last_failed_at": NOW - 99}, True),
        ({"state": State.RESOLVED, "replays": 1, "last_failed_at": NOW - 101}, False),
        ({"state": State.RESOLVED, "replays": 0, "last_failed_at": NOW - 1}, False),
    ],
)
def test_a_redelivery_beside_a_replay_is_dropped(
    facts: dict[str, Any] | None, is_dropped: bool
) -> None:
    """The replay stands for it; a later message of that task id runs."""
    store = Records([] if facts is None else [a_summary(**facts)])

    if is_dropped:
        with pytest.raises(DropDelivery):
            fence(store).before_redelivery("task-1")
    else:
        fence(store).before_redelivery("task-1")

    (wanted,) = store.wanted
    assert wanted == Filter(state=None, ids=(a_failed_document()["id"],))


def test_a_redelivery_runs_where_nobody_can_be_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As it does without us."""
    fence(None).before_redelivery("task-1")
    with caplog.at_level(logging.WARNING, "celery_resilience.failed"):
        fence(Records(StoreUnavailable("away"))).before_redelivery("task-1")

    assert "may be being replayed" in caplog.text
