"""A worker that holds many messages hands snoozed ones to the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from celery_resilience.events import emit, observed
from celery_resilience.message import OriginalMessage, id_text, marks_of, text_of
from celery_resilience.outcome import ENDED, EVENTS, Ended, Outcome, Settlement
from celery_resilience.shelf import policy
from celery_resilience.shelf.shelf import Shelf

logger = logging.getLogger("celery_resilience.shelf")

#: Messages on their way to the store for which others are fetched meanwhile.
MAX_COUNTED = 500


class Shelving:
    """
    Hands messages to the shelf before Celery holds them.

    Args:
        shelf: Where they wait.
        deliveries: The table of the worker's deliveries.
        copy_of: Makes the copy of a message that is published when it is due, at that
            wall time.
        is_lost: Whether the connection is lost by which messages came that are ours.
        most_held: Messages in this worker's memory up to which none is handed over.
        clock: Wall time.

    Attributes:
        consumer: Celery's, connected.
    """

    def __init__(
        self,
        shelf: Shelf,
        deliveries: Any,
        *,
        copy_of: Callable[[Any, float], OriginalMessage],
        is_lost: Callable[[], bool],
        most_held: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.consumer: Any = None
        self.shelf = shelf
        self._deliveries = deliveries
        self._copy_of = copy_of
        self._is_lost = is_lost
        self._most_held = most_held
        self._clock = clock
        self._counted = 0

    def takes(self, message: Any, hold: Callable[[Any], Any]) -> bool:
        """
        Whether a message goes to the store; it is acknowledged once it is there.

        Args:
            message: As it was delivered.
            hold: What Celery does with it, where the store does not answer.
        """
        if self._deliveries.open_count < self._most_held or self.shelf.is_away:
            return False
        headers = message.headers
        if not isinstance(headers, dict):
            return False
        wait_s = policy.waits_s(headers, self._clock())
        if wait_s is None or wait_s < policy.SOON_S:
            return False
        if not self._deliveries.can_come_again(message):
            return False
        copy = self._copy_of(message, self._clock() + wait_s)
        qos = self._count()
        self._deliveries.held.add(message)

        def then(is_stored: bool) -> None:
            self._uncount(qos)
            if message not in self._deliveries.held:
                # The connection was lost, and the broker delivers it again.
                if is_stored:
                    self.shelf.forget(copy)
                return
            self._deliveries.held.discard(message)
            if is_stored:
                self._settled(message, copy)
            else:
                hold(message)

        self.shelf.put(copy, wait_s, then)
        return True

    def has_waiting(self) -> bool:
        """Whether something waits in the store, or on its way there."""
        return bool(self._deliveries.held) or self.shelf.left > 0

    def settle(self) -> None:
        """In the thread of the connection: acknowledge what is stored."""
        # While it is lost, nobody knows whose they are.
        if self.shelf.has_decided and not self._is_lost():
            self.shelf.settle()

    def _settled(self, message: Any, copy: OriginalMessage) -> None:
        deliveries = self._deliveries
        message.settled_as = "acknowledge"
        message.ack_log_error(logger, self.consumer.connection_errors)
        deliveries.received += 1
        deliveries.counts[Outcome.REQUEUED] += 1
        event, task = EVENTS[Outcome.REQUEUED], text_of(message.headers.get("task"))
        emit(ENDED, ended=Ended(task, copy.queue, Outcome.REQUEUED))
        if observed(event):
            headers = message.headers
            settlement = Settlement(
                outcome=Outcome.REQUEUED,
                reason="shelved",
                task=task,
                task_id=id_text(headers.get("id")),
                root_id=id_text(headers.get("root_id")) or None,
                parent_id=id_text(headers.get("parent_id")) or None,
                queue=copy.queue,
                worker=deliveries.worker,
                marks=marks_of(headers),
            )
            emit(event, settlement=settlement)

    def _count(self) -> Any:
        """Let others be fetched in the place of one that waits for the store."""
        qos = getattr(self.consumer, "qos", None)
        is_capped = getattr(qos, "max_prefetch", None) is not None
        if qos is None or is_capped or self._counted >= MAX_COUNTED:
            return None
        self._counted += 1
        qos.increment_eventually()
        return qos

    def _uncount(self, qos: Any) -> None:
        if qos is not None:
            self._counted -= 1
            if qos is self.consumer.qos:  # not of a lost connection
                qos.decrement_eventually()
