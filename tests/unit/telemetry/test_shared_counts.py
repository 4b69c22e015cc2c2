"""What a worker's processes count together."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from threading import Thread

import pytest

from celery_resilience.telemetry.shared_counts import SharedCounts


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns after each step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_no_count_of_any_thread_or_process_is_lost() -> None:
    """Children add to what their parent has counted."""
    counts = SharedCounts(["a", "b"])

    def add() -> None:
        for _ in range(2_000):
            counts.add("b")

    def child() -> None:
        threads = [Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    counts.add("a", 3)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()

    assert counts.new() == {"a": 3, "b": 8_000}
    assert counts.new() == {}
    counts.add("a")
    assert counts.new() == {"a": 1}


def test_whoever_interrupts_a_count_does_not_wait_for_it() -> None:
    """A signal's handler, or a child that was forked in the midst of one."""
    counts = SharedCounts(["a"])
    counts.add("a")
    _, lock = counts._own[os.getpid()]

    with lock:
        counts.add("a")
        process = multiprocessing.get_context("fork").Process(
            target=counts.add, args=("a", 10)
        )
        process.start()
        process.join(timeout=10)
        assert counts.new() == {"a": 11}
    counts.add("a")

    assert counts.new() == {"a": 2}
