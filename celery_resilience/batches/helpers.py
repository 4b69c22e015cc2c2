"""Threads that wait on the network for the one that runs the task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any

from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.batches")

Call = Callable[[], Any]


class Helpers:
    """
    A few threads that make calls, and end with the batch that asked for them.

    Args:
        count: How many calls are made at once.
        name: Of the threads.
        at_end: Called in each thread as it ends.

    Attributes:
        is_stopped: No further call is begun.
    """

    def __init__(self, count: int, name: str, at_end: Callable[[], object]) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Call] | None] = SimpleQueue()
        self._at_end = at_end
        self._threads: list[Thread] = []
        self.is_stopped = False
        self._count = count
        self._name = name

    def submit(self, call: Call) -> Future[Any]:
        """Make *call* in one of the threads, in this one's context."""
        context = copy_context()
        future: Future[Any] = Future()
        self._calls.put((future, lambda: context.run(call)))
        if len(self._threads) < self._count:
            name = f"{self._name}-{len(self._threads)}"
            self._threads.append(start_deaf(self._work, name))
        return future

    def stop(self) -> None:
        """Begin no further call, and wait for those that are being made."""
        self.is_stopped = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            future, call = given
            if self.is_stopped:
                continue
            try:
                future.set_result(call())
            except BaseException as exc:
                future.set_exception(exc)
            # Not held while it waits for the next.
            del future, call, given
        try:
            self._at_end()
        except Exception:
            logger.exception("at the end of a thread of a batch")
