"""A worker's log: each failure once, every line's task, and no secret in any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from log_tasks import SECRETS
from polling import eventually

PASSWORD, CARD, PIN, _ = SECRETS

#: Failures of one group that are told one by one within a minute.
STORM_LIMIT = 20

#: More of them, which are only counted.
MORE = 15

TRACE = "0af7651916cd43dd8448eb211c80319c"

#: Each formatter on a pool of its own, where its worker runs.
SETUPS = {
    "json": "prefork",
    "structlog": "threads",
    "ecs": "gevent",
    "celery": "solo",
}


class Log:
    """What a worker has logged, and the tasks that it ran."""

    def __init__(self, kind: str, worker: Worker) -> None:
        self.kind = kind
        self.worker = worker
        self.ids: dict[str, str] = {}

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its lines of JSON, flat, with one name for what the formatters call apart."""
        return [flat(line, self.kind) for line in objects(self.worker.text)]

    def of(self, logger: str) -> list[dict[str, Any]]:
        """Those of one logger."""
        return [line for line in self.lines if line["logger"] == logger]


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The lines that are objects of JSON."""
    for line in text.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def flat(line: dict[str, Any], kind: str) -> dict[str, Any]:
    """A line, with its logger and its text where all have them."""
    if kind == "ecs":
        return {**line, "logger": line["log"]["logger"], "text": line["message"]}
    if kind == "structlog":
        return {**line, "text": line["event"]}
    if kind == "json":
        return {**line, "logger": line["name"], "text": line["message"]}
    names = {
        "event": "event_name",
        "task": "task_name",
        "message": "exception_message",
        "exception": "exception_type",
        "args": "task_args",
        "kwargs": "task_kwargs",
    }
    known = {new: line[old] for old, new in names.items() if old in line}
    return {**known, **line, "text": line["message"]}


@pytest.fixture(params=SETUPS)
def log(request: pytest.FixtureRequest, make_fleet: FleetMaker) -> Log:
    """The log of a worker that has run all of the tasks, and has stopped."""
    kind = request.param
    fleet = make_fleet(
        "redis",
        fleet_log=kind,
        resilience_redact=["pin"],
        resilience_log_format="json" if kind == "celery" else None,
        worker_redirect_stdouts=False,
        resilience_release="r7",
    )
    worker = fleet.worker("--loglevel", "DEBUG", pool=SETUPS[kind])
    log = Log(kind, worker)
    send_all(fleet, log)
    eventually(
        lambda: len(fleet.records()) == STORM_LIMIT + MORE + 2,
        within_s=60,
        every_s=0.5,
        what="every failure is kept",
    )
    eventually(
        lambda: all(
            fleet.app.AsyncResult(log.ids[name]).ready()
            for name in log.ids
            if name not in ("unknown", "log_skip")
        ),
        within_s=60,
        what="every task has ended",
    )
    assert worker.stop() == 0
    return log


def send_all(fleet: Fleet, log: Log) -> None:
    """Send each task, with secrets where it takes some."""
    order = {"id": 7, "customer": {"password": PASSWORD}, "password": PASSWORD}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    sent = {
        "log_lines": fleet.send("log_lines", headers=headers, root_id="root-1"),
        "log_pay": fleet.send("log_pay", CARD, order, pin=PIN),
        "log_refuse": fleet.send("log_refuse", PIN, order, headers=headers),
        "log_retry": fleet.send("log_retry", PIN),
        "log_skip": fleet.send("log_skip"),
        "log_snooze": fleet.send("log_snooze"),
        "log_plain": fleet.app.tasks["log_plain"].delay(PASSWORD),
        "unknown": fleet.app.send_task("nobody_knows", (PASSWORD,), {"pin": PIN}),
    }
    for _ in range(STORM_LIMIT + MORE):
        fleet.send("boom", "boom", PASSWORD)
    log.ids.update({name: result.id for name, result in sent.items()})


def test_the_log_of_a_worker(log: Log) -> None:
    """With each formatter, on each pool: one worker, everything that it says."""
    text = log.worker.text

    for secret in SECRETS:
        assert secret not in text, [it for it in text.splitlines() if secret in it]
    assert "Logging error" not in text
    check_failure(log)
    check_storm(log)
    check_lines_inside(log)
    check_what_comes_again(log)
    check_start_and_stop(log)


def check_failure(log: Log) -> None:
    """One record with all its facts."""
    (record,) = (
        line
        for line in log.of("celery_resilience.failed")
        if line.get("task_id") == log.ids["log_refuse"]
    )
    assert record["event_name"] == "task_failed"
    assert record["task_name"] == "log_refuse"
    assert record["root_id"] == log.ids["log_refuse"]
    assert record["attempt"] == 1
    assert record["reason"] == "exception"
    assert record["exception_type"] == "ValueError"
    assert record["exception_message"] == "cannot take ***"
    assert record["task_args"].startswith("('***', {'id': 7, 'customer': {'password'")
    assert record["trace_id"] == TRACE
    assert record["worker"] == "w0@test"
    assert len(record["fingerprint"]) == 16
    assert record["runtime_s"] >= 0
    assert record["child_rss_mib"] > 10
    assert record["pid"] > 0
    assert "cannot take ***" in record["traceback"]
    celerys = [
        line
        for line in log.of("celery.app.trace")
        if "cannot take ***" in line["text"]
        and f"log_refuse[{log.ids['log_refuse']}]" in line["text"]
    ]
    assert len(celerys) == 1


def check_storm(log: Log) -> None:
    """The first of a group in full, and the number of the others."""
    booms = [
        line
        for line in log.of("celery_resilience.failed")
        if line["task_name"] == "boom"
    ]
    *told, summary = booms
    assert len(told) == STORM_LIMIT
    assert summary["event_name"] == "failures_summarised"
    assert summary["more"] == MORE
    assert {line["fingerprint"] for line in booms} == {summary["fingerprint"]}


def check_lines_inside(log: Log) -> None:
    """Whoever writes them, also in a thread that the task has made."""
    inside = [
        line
        for line in log.lines
        if line["text"].startswith("of ") and "plain" not in line["text"]
    ]
    assert {line["text"] for line in inside} >= {
        "of a task's logger",
        "of a library's logger",
        "of a thread",
        *(["of structlog's"] if log.kind == "structlog" else []),
    }
    for line in inside:
        assert line["task_id"] == log.ids["log_lines"], line
        assert line["task_name"] == "log_lines"
        assert line["root_id"] == "root-1"
        assert line.get("parent_id") is None
        assert line["attempt"] == 1
        assert line["trace_id"] == TRACE
    (plain,) = (line for line in log.lines if line["text"] == "of a plain task")
    assert plain["task_id"] == log.ids["log_plain"]


def check_what_comes_again(log: Log) -> None:
    """One line each, with its reason; Celery's own of a retry is not told beside it."""
    told = {line["event_name"]: line for line in log.of("celery_resilience.outcome")}
    assert len(told) == len(log.of("celery_resilience.outcome")) == 3
    retried = told["task_retried"]
    assert retried["task_id"] == log.ids["log_retry"]
    assert retried["reason"] == "ConnectionError"
    assert retried["error"] == "*** refused"
    assert told["task_skipped"]["reason"] == "already paid"
    assert told["task_snoozed"]["task_id"] == log.ids["log_snooze"]
    assert told["task_snoozed"]["delay_s"] == 0.1
    assert not [line for line in log.of("celery.app.trace") if "retry:" in line["text"]]


def check_start_and_stop(log: Log) -> None:
    """One line each, with all that an operator asks for."""
    by_event = {
        line["event_name"]: line
        for line in log.of("celery_resilience.worker")
        if "event_name" in line
    }
    started, stopped = by_event["worker_started"], by_event["worker_stopped"]
    assert started["pool"] == SETUPS[log.kind]
    assert started["pid"] == log.worker.pid
    assert started["queues"] == [log.worker.fleet.conf["task_default_queue"]]
    assert started["store_why"] == "the broker"
    assert started["max_crashes"] == 3
    assert started["release"] == "r7"
    assert stopped["exit_code"] == 0
    assert stopped["why"] == "SIGTERM"
    # An unknown task fails too.
    assert stopped["failed"] == STORM_LIMIT + MORE + 2
    assert stopped["retried"] == stopped["skipped"] == stopped["snoozed"] == 1
    assert stopped["uptime_s"] > 0
