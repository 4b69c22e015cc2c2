"""A worker warns of large messages of tasks that have no limit."""

from __future__ import annotations

import logging
from collections.abc import Callable

from celery_resilience.events import observe

logger = logging.getLogger("celery_resilience.messages")

_stop: Callable[[], None] | None = None


class LargeMessages:
    """
    Warns once for each task.

    Args:
        has_limit: Whether the task of a name has `max_message_kib`.
    """

    def __init__(self, has_limit: Callable[[str], bool]) -> None:
        self._has_limit = has_limit
        self._warned: set[str] = set()

    def attach(self) -> None:
        """Hear of large messages from now on, in place of an earlier worker."""
        global _stop
        if _stop is not None:
            _stop()
        _stop = observe("delivery.large_message_received", self.received)

    def received(self, task: str, bytes: int) -> None:
        """Warn of a message, unless it has been done for its task."""
        if task in self._warned or self._has_limit(task):
            return
        self._warned.add(task)
        logger.warning(
            "a message of %s has %.0f KiB: all else in this worker waits while one is "
            "decoded. Pass a key to what is stored elsewhere; the task's "
            "max_message_kib refuses or allows it (told once)",
            task or "an unknown task",
            bytes / 1024,
        )
