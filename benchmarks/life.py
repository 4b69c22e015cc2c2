"""
What the care for sessions, memory and the worker's life costs, and what it saves.

Real prefork workers on Redis and PostgreSQL, plain and resilient in turn.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import django_tasks
from benchmarks.figures import Figure, interleaved, ratio_of
from benchmarks.throughput import Side
from tests import services

QUERIES = 3_000
DJANGO_TASKS = 1_000
PAIRS = 5

RECYCLES = 12
PLAIN_RECYCLES = 4

#: A run of `leaking` is above it.
RECYCLE_MIB = 4

EVERYTHING = ("--memory-recycle-mib", "2048", "--memory-limit-mib", "2048")


def measure() -> Iterator[Figure]:
    """Ratios of tasks in a second, the wait for a new child, and its memory."""
    with (
        services.running("redis") as redis,
        services.running("postgresql") as postgresql,
        tempfile.TemporaryDirectory(prefix="resilience-bench-") as name,
    ):
        folder = Path(name)
        database = {"BENCH_DATABASE_URL": postgresql.url}
        yield from _with_everything_on(redis, folder, database)
        yield from _django(redis, folder, database)
        yield from _recycled(redis, folder, database)


def _with_everything_on(
    redis: services.Service, folder: Path, database: dict[str, str]
) -> Iterator[Figure]:
    plain = Side("plain", redis, folder, environment=database)
    resilient = Side("resilient", redis, folder, *EVERYTHING, environment=database)
    with plain.worker(), resilient.worker():
        for task, count in (("nothing", QUERIES), ("querying", QUERIES)):
            ratio, raw = _ratio(resilient, plain, task, count)
            yield Figure(
                f"{count:,} tasks, each {task}, with limits: tasks/s",
                ratio,
                "x",
                at_least=0.97,
                raw=raw,
            )
        mib = [
            statistics.median(
                child.memory_full_info().uss / 2**20 for child in side.children()
            )
            for side in (resilient, plain)
        ]
    yield Figure(
        "own memory of a child, more than in plain Celery",
        mib[0] - mib[1],
        "MiB",
        at_most=1.5,
        raw=[f"{mib[0]:.1f} - {mib[1]:.1f}"],
    )


def _ratio(
    resilient: Side, plain: Side, task: str, count: int
) -> tuple[float, list[str]]:
    for side in (plain, resilient):
        side.run(*[task] * (count // 5))
    return ratio_of(
        *interleaved(
            partial(resilient.run, *[task] * count),
            partial(plain.run, *[task] * count),
            PAIRS,
        )
    )


def _django(
    redis: services.Service, folder: Path, database: dict[str, str]
) -> Iterator[Figure]:
    module = django_tasks.__name__
    plain = Side("plain", redis, folder, module=module, environment=database)
    resilient = Side("resilient", redis, folder, module=module, environment=database)
    with plain.worker(), resilient.worker():
        ratio, raw = _ratio(resilient, plain, django_tasks.TASK, DJANGO_TASKS)
    yield Figure(
        "Django tasks that ask PostgreSQL once: tasks/s",
        ratio,
        "x",
        at_least=2.0,
        raw=raw,
    )


def _recycled(
    redis: services.Service, folder: Path, database: dict[str, str]
) -> Iterator[Figure]:
    """Each task recycles the only child: all else takes a millisecond."""
    limit = ("--memory-recycle-mib", str(RECYCLE_MIB))
    resilient = Side(
        "resilient", redis, folder, *limit, concurrency=1, environment=database
    )
    with resilient.worker():
        ours = 1_000 / resilient.run(*["leaking"] * RECYCLES)
    limit = ("--max-memory-per-child", "1")
    plain = Side("plain", redis, folder, *limit, concurrency=1, environment=database)
    with plain.worker():
        theirs = 1_000 / plain.run(*["leaking"] * PLAIN_RECYCLES)
    yield Figure(
        "a recycled child's slot is free again after",
        ours,
        "ms",
        at_most=200,
        raw=[f"plain Celery: {theirs:,.0f} ms"],
    )
