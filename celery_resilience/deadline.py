"""A bound on how long a task waits for its store."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

from celery_resilience.errors import StoreUnavailable

Answer = TypeVar("Answer")

#: Seconds that a task, whose soft limit is held back meanwhile, waits for its store.
TASK_WAITS_S = 15.0


def answer_within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """
    What *ask* returns or raises, if it does so in time.

    In a thread of its own: no driver's time limit holds for every step, and a server
    that hangs with its connections open passes those of the network. Late, the store
    may still do what it was asked for.

    That thread takes no signal. A child of billiard's has one thread, in which SIGTERM
    is held back while it says its last word (``pool.py:310``, billiard 4.3). Taken by
    another one, it ends the child with the lock of the results in its hand, and no
    child of a pool without an event loop is heard again.

    Raises:
        StoreUnavailable: There was no answer; nothing is known of what was done.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            answer.set_result(ask())
        except BaseException as exc:
            answer.set_exception(exc)

    Thread(target=run, daemon=True).start()
    if wait([answer], seconds).not_done:
        raise StoreUnavailable(f"the store did not answer within {seconds:.0f} s")
    return answer.result()
