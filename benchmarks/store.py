"""Collecting 5 000 failed tasks, looking at 300 000, and replaying 5 000."""

from __future__ import annotations

import contextlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, text

from benchmarks.figures import Figure, interleaved, ratio_of
from benchmarks.fleet import make_app
from celery_resilience import FailedTasks
from celery_resilience.failed.envelope import envelope, posted
from celery_resilience.failure import Failure
from celery_resilience.install import installation_of
from celery_resilience.message import OriginalMessage
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.publisher import Publisher
from tests import services

RECORDS = 300_000
COLLECTED = 5_000
REPLAYED = 5_000
STORES = ("sqlite", "postgresql", "mariadb", "redis")
PAIRS = 3
LOOKS = 7
PAGE = 5_000


def failure(number: int) -> dict[str, Any]:
    """The envelope of one failed task, of 25 kinds."""
    kind = number % 25
    task, id = f"shop.tasks.task_{kind}", f"bench-{number:08d}"
    original = OriginalMessage(
        body=b'[[%d], {}, {"callbacks": null, "errbacks": null}]' % number,
        headers={"task": task, "id": id, "retries": 0, "lang": "py"},
        properties={"correlation_id": id, "priority": 0, "delivery_mode": 2},
        content_type="application/json",
        content_encoding="utf-8",
        exchange="",
        routing_key="resilient",
        queue="resilient",
    )
    settlement = Settlement(
        outcome=Outcome.FAILED,
        reason=Reason.EXCEPTION,
        task=task,
        task_id=id,
        queue="resilient",
        worker="worker@bench",
        failure=Failure(
            "shop.errors.ServiceDown",
            f"503 for order {number}",
            f"{kind:016x}",
            "Traceback (most recent call last):\n"
            + '  File "shop/tasks.py", line 10, in task\n    call()\n' * 12,
        ),
        args=f"({number},)",
        kwargs="{}",
        arguments={"order_id": str(number)},
    )
    return envelope(
        settlement,
        original,
        namespace="bench",
        failed_queue="bench.failed",
        at=1_790_000_000.0 + number,
    )


def fill(app: Celery, count: int) -> None:
    """Keep *count* failed tasks."""
    store = installation_of(app).failed_store()
    for start in range(0, count, PAGE):
        store.keep([failure(n) for n in range(start, min(start + PAGE, count))])


def measure() -> Iterator[Figure]:
    """Collects, looks at a large store, then replays."""
    for name in STORES:
        with running_store(name) as (url, _), services.running("redis") as redis:
            yield _collection(name, url, redis.url)
    for name in STORES:
        with running_store(name) as (url, _):
            yield from _looks(name, url)
    for broker in ("redis", "rabbitmq"):
        with services.running(broker) as server, running_store("sqlite") as (url, _):
            yield _replays(broker, server.url, url)


@contextlib.contextmanager
def running_store(name: str) -> Iterator[tuple[str, services.Service | None]]:
    """The URL of an empty store, and its server where it has one."""
    if name != "sqlite":
        with services.running(name) as server:
            if name == "mariadb":
                _use_default_memory(server.url)
            yield server.url, server
        return
    with tempfile.TemporaryDirectory(prefix="resilience-bench-") as folder:
        yield f"sqlite:///{Path(folder)}/failed.sqlite3", None


def _use_default_memory(url: str) -> None:
    """As MariaDB is used; the tests' own has less, for there are several."""
    engine = create_engine(url)
    with engine.connect() as connection:
        statement = f"SET GLOBAL innodb_buffer_pool_size = {128 * 2**20}"
        connection.execute(text(statement))
    engine.dispose()


def _collection(name: str, store_url: str, broker_url: str) -> Figure:
    """From a failed queue on Redis; the first collection makes the tables."""
    app = make_app(broker_url, "resilient", store_url)
    failed = FailedTasks(app)
    publisher = Publisher(app)
    rates: list[float] = []
    costs: list[float] = []
    for number in range(PAIRS + 1):
        start_at = number * COLLECTED
        for n in range(start_at, start_at + COLLECTED):
            publisher.publish(posted(failure(n)))
        start, used = time.perf_counter(), time.process_time()
        assert failed.collect().documents == COLLECTED
        rates.append(COLLECTED / (time.perf_counter() - start))
        costs.append((time.process_time() - used) / COLLECTED * 1e6)
    publisher.close()
    return Figure(
        f"collection into {name}",
        statistics.median(rates[1:]),
        "records/s",
        at_least=2_000,
        raw=[
            f"{rate:,.0f}/s, {cost:.0f} µs of the collector's CPU for each"
            for rate, cost in zip(rates[1:], costs[1:], strict=True)
        ],
    )


def _looks(name: str, url: str) -> Iterator[Figure]:
    fill(make_app("memory://", "resilient", url), RECORDS)
    for what in ("list", "show"):
        times: list[float] = []
        grown: list[float] = []
        for _ in range(LOOKS):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.store", what, url],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds, mib = map(float, done.stdout.split())
            times.append(seconds * 1e3)
            grown.append(mib)
        yield Figure(
            f"{what} on {RECORDS:,} records, {name}",
            statistics.median(times),
            "ms",
            at_most=150,
            raw=[f"{t:.0f} ms, {m:.1f} MiB" for t, m in zip(times, grown, strict=True)],
        )


def look(what: str, url: str) -> tuple[float, float]:
    """Seconds and MiB of one look, in a process that has just started."""
    failed = FailedTasks(make_app("memory://", "resilient", url), collects=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if what == "list":
        found = len(failed.list(limit=50))
        assert found == 50, found
    else:
        assert failed.get(f"bench-{RECORDS // 2:08d}").to_dict()["task"]
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, grown / 1024


def _replays(broker: str, broker_url: str, store_url: str) -> Figure:
    app = make_app(broker_url, "resilient", store_url)
    failed = FailedTasks(app, collects=False)
    fill(app, REPLAYED)
    publisher = Publisher(app)
    message = failed.get("bench-00000000").original
    publisher.publish(message, declare=True)

    def replay() -> float:
        ids = [summary.id for summary in failed.store.list(_everything(), limit=None)]
        start = time.perf_counter()
        report = failed.replay(ids)
        seconds = time.perf_counter() - start
        assert len(report.sent) == REPLAYED, report
        failed.reopen(ids)
        return REPLAYED / seconds

    def publish() -> float:
        start = time.perf_counter()
        for _ in range(REPLAYED):
            publisher.publish(message)
        return REPLAYED / (time.perf_counter() - start)

    ours, bare = interleaved(replay, publish, PAIRS)
    publisher.close()
    ratio, raw = ratio_of(ours, bare)
    return Figure(
        f"replay of {REPLAYED:,} on {broker}, of bare confirmed publishing",
        ratio,
        "x",
        at_least=0.5,
        raw=raw,
    )


def _everything() -> Any:
    from celery_resilience.failed.filters import Filter

    return Filter()


if __name__ == "__main__":
    sys.stdout.write(" ".join(map(str, look(*sys.argv[1:]))))
