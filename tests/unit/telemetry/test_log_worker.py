"""One line when a worker starts, and one when it stops."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
from unit.log_records import recorded

from celery_resilience.outcome import Outcome
from celery_resilience.telemetry.log_worker import WorkerLog, worker_logger


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged, from INFO on."""
    level = worker_logger.level
    with recorded("celery_resilience") as found:
        yield found
    worker_logger.setLevel(level)


class Deliveries:
    """What a worker counted."""

    received = 12
    counts: ClassVar = Counter(
        {Outcome.FAILED: 2, Outcome.SUCCEEDED: 9, Outcome.SNOOZED: 1}
    )


class Said:
    """A sentence, and facts."""

    def __init__(self, words: str, **facts: Any) -> None:
        self._words = words
        self._facts = facts

    def words(self) -> str:
        return self._words

    def facts(self) -> Mapping[str, Any]:
        return self._facts


def worker_log(log_format: str | None = None) -> WorkerLog:
    """A log of a worker of five seconds."""
    return WorkerLog(
        log_format,
        Deliveries(),
        start=Said("kept here, 100%", queues=["shop"], pid=7),
        end=Said("drained", exit_code=75),
        clock=iter([10.0, 15.0]).__next__,
    )


def test_a_start_is_one_line(records: list[logging.LogRecord]) -> None:
    """Also where the consumer reconnects."""
    log = worker_log()

    log.started([])
    log.started(["a door"])

    assert [record.getMessage() for record in records] == ["kept here, 100%"]
    assert records[0].levelno == logging.INFO
    assert vars(records[0])["event_name"] == "worker_started"
    assert vars(records[0])["queues"] == ["shop"]


def test_each_weak_door_is_told(records: list[logging.LogRecord]) -> None:
    """As a warning, behind the line of the start."""
    worker_log().started(["door a", "door 100%"])

    assert [record.getMessage() for record in records[1:]] == ["door a", "door 100%"]
    assert {record.levelno for record in records[1:]} == {logging.WARNING}


def test_a_start_is_heard_where_only_warnings_are() -> None:
    """`celery worker` logs warnings by default; a level that was set stays."""
    level = worker_logger.level
    try:
        worker_logger.setLevel(logging.NOTSET)
        worker_log().started([])
        assert worker_logger.level == logging.INFO

        worker_logger.setLevel(logging.ERROR)
        worker_log().started([])
        assert worker_logger.level == logging.ERROR
    finally:
        worker_logger.setLevel(level)


def test_a_stop_tells_what_became_of_the_deliveries(
    records: list[logging.LogRecord],
) -> None:
    """The counts add up to the deliveries, as a sentence and as attributes."""
    worker_log().stopped()

    (record,) = records
    assert record.getMessage() == (
        "stopped after 5 s: 12 deliveries, 9 succeeded, 1 snoozed, 2 failed; drained"
    )
    told = vars(record)
    assert told["event_name"] == "worker_stopped"
    assert (told["uptime_s"], told["exit_code"]) == (5.0, 75)
    assert sum(told[outcome] for outcome in Outcome) == told["received"] == 12


def test_both_are_written_in_the_ready_form(records: list[logging.LogRecord]) -> None:
    """One line of facts each."""
    log = worker_log("json")
    log.started(["a door"])
    log.stopped()

    started, warning, stopped = (json.loads(it.getMessage()) for it in records)
    assert started == {"event": "worker_started", "queues": ["shop"], "pid": 7}
    assert warning == {"event": "worker_warning", "warning": "a door"}
    assert stopped["event"] == "worker_stopped"
    assert stopped["failed"] == 2
