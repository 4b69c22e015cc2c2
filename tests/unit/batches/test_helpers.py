"""Threads that make calls beside the one that runs the task."""

from __future__ import annotations

import signal
import threading

import pytest
from polling import eventually

from celery_resilience.batches.helpers import Helpers


def test_what_has_not_begun_is_not_begun_after_the_stop() -> None:
    """And what has is waited for."""
    helpers = Helpers(1, "helper", int)
    begun = threading.Event()
    calls: list[str] = []

    def first() -> None:
        begun.set()
        eventually(lambda: helpers.is_stopped)
        calls.append("first")

    helpers.submit(first)
    helpers.submit(lambda: calls.append("second"))
    begun.wait(20)
    helpers.stop()

    assert calls == ["first"]


def test_each_thread_is_deaf_and_says_when_it_ends() -> None:
    """A signal of the pool's is the main thread's alone."""
    ended: list[str] = []
    helpers = Helpers(
        2, "helper", lambda: ended.append(threading.current_thread().name)
    )
    barrier = threading.Barrier(2, timeout=20)

    def masked() -> bool:
        barrier.wait()
        return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    futures = [helpers.submit(masked) for _ in range(2)]
    assert [future.result(20) for future in futures] == [True, True]
    helpers.stop()

    assert sorted(ended) == ["helper-0", "helper-1"]


def test_what_a_call_raises_is_had_with_its_result() -> None:
    """Also what would end a thread."""
    helpers = Helpers(1, "helper", int)

    def leave() -> None:
        raise SystemExit(3)

    future = helpers.submit(leave)
    with pytest.raises(SystemExit):
        future.result(20)
    assert helpers.submit(lambda: 7).result(20) == 7
    helpers.stop()
