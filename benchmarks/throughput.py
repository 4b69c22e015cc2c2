"""Real prefork workers on Redis: tasks in a second, plain and resilient in turn."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from celery import Celery
from redis import Redis

from benchmarks.figures import Figure, interleaved, ratio_of
from benchmarks.fleet import make_app
from tests import services

ROOT = Path(__file__).parent.parent

EMPTY_TASKS = 5_000
FAILING_TASKS = 2_000
ENQUEUED = 2_000
PAIRS = 7

START_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 300.0


class Side:
    """
    One app with its worker, which consumes only while it is measured.

    Args:
        kind: "plain" or "resilient".
        server: The Redis of both.
        folder: For the worker's log and the store.
    """

    def __init__(self, kind: str, server: services.Service, folder: Path) -> None:
        self.kind = kind
        self.app: Celery = make_app(server.url, kind)
        self._client = Redis(port=server.port)
        # As Redis is used; the tests' own flushes each write, for it is killed.
        self._client.config_set("appendfsync", "everysec")
        self._log = folder / f"{kind}.log"
        self._environment = {
            **os.environ,
            "BENCH_KIND": kind,
            "BENCH_BROKER_URL": server.url,
            "BENCH_STORE_URL": f"sqlite:///{folder}/failed.sqlite3",
            "C_FORCE_ROOT": "1",
        }

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """Its worker, for the length of a block."""
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", "benchmarks.fleet"),
                    *("worker", "--concurrency", "2", "--loglevel", "WARNING"),
                    *("--hostname", f"{self.kind}@bench", "--without-gossip"),
                    *("--without-mingle", "--without-heartbeat"),
                ],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            services.wait_for(self._answers, START_TIMEOUT_S, f"the {self.kind} worker")
            self._consume(False)
            yield
        finally:
            process.terminate()
            process.wait(60)

    def run(self, task: str, count: int) -> float:
        """Tasks in a second, from the first one taken to the last acknowledged."""
        with self.app.producer_pool.acquire(block=True) as producer:
            for _ in range(count):
                self.app.tasks[task].apply_async(producer=producer)
        start = time.perf_counter()
        self._consume(True)
        services.wait_for(self._is_idle, DRAIN_TIMEOUT_S, f"{count} tasks")
        seconds = time.perf_counter() - start
        self._consume(False)
        self._client.delete("bench.failed")
        return count / seconds

    def enqueue(self, count: int) -> float:
        """Seconds for each `delay()`."""
        task = self.app.tasks["nothing"]
        start = time.perf_counter()
        for _ in range(count):
            task.delay()
        seconds = time.perf_counter() - start
        self._client.delete(self.kind)
        return seconds / count

    def _consume(self, on: bool) -> None:
        control = self.app.control
        change = control.add_consumer if on else control.cancel_consumer
        while not change(
            self.kind, destination=[f"{self.kind}@bench"], reply=True, timeout=5
        ):
            continue

    def _answers(self) -> bool:
        return bool(
            self.app.control.ping(destination=[f"{self.kind}@bench"], timeout=0.5)
        )

    def _is_idle(self) -> bool:
        pipe = self._client.pipeline()
        pipe.llen(self.kind)
        pipe.hlen("unacked")
        return pipe.execute() == [0, 0]


def measure() -> Iterator[Figure]:
    """Throughput and the cost of sending."""
    with (
        services.running("redis") as server,
        tempfile.TemporaryDirectory(prefix="resilience-bench-") as folder,
    ):
        plain = Side("plain", server, Path(folder))
        resilient = Side("resilient", server, Path(folder))
        ours, theirs = interleaved(
            partial(resilient.enqueue, ENQUEUED),
            partial(plain.enqueue, ENQUEUED),
            PAIRS,
        )
        ratio, raw = ratio_of(ours, theirs)
        yield Figure("sending a task: time", ratio, "x", at_most=1.02, raw=raw)
        with plain.worker(), resilient.worker():
            for task, count, at_least in (
                ("nothing", EMPTY_TASKS, 0.97),
                ("failing", FAILING_TASKS, 0.80),
            ):
                for side in (plain, resilient):
                    side.run(task, count // 5)
                ours, theirs = interleaved(
                    partial(resilient.run, task, count),
                    partial(plain.run, task, count),
                    PAIRS,
                )
                ratio, raw = ratio_of(ours, theirs)
                yield Figure(
                    f"{count:,} tasks, each {task}: tasks/s",
                    ratio,
                    "x",
                    at_least=at_least,
                    raw=raw,
                )
