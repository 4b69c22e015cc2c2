"""A worker frees the key that waits for a message that it will not run."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from celery_resilience.events import observe
from celery_resilience.forks import thread_gate
from celery_resilience.message import KEY
from celery_resilience.outcome import EVENTS, Outcome, Settlement


class FreesReservations:
    """
    Hears of revoked and expired messages, and frees what waits for them.

    In a thread of its own: the worker's main process never waits for a store.

    Args:
        has_key: Whether a task has keys.
        release: Frees the key of a name, for a task's name and id.
    """

    def __init__(
        self,
        has_key: Callable[[str], bool],
        release: Callable[[str, str, str], None],
    ) -> None:
        self._has_key = has_key
        self._release = release
        self._waiting: SimpleQueue[Settlement] = SimpleQueue()
        self._thread: Thread | None = None

    def attach(self) -> Callable[[], None]:
        """Begin to hear; returns what ends it."""
        return observe(EVENTS[Outcome.REVOKED], self.heard)

    def heard(self, *, settlement: Settlement) -> None:
        """A message will not run."""
        if KEY not in settlement.marks or not self._has_key(settlement.task):
            return
        self._waiting.put(settlement)
        if self._thread is None:
            self._thread = Thread(target=self._run, name="reservations", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            settlement = self._waiting.get()
            name = settlement.marks[KEY][0]
            with thread_gate.inside():
                self._release(name, settlement.task, settlement.task_id)
