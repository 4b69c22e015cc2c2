"""What must be stored before its message may be acknowledged.

Envelopes of failed tasks, copies that are sent again, and outcomes of replays
go out here, in order. While the broker takes nothing, the first refusal costs
the time limit once; everything after it waits, in the declared spool or with
its message unacknowledged, until the broker is back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Protocol

from celery_resilience.errors import BrokerUnavailable, PublishRefused
from celery_resilience.events import emit
from celery_resilience.message import OriginalMessage

logger = logging.getLogger("celery_resilience.delivery")

#: Seconds between two tries while the broker refuses, doubled up to the last.
RETRY_S = 1.0
MAX_RETRY_S = 30.0

#: Items whose messages were acknowledged early are held in memory up to this
#: many; beyond it the oldest goes to the log.
MAX_HELD = 10_000


class Publishes(Protocol):
    """Stores a message in its queue, or raises."""

    def publish(self, message: OriginalMessage, *, declare: bool = False) -> None: ...


class Spools(Protocol):
    """Keeps a message on this host until the broker takes it."""

    def put(self, message: OriginalMessage) -> bool: ...

    def drain(self, publish: Callable[[OriginalMessage], None]) -> int: ...


@dataclass(slots=True, eq=False)
class Outgoing:
    """
    One message that must be stored.

    Attributes:
        then: Called once it is stored; acknowledges what it stands for.
        keep: True for an envelope: it may be spooled and its queue declared.
        acknowledged: The message it stands for is gone from the broker, so
            that this process is the last to hold it.
        remade: It is made anew if the broker delivers the message again that it
            stands for.
        what: A few words for the log, redacted.
    """

    message: OriginalMessage
    then: Callable[[], None]
    keep: bool = False
    acknowledged: bool = False
    remade: bool = False
    what: str = ""


class Outbox:
    """
    The one way out of a worker's main process; safe to use from any thread.

    Args:
        publisher: Where messages go.
        spool: Takes envelopes while the publisher does not; None: they wait.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        publisher: Publishes,
        *,
        clock: Callable[[], float],
        spool: Spools | None = None,
    ) -> None:
        self._publisher = publisher
        self._spool = spool
        self._clock = clock
        self._lock = RLock()
        self._is_busy = False
        self._held: deque[Outgoing] = deque()
        self._spooled = spool is not None  # an earlier worker may have left some
        self._broker = _Backoff()
        self._drain = _Backoff()
        self._queues: dict[str, _Backoff] = {}

    @property
    def held(self) -> int:
        """Messages that wait for the broker."""
        return len(self._held)

    def put(self, item: Outgoing) -> bool:
        """
        Store *item* and call its `then`, now or when the broker is back.

        Returns:
            True when it is stored and `then` has been called.
        """
        with self._alone() as is_alone:
            if not is_alone:
                self._held.append(item)
                return False
            if self._held:
                self._flush()
            behind = any(h.message.queue == item.message.queue for h in self._held)
            if not behind and self._may_try(item) and self._publish(item):
                return True
            return self._set_aside(item)

    def tick(self) -> None:
        """Try again if it is time; called every second or so."""
        if self._held or self._spooled:
            with self._alone() as is_alone:
                if is_alone:
                    self._flush()

    def reconnected(self) -> None:
        """The broker is back: try again now."""
        self._broker, self._drain = _Backoff(), _Backoff()
        self._queues.clear()
        self.tick()

    def given_back(self) -> None:
        """
        The broker delivers again what is unacknowledged: drop what is remade then.

        Sent as well, it would be there twice.
        """
        with self._lock:
            kept = [item for item in self._held if item.acknowledged or not item.remade]
            dropped = len(self._held) - len(kept)
            self._held = deque(kept)
        if dropped:
            logger.info(
                "%d messages are not sent again: the broker delivers those that they "
                "stand for",
                dropped,
            )

    def close(self) -> None:
        """
        The worker ends: try once more, and tell what nobody will take.

        What waits for a message that is still unacknowledged is dropped: the
        broker delivers that message again.
        """
        if self._held:
            self.reconnected()
        while self._held:
            self._give_up(self._held.popleft())

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """
        Keep other threads out; False in a signal handler that interrupts us.

        Celery cancels tasks inside the handler of a cold stop, in the thread
        that may be half way through a publish (``apps/worker.py:560``).
        """
        with self._lock:
            if self._is_busy:
                yield False
                return
            self._is_busy = True
            try:
                yield True
            finally:
                self._is_busy = False

    def _may_try(self, item: Outgoing) -> bool:
        now = self._clock()
        queue = self._queues.get(item.message.queue)
        return now >= self._broker.until and (queue is None or now >= queue.until)

    def _publish(self, item: Outgoing) -> bool:
        try:
            self._publisher.publish(item.message, declare=item.keep)
        except BrokerUnavailable as exc:
            self._refused(self._broker, item, exc)
            return False
        except PublishRefused as exc:
            backoff = self._queues.setdefault(item.message.queue, _Backoff())
            self._refused(backoff, item, exc)
            return False
        if self._queues:
            self._queues.pop(item.message.queue, None)
        self._broker.reset()
        self._stored(item)
        return True

    def _stored(self, item: Outgoing) -> None:
        try:
            item.then()
        except Exception:
            # Its connection may be gone; what else waits has nothing to do with it.
            logger.exception("after storing %s", item.what or "a message")

    def _refused(self, backoff: _Backoff, item: Outgoing, exc: Exception) -> None:
        wait_s = backoff.refused(self._clock())
        logger.warning(
            "cannot publish %s to queue %s, trying again in %.0f s: %s",
            item.what or "a message",
            item.message.queue,
            wait_s,
            exc,
        )
        emit("delivery.publish_refused", queue=item.message.queue, error=str(exc))

    def _set_aside(self, item: Outgoing) -> bool:
        if item.keep and self._spool is not None and self._spool.put(item.message):
            self._spooled = True
            self._stored(item)
            return True
        self._held.append(item)
        if len(self._held) > MAX_HELD:
            self._give_up(self._held.popleft())
        return False

    def _flush(self) -> None:
        """Send what may be sent of what waits, oldest first."""
        if self._clock() < self._broker.until:
            return
        for item in list(self._held):
            if self._may_try(item):
                self._held.remove(item)
                if self._publish(item):
                    continue
                if self._clock() < self._broker.until:
                    self._held.appendleft(item)
                    break
                # Last in line, so that one message which the broker never takes
                # does not hold up the others.
                self._held.append(item)
        if self._spooled and self._clock() >= max(
            self._broker.until, self._drain.until
        ):
            self._drain_spool()

    def _drain_spool(self) -> None:
        assert self._spool is not None
        try:
            count = self._spool.drain(
                lambda message: self._publisher.publish(message, declare=True)
            )
        except BrokerUnavailable as exc:
            wait_s = self._broker.refused(self._clock())
            logger.warning("the spool waits %.0f s for the broker: %s", wait_s, exc)
            return
        except Exception as exc:
            # A queue that refuses, or a folder that cannot be read.
            wait_s = self._drain.refused(self._clock())
            logger.warning("the spool waits %.0f s: %s", wait_s, exc)
            return
        self._drain.reset()
        self._spooled = False
        if count:
            logger.info("published %d envelopes from the spool", count)

    def _give_up(self, item: Outgoing) -> None:
        if not item.acknowledged:
            return
        logger.critical(
            "LOST unless this line is kept: %s was acknowledged early and nothing "
            "takes it. queue=%s headers=%r properties=%r body=%r",
            item.what,
            item.message.queue,
            item.message.headers,
            item.message.properties,
            item.message.body,
        )
        emit("delivery.given_up", queue=item.message.queue)


@dataclass(slots=True)
class _Backoff:
    """When something that refused may be asked again."""

    until: float = 0.0
    wait_s: float = RETRY_S

    def refused(self, now: float) -> float:
        waited, self.wait_s = self.wait_s, min(self.wait_s * 2, MAX_RETRY_S)
        self.until = now + waited
        return waited

    def reset(self) -> None:
        self.until, self.wait_s = 0.0, RETRY_S
