"""What a running body may ask of celery-resilience."""

from __future__ import annotations

from typing import Any

from celery_resilience.draining import is_draining

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

    @property
    def stopping(self) -> bool:
        """
        Whether the worker drains: a long body may end early, or hand over.

        Costs a fraction of a microsecond, so that a loop may ask in each round. Always
        False in a child that was spawned and not forked.
        """
        return is_draining()
