"""What a running body may ask of celery-resilience."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Where a request remembers the name of its key, its run with it, and that another
#: task goes on under its id.
KEY_NAME = "_resilience_key"
KEYED_RUN = "_resilience_run"
HANDED_OVER = "_resilience_handed_over"


class RunView:
    """
    The running body's view of what surrounds it, as `self.resilience`.

    Args:
        request: Of the run; None outside of one.
    """

    def __init__(self, request: Any) -> None:
        self._said = {} if request is None else vars(request)

    @property
    def key(self) -> str | None:
        """
        The idempotency key of this run, the same in each run of the same effect.

        Hand it to a service that takes one: what a key cannot undo, the service then
        does not repeat. None outside of a worker, and for a call without a key.
        """
        return self._said.get(KEY_NAME)

    @property
    def fencing_token(self) -> int:
        """A number that grows with each run of the same key; 0 without a key."""
        run = self._said.get(KEYED_RUN)
        return 0 if run is None else run.epoch

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """
        What *coroutine* returns, run on an event loop that outlives this run.

        Each thread of a process has one, so that an asynchronous engine keeps its
        connections between tasks. What the coroutine leaves running is cancelled. Not
        on gevent and eventlet, whose greenlets share a thread.

        Raises:
            RuntimeError: A loop runs in this thread: await it instead.
        """
        from celery_resilience.async_runner import run

        return run(coroutine)
