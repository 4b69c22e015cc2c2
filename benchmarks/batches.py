"""What the scope of an item costs, beside the bare loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.figures import Figure
from celery_resilience import batch

ITEMS = 10_000
REPEATS = 10


def measure() -> Iterator[Figure]:
    """An item that goes well, with its share of a chunk; and one that is skipped."""
    bare = _best(_bare)
    yield Figure(
        "batch: more for an item",
        _best(_scoped) - bare,
        "µs",
        at_most=3,
        raw=[f"a bare loop {bare:.2f}"],
    )
    skipped = _best(_skipped) - _best(_caught)
    yield Figure("batch: more for an item that is skipped", skipped, "µs")


def _best(run: Callable[[], object]) -> float:
    """The best time of an item in microseconds."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times) / ITEMS * 1e6


def _bare() -> None:
    for _ in range(ITEMS):
        pass


def _scoped() -> None:
    with batch("bench") as made:
        for item in made.items(range(ITEMS)):
            with made.item(item):
                pass


def _caught() -> None:
    for item in range(ITEMS):
        try:
            raise ValueError(item)
        except ValueError:
            pass


def _skipped() -> None:
    with batch("bench", skip=ValueError, max_errors=None) as made:
        for item in made.items(range(ITEMS)):
            with made.item(item):
                raise ValueError(item)
