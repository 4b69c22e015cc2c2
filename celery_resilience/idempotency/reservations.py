"""A worker frees the reservation of a message that it will not run."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from celery_resilience.events import observe
from celery_resilience.message import KEY
from celery_resilience.outcome import EVENTS, Outcome, Settlement


class FreesReservations:
    """
    Hears of revoked and expired messages, and frees what they had reserved.

    In a thread of its own: the worker's main process never waits for a store.

    Args:
        is_unique: Whether messages of a task have reservations.
        release: Frees that of a key's name, for a task's name and id.
    """

    def __init__(
        self,
        is_unique: Callable[[str], bool],
        release: Callable[[str, str, str], None],
    ) -> None:
        self._is_unique = is_unique
        self._release = release
        self._waiting: SimpleQueue[Settlement] = SimpleQueue()
        self._thread: Thread | None = None

    def attach(self) -> Callable[[], None]:
        """Begin to hear; returns what ends it."""
        return observe(EVENTS[Outcome.REVOKED], self.heard)

    def heard(self, *, settlement: Settlement) -> None:
        """A message will not run."""
        if KEY not in settlement.marks or not self._is_unique(settlement.task):
            return
        self._waiting.put(settlement)
        if self._thread is None:
            self._thread = Thread(target=self._run, name="reservations", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            settlement = self._waiting.get()
            name = settlement.marks[KEY][0]
            self._release(name, settlement.task, settlement.task_id)
