"""
Real prefork workers: tasks in a second, in turn.

On Redis, plain and resilient; on Redis and RabbitMQ, resilient with and without a
collector beside it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
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

BESIDE_TASKS = 5_000
ONE_FAILS_IN = 20

FAILED_QUEUE = "bench.failed"

START_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 300.0


class Side:
    """
    One app with its worker, which consumes only while it is measured.

    Args:
        kind: "plain" or "resilient".
        server: The broker, Redis or RabbitMQ, of both.
        folder: For the worker's log and the store.
        flags: Of the worker, besides the usual ones.
        concurrency: Children of the worker.
        module: Of the worker's app; it has a task of the same name as the one sent.
        environment: Of the worker, besides the usual one.
    """

    def __init__(
        self,
        kind: str,
        server: services.Service,
        folder: Path,
        *flags: str,
        concurrency: int = 2,
        module: str = "benchmarks.fleet",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.app: Celery = make_app(server.url, kind)
        self._queues: RedisQueues | AmqpQueues = (
            RedisQueues(server) if server.name == "redis" else AmqpQueues(self.app)
        )
        self._module = module
        self._flags = ("--concurrency", str(concurrency), *flags)
        self._sent = 0
        self._log = folder / f"{kind}.log"
        self._environment = {
            **os.environ,
            "BENCH_KIND": kind,
            "BENCH_BROKER_URL": server.url,
            "BENCH_STORE_URL": f"sqlite:///{folder}/failed.sqlite3",
            "C_FORCE_ROOT": "1",
            **(environment or {}),
        }

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """Its worker, for the length of a block."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", self._module),
                    *("worker", "--loglevel", "WARNING"),
                    *("--hostname", f"{self.kind}@bench", "--without-gossip"),
                    *("--without-mingle", "--without-heartbeat", *self._flags),
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
            self._sent = 0
            yield
        finally:
            process.terminate()
            process.wait(60)

    def run(self, *tasks: str) -> float:
        """Tasks in a second, from the first one taken to the last acknowledged."""
        # Of its own: RabbitMQ closes one without heartbeats in the meantime, and
        # what is written to it then is lost without a word.
        with self.app.connection_for_write() as connection:
            producer = self.app.amqp.Producer(connection)
            for task in tasks:
                self.app.send_task(task, producer=producer)
        services.wait_for(
            lambda: self._queues.waiting(self.kind) == len(tasks),
            START_TIMEOUT_S,
            f"{len(tasks)} tasks sent",
        )
        self._sent += len(tasks)
        start = time.perf_counter()
        self._consume(True)
        services.wait_for(self._is_idle, DRAIN_TIMEOUT_S, f"{len(tasks)} tasks")
        seconds = time.perf_counter() - start
        self._consume(False)
        self._queues.empty(FAILED_QUEUE)
        return len(tasks) / seconds

    def children(self) -> list[psutil.Process]:
        """The processes of the worker's pool."""
        inspect: Any = self.app.control.inspect(timeout=5, limit=1)
        (stats,) = inspect.stats().values()
        return [psutil.Process(pid) for pid in stats["pool"]["processes"]]

    def processor_s(self) -> tuple[float, float]:
        """Seconds of the collector, and of all other processes of the worker."""
        inspect: Any = self.app.control.inspect(timeout=5, limit=1)
        (stats,) = inspect.stats().values()
        own = {stats["pid"], *stats["pool"]["processes"]}
        worker = psutil.Process(stats["pid"])
        collector = rest = 0.0
        for process in (worker, *worker.children()):
            times = process.cpu_times()
            if process.pid in own:
                rest += times.user + times.system
            else:
                collector += times.user + times.system
        return collector, rest

    def enqueue(self, count: int) -> float:
        """Seconds for each `delay()`."""
        task = self.app.tasks["nothing"]
        start = time.perf_counter()
        for _ in range(count):
            task.delay()
        seconds = time.perf_counter() - start
        self._queues.empty(self.kind)
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
        return self._queues.is_done(self.kind, self._sent)


class RedisQueues:
    """
    What waits in queues on Redis.

    Args:
        server: The Redis.
    """

    def __init__(self, server: services.Service) -> None:
        self._client = Redis(port=server.port)
        # As Redis is used; the tests' own flushes each write, for it is killed.
        self._client.config_set("appendfsync", "everysec")

    def waiting(self, queue: str) -> int:
        """Messages that no worker has taken."""
        return int(self._client.llen(queue))

    def is_done(self, queue: str, sent: int) -> bool:
        """Whether workers have taken and acknowledged all."""
        pipe = self._client.pipeline()
        pipe.llen(queue)
        pipe.hlen("unacked")
        return pipe.execute() == [0, 0]

    def empty(self, queue: str) -> None:
        """Forget what waits."""
        self._client.delete(queue)


class AmqpQueues:
    """
    What waits in queues on RabbitMQ.

    Args:
        app: It has one worker.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app

    def waiting(self, queue: str) -> int:
        """Messages that no worker has taken."""
        with self._app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            return int(channel.queue_declare(queue, passive=True).message_count)

    def is_done(self, queue: str, sent: int) -> bool:
        """Whether the worker has run all that was sent since it started."""
        # RabbitMQ does not tell what is taken: the worker does.
        inspect: Any = self._app.control.inspect(timeout=5, limit=1)
        begun = [sum(answer["total"].values()) for answer in inspect.stats().values()]
        return begun == [sent] and not any(inspect.active().values())

    def empty(self, queue: str) -> None:
        """Forget what waits."""
        with self._app.connection_for_write() as connection:
            channel: Any = connection.default_channel
            channel.queue_declare(queue, durable=True, auto_delete=False)
            channel.queue_purge(queue)


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
                    side.run(*[task] * (count // 5))
                ours, theirs = interleaved(
                    partial(resilient.run, *[task] * count),
                    partial(plain.run, *[task] * count),
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
    yield from _watched()
    for broker in ("redis", "rabbitmq"):
        yield from _beside_a_collector(broker)


def _watched() -> Iterator[Figure]:
    """Its log as JSON and its metrics on a page, which is read each second."""
    with (
        services.running("redis") as server,
        tempfile.TemporaryDirectory(prefix="resilience-bench-") as folder,
    ):
        plain = Side("plain", server, Path(folder))
        address = f"127.0.0.1:{services.free_port()}"
        watched = Side(
            "resilient",
            server,
            Path(folder),
            "--metrics-port",
            address,
            environment={"BENCH_LOG_FORMAT": "json"},
        )
        tasks, pages = ["nothing"] * EMPTY_TASKS, 0
        has_ended = threading.Event()

        def scrape() -> None:
            nonlocal pages
            while not has_ended.wait(1):
                with urllib.request.urlopen(
                    f"http://{address}/metrics", timeout=10
                ) as page:
                    page.read()
                pages += 1

        with plain.worker(), watched.worker():
            reader = threading.Thread(target=scrape)
            reader.start()
            try:
                for side in (plain, watched):
                    side.run(*tasks[: EMPTY_TASKS // 5])
                ours, theirs = interleaved(
                    partial(watched.run, *tasks), partial(plain.run, *tasks), PAIRS
                )
            finally:
                has_ended.set()
                reader.join()
    assert pages > 0, "nobody has read the metrics"
    ratio, raw = ratio_of(ours, theirs)
    what = f"{EMPTY_TASKS:,} tasks, each nothing, log and metrics on: tasks/s"
    yield Figure(what, ratio, "x", at_least=0.96, raw=[*raw, f"{pages} pages read"])


def _beside_a_collector(broker: str) -> Iterator[Figure]:
    """
    One task in so many fails; each block has a worker of its own.

    The second figure is about what the worker loses where all processors are busy. It
    depends less on what else they do than the first one does.
    """
    shares: list[float] = []
    tasks = ["nothing"] * BESIDE_TASKS
    tasks[::ONE_FAILS_IN] = ["failing"] * len(tasks[::ONE_FAILS_IN])

    def run(side: Side) -> float:
        with side.worker():
            side.run(*tasks[: len(tasks) // 5])
            collector, worker = side.processor_s()
            rate = side.run(*tasks)
            after = side.processor_s()
        if side is beside:
            shares.append((after[0] - collector) / (after[1] - worker))
        return rate

    with (
        services.running(broker) as server,
        tempfile.TemporaryDirectory(prefix="resilience-bench-") as folder,
    ):
        alone = Side("resilient", server, Path(folder))
        beside = Side("resilient", server, Path(folder), "--collect-failed")
        ours, theirs = interleaved(partial(run, beside), partial(run, alone), PAIRS)
    ratio, raw = ratio_of(ours, theirs)
    what = f"beside a collector, {100 / ONE_FAILS_IN:g} % fail, {broker}"
    yield Figure(f"{what}: tasks/s", ratio, "x", at_least=0.97, raw=raw)
    yield Figure(
        f"{what}: its CPU, of the worker's",
        statistics.median(shares),
        "x",
        raw=[f"{share:.3f}" for share in shares],
    )
