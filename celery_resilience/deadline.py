"""A bound on how long a task waits for its store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from celery_resilience.errors import StoreUnavailable
from celery_resilience.threads import start_deaf

Answer = TypeVar("Answer")

#: Seconds that a task, whose soft limit is held back meanwhile, waits for its store.
TASK_WAITS_S = 15.0


def answer_within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """
    What *ask* returns or raises, if it does so in time.

    In a thread of its own: no driver's time limit holds for every step, and a server
    that hangs with its connections open passes those of the network. Late, the store
    may still do what it was asked for.

    Raises:
        StoreUnavailable: There was no answer; nothing is known of what was done.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as exc:
            answer.set_exception(exc)

    start_deaf(run, "answer")
    if wait([answer], seconds).not_done:
        raise StoreUnavailable(f"the store did not answer within {seconds:g} s")
    return answer.result()
