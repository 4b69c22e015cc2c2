"""Every row of the table of outcomes, on every pool and broker that can have it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import BROKERS, conf_for
from fleet_runner import Fleet
from polling import eventually

#: Pools and brokers: each pool, and each way in which a broker differs.
COMBINATIONS = [
    ("redis", "prefork"),
    ("redis", "threads"),
    ("redis", "gevent"),
    ("redis", "solo"),
    ("rabbitmq", "prefork"),
    ("rabbitmq", "threads"),
    ("rabbitmq-quorum", "prefork"),
    ("filesystem", "prefork"),
    ("filesystem", "solo"),
]

#: The public JSON, schema 1.
FIELDS = frozenset(
    """
    schema id app state reason task task_id queue exchange routing_key failed_queue
    exception message traceback fingerprint args kwargs attempts first_failed_at
    last_failed_at replays replayed_as root_id parent_id in_chord chain_length priority
    content_type body_kib release trace_id sentry_event_id idempotency_key
    """.split()  # noqa: SIM905 -- reads as the contract has it
)
ATTEMPT_FIELDS = frozenset(
    ("at", "worker", "pid", "reason", "exception", "message", "runtime_s")
)

ENFORCES_HARD_LIMITS = {"prefork", "gevent"}


@dataclass
class Row:
    """What one task must end in."""

    task: str
    outcome: str
    reason: str | None = None
    state: str | None = None
    exception: str | None = None
    message: str | None = None
    runs: int = 1
    result: Any = None
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    pools: frozenset[str] = frozenset({"prefork", "threads", "gevent", "solo"})
    #: Deliveries that it takes, by outcome.
    deliveries: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deliveries = self.deliveries or {self.outcome: 1}


PREFORK = frozenset({"prefork"})

ROWS = [
    Row("ok", "succeeded", state="SUCCESS", result="value", args=("value",)),
    Row("boom", "failed", "exception", "FAILURE", "ValueError", "boom"),
    Row(
        "unpicklable",
        "failed",
        "exception",
        "FAILURE",
        "fleet.Unpicklable",
        "cannot be pickled",
    ),
    Row("hostile", "failed", "exception", "FAILURE", "fleet.Hostile"),
    Row("memory_error", "failed", "exception", "FAILURE", "MemoryError", "none left"),
    Row("system_exit", "failed", "exception", "FAILURE", "SystemExit", "3"),
    Row("keyboard_interrupt", "failed", "exception", "FAILURE", "KeyboardInterrupt"),
    Row("unheard", "failed", "exception", "FAILURE", "fleet.Unheard", "of"),
    Row(
        "soft_limit",
        "failed",
        "exception",
        "FAILURE",
        "billiard.exceptions.SoftTimeLimitExceeded",
        pools=PREFORK,
    ),
    Row(
        "hard_limit",
        "failed",
        "hard_time_limit",
        "FAILURE",
        "billiard.exceptions.TimeLimitExceeded",
        pools=frozenset(ENFORCES_HARD_LIMITS),
    ),
    Row(
        "hard_limit_unacked",
        "failed",
        "hard_time_limit",
        "FAILURE",
        runs=3,
        pools=frozenset(ENFORCES_HARD_LIMITS),
        deliveries={"requeued": 2, "failed": 1},
    ),
    Row("killed_early", "failed", "worker_lost", "FAILURE", pools=PREFORK),
    Row(
        "killed_late",
        "failed",
        "worker_lost",
        "FAILURE",
        message="SIGKILL",
        runs=3,
        pools=PREFORK,
        deliveries={"requeued": 2, "failed": 1},
    ),
    Row(
        "exits_late",
        "failed",
        "worker_lost",
        "FAILURE",
        message="exitcode 0",
        runs=3,
        pools=PREFORK,
        deliveries={"requeued": 2, "failed": 1},
    ),
    Row("killed_no_rerun", "failed", "worker_lost", "FAILURE", pools=PREFORK),
    Row(
        "killed_once",
        "succeeded",
        state="SUCCESS",
        result="done",
        runs=2,
        args=("{folder}/killed_once",),
        pools=PREFORK,
        deliveries={"requeued": 1, "succeeded": 1},
    ),
    Row("rejected", "failed", "rejected", "FAILURE", message="not for me"),
    Row(
        "requeued_once",
        "succeeded",
        state="SUCCESS",
        result="done",
        runs=2,
        args=("{folder}/requeued_once",),
        deliveries={"requeued": 1, "succeeded": 1},
    ),
    Row("ignored", "skipped", state="PENDING"),
    Row("skipped", "skipped", state="SUCCESS", result=42),
    Row("skipped_with_autoretry", "skipped", state="SUCCESS", result=42),
    Row(
        "snoozed_with_autoretry",
        "succeeded",
        state="SUCCESS",
        result="awake",
        runs=2,
        deliveries={"snoozed": 1, "succeeded": 1},
    ),
    Row(
        "snoozed",
        "succeeded",
        state="SUCCESS",
        result="awake",
        runs=3,
        deliveries={"snoozed": 2, "succeeded": 1},
    ),
    Row(
        "retried_once",
        "succeeded",
        state="SUCCESS",
        result="second",
        runs=2,
        deliveries={"retried": 1, "succeeded": 1},
    ),
    Row(
        "retries_spent",
        "failed",
        "retries_exhausted",
        "FAILURE",
        "ValueError",
        "every time",
        runs=2,
        deliveries={"retried": 1, "failed": 1},
    ),
    Row(
        "autoretries_spent",
        "failed",
        "retries_exhausted",
        "FAILURE",
        "ValueError",
        "every time, by itself",
        runs=2,
        deliveries={"retried": 1, "failed": 1},
    ),
    Row("not_kept", "failed", state="FAILURE"),
    Row("kept_apart", "failed", "exception", "FAILURE", "ValueError"),
]


class Settled:
    """All rows of one combination, sent to one worker and settled."""

    def __init__(self, fleet: Fleet, broker: str, pool: str) -> None:
        self.fleet = fleet
        self.broker = broker
        self.pool = pool
        self.rows = [row for row in ROWS if pool in row.pools]
        if broker == "filesystem":
            # kombu's virtual transports reject with requeue at once and for ever,
            # but the filesystem keeps no order that would end it; see kombu.
            self.rows = [row for row in self.rows if row.task != "requeued_once"]
        self.ids: dict[str, str] = {}

    def run(self) -> None:
        """Send every row, wait until it is settled, and stop the worker."""
        worker = self.fleet.worker(pool=self.pool, concurrency=2)
        for row in self.rows:
            args = [str(a).format(folder=self.fleet.folder) for a in row.args]
            self.ids[row.task] = self.fleet.send(row.task, *args).id
        wanted = sum(sum(row.deliveries.values()) for row in self.rows)
        failed = {row.task for row in self.rows if row.reason}
        try:
            eventually(
                lambda: failed <= {r["task"] for r in self.fleet.records().values()},
                within_s=90,
                every_s=0.5,
                what=f"records of {failed} on {self.broker}, {self.pool}",
            )
            eventually(
                lambda: all(
                    self.fleet.runs(self.ids[row.task]) >= row.runs for row in self.rows
                ),
                within_s=60,
                what="every run",
            )
        except AssertionError as exc:
            exc.add_note(worker.text)
            raise
        assert worker.stop() == 0, worker.text
        self.outcomes = worker.outcomes()
        self.records = self.fleet.records()
        assert self.outcomes["received"] == wanted, worker.text


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def settled(
    request: pytest.FixtureRequest, servers: Any, tmp_path_factory: Any
) -> Iterator[Settled]:
    """One combination; the module's tests look at different sides of it."""
    broker, pool = request.param
    folder: Path = tmp_path_factory.mktemp(f"{broker}-{pool}")
    name = BROKERS[broker]
    conf = conf_for(broker, folder, None if name is None else servers(name))
    fleet = Fleet(folder, conf)
    try:
        outcome = Settled(fleet, broker, pool)
        outcome.run()
        yield outcome
    finally:
        fleet.close()


def test_the_counts_add_up_to_the_deliveries(settled: Settled) -> None:
    """Every delivery ends in exactly one outcome."""
    wanted: dict[str, int] = {}
    for row in settled.rows:
        for outcome, count in row.deliveries.items():
            wanted[outcome] = wanted.get(outcome, 0) + count

    counted = {k: v for k, v in settled.outcomes.items() if k != "received"}
    assert counted == wanted
    assert settled.outcomes["received"] == sum(counted.values())


def test_every_failure_is_kept_once_with_its_reason(settled: Settled) -> None:
    """A record has the true type, the message, the reason and one attempt."""
    for row in settled.rows:
        record = settled.records.get(settled.ids[row.task])
        if row.reason is None:
            assert record is None, row.task
            continue
        assert record is not None, row.task
        assert record["reason"] == row.reason, row.task
        assert record["state"] == "unresolved"
        assert len(record["attempts"]) == 1, record["attempts"]
        if row.exception:
            assert record["exception"] == row.exception
        if row.message:
            assert row.message in record["message"]
        assert record["fingerprint"]
        assert record["queue"] == settled.fleet.conf["task_default_queue"]


def test_results_are_what_celery_makes_of_them(settled: Settled) -> None:
    """The result backend says what the table of outcomes says."""
    for row in settled.rows:
        result = settled.fleet.app.AsyncResult(settled.ids[row.task])
        assert result.state == row.state, row.task
        if row.state == "SUCCESS":
            assert result.result == row.result, row.task


def test_bodies_run_as_often_as_they_should(settled: Settled) -> None:
    """Nothing is run once more than the table says."""
    for row in settled.rows:
        assert settled.fleet.runs(settled.ids[row.task]) == row.runs, row.task


def test_each_failure_is_logged_once(settled: Settled) -> None:
    """One record of the logger celery_resilience.failed for each failed delivery."""
    text = settled.fleet.workers[0].text
    for row in settled.rows:
        wanted = 1 if row.outcome == "failed" else 0
        line = f"task failed: {row.task}[{settled.ids[row.task]}]"
        assert text.count(line) == wanted, row.task


def test_a_task_may_have_a_failed_queue_of_its_own(settled: Settled) -> None:
    """`failed_queue` of the task beats the app's."""
    record = settled.records[settled.ids["kept_apart"]]
    assert record["failed_queue"] == "apart.failed"


def test_the_public_json_has_every_field(settled: Settled) -> None:
    """Schema 1 is a promise."""
    record = settled.records[settled.ids["boom"]]
    assert record.keys() == FIELDS
    assert record["attempts"][0].keys() == ATTEMPT_FIELDS
    assert json.loads(json.dumps(record)) == record
