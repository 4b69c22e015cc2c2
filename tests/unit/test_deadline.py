"""A task waits for its store for a while, and its child stays billiard's."""

from __future__ import annotations

import signal
import subprocess
import sys
from threading import Event

import pytest

from celery_resilience.deadline import answer_within
from celery_resilience.errors import StoreUnavailable


def test_an_answer_and_an_error_are_the_callers() -> None:
    """Whichever comes."""
    assert answer_within(5, lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        answer_within(5, lambda: 1 // 0)


def test_the_callers_signals_stay_as_they_are() -> None:
    """What ends a task is for the thread that runs it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    blocked = answer_within(5, lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []))

    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT} <= blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


CHILD = """
import os, signal, threading
from celery_resilience.deadline import answer_within
from celery_resilience.errors import StoreUnavailable

started, end = threading.Event(), threading.Event()

def ask():
    started.set()
    end.wait(30)

try:
    answer_within(0, ask)
except StoreUnavailable:
    print("late")
started.wait(30)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.kill(os.getpid(), signal.SIGTERM)
print("alive", flush=True)
end.set()
"""


def test_a_late_store_takes_no_signal_that_billiard_holds_back() -> None:
    """A child that died of it in the middle of its last word left the pool locked."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, "late\nalive\n"), done.stderr


def test_a_store_that_hangs_is_given_up() -> None:
    """And nothing is known of what was done."""
    with pytest.raises(StoreUnavailable, match="did not answer within 0 s"):
        answer_within(0, lambda: Event().wait(1))
