"""The thread of a worker that puts messages into the store, and publishes what is due."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from threading import Event, Thread
from typing import NamedTuple, Protocol

from celery_resilience.chance import chance
from celery_resilience.errors import BrokerUnavailable, PublishRefused
from celery_resilience.events import emit
from celery_resilience.forks import thread_gate
from celery_resilience.message import OriginalMessage
from celery_resilience.packing import message_from_text, message_to_text
from celery_resilience.shelf import policy
from celery_resilience.shelf.store import Claimed, ShelfStore, Shelved
from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.shelf")

#: Messages, and characters of them, that are put into the store at once.
BATCH = 200
BATCH_CHARS = 2_000_000

#: Messages that are published at once, and the seconds for which nobody else publishes
#: them; less than for which Redis remembers that it has a message.
CLAIM = 100
LEASE_S = 60.0

#: Seconds between two looks whether the store, or the broker, is back.
AWAY_S = 5.0

#: Ids that the store did not forget when it was told, of which more are not remembered.
MAX_UNWANTED = 10_000


class Publishes(Protocol):
    """Stores a message in its queue, or raises."""

    def publish(self, message: OriginalMessage, *, declare: bool = False) -> None: ...

    def close(self) -> None: ...


class Waits(NamedTuple):
    """
    A message on its way to the store.

    Attributes:
        message: The copy that is published when it is due; its name is its id.
        delay_s: Seconds until then.
        put_at: By the clock.
        then: Called by `settle` once it is stored, or could not be.
    """

    message: OriginalMessage
    delay_s: float
    put_at: float
    then: Callable[[bool], None]


class Shelf:
    """
    The snoozed messages of one app, for a worker's main process, which never waits.

    Args:
        store: Gives the store.
        publisher: Of this thread's alone.
        is_last: Nothing is put into this one: it ends when the store is empty.
        clock: Monotonic seconds.

    Attributes:
        is_away: The store, or the broker, did not answer.
        left: Messages in the store, when it was last looked at.
    """

    def __init__(
        self,
        store: Callable[[], ShelfStore],
        publisher: Publishes,
        *,
        is_last: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._get_store = store
        self._publisher = publisher
        self._is_last = is_last
        self._clock = clock
        self._waiting: deque[Waits] = deque()
        self._decided: deque[tuple[Waits, bool]] = deque()
        self._unwanted: deque[str] = deque(maxlen=MAX_UNWANTED)
        self._look_at = 0.0
        self._wake = Event()
        self._is_stopping = False
        self._thread: Thread | None = None
        self.is_away = False
        self.left = 0

    # --- the main process -----------------------------------------------------------

    def start(self) -> None:
        """Begin to look for what is due."""
        if self._thread is None:
            self._look_at = self._clock() + policy.FIRST_S * chance()
            self._thread = start_deaf(self._run, "shelf")

    def put(
        self, message: OriginalMessage, delay_s: float, then: Callable[[bool], None]
    ) -> None:
        """
        Store a message until it is due.

        Args:
            message: A copy made by `send_again`.
            delay_s: Seconds until it is due.
            then: Called by `settle`: True: it is stored.
        """
        self._waiting.append(Waits(message, delay_s, self._clock(), then))
        self._wake.set()

    def settle(self) -> None:
        """Call the `then` of each message whose store has answered."""
        while self._decided:
            waits, is_stored = self._decided.popleft()
            try:
                waits.then(is_stored)
            except Exception:
                logger.exception("after storing a snoozed message")

    @property
    def has_decided(self) -> bool:
        """There is something for `settle`."""
        return bool(self._decided)

    def forget(self, message: OriginalMessage) -> None:
        """The broker delivers the original again: this copy is one too many."""
        self._unwanted.append(message.marks["sent"])
        self._look_at = 0.0
        self._wake.set()

    def stop(self, within_s: float) -> None:
        """The worker ends: let the thread end what it does, for at most *within_s*."""
        self._is_stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(within_s)

    # --- the thread -------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.wait(max(0.0, self._look_at - self._clock()))
            self._wake.clear()
            try:
                self.work()
            except Exception as exc:
                self._went_away(exc)
        self._publisher.close()

    def work(self) -> None:
        """
        Store what waits, and publish what is due.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        while self._waiting and not self._is_stopping:
            with thread_gate.inside():
                self._keep()
        if self._clock() >= self._look_at and not self._is_stopping:
            store = self._get_store()
            self._forget(store)
            with thread_gate.inside():
                claimed = store.claim(CLAIM, LEASE_S)
            self.left = claimed.others + len(claimed.messages)
            self._is_back()
            self._publish(store, claimed)
            if self._is_last and not claimed.messages and not claimed.others:
                self._is_stopping = True

    def _keep(self) -> None:
        batch: list[Waits] = []
        rows: list[tuple[Shelved, float]] = []
        chars = 0
        while self._waiting and len(batch) < BATCH and chars < BATCH_CHARS:
            waits = self._waiting.popleft()
            try:
                text = message_to_text(waits.message)
            except Exception:
                logger.exception("a snoozed message cannot be stored, and is held")
                self._decided.append((waits, False))
                continue
            delay_s = waits.delay_s - (self._clock() - waits.put_at)
            batch.append(waits)
            rows.append((Shelved(waits.message.marks["sent"], text), max(0.0, delay_s)))
            chars += len(text)
        if not rows:
            return
        try:
            self._get_store().put(rows)
        except Exception:
            # Nobody knows whether they are there: held as well, they would run twice.
            self._unwanted.extend(row.id for row, _ in rows)
            self._decided.extend((waits, False) for waits in batch)
            raise
        self.left += len(batch)
        self._decided.extend((waits, True) for waits in batch)
        emit("shelf.filled", messages=len(batch))
        first_s = min(delay_s for _, delay_s in rows)
        self._look_at = min(self._look_at, self._clock() + max(first_s, policy.BUSY_S))

    def _publish(self, store: ShelfStore, claimed: Claimed) -> None:
        published: list[str] = []
        wait_s: float | None = None
        try:
            for it in claimed.messages:
                if self._is_stopping:
                    break
                try:
                    self._publisher.publish(message_from_text(it.text))
                except BrokerUnavailable as exc:
                    logger.warning("snoozed messages wait for the broker: %s", exc)
                    wait_s = AWAY_S
                    break
                except (PublishRefused, ValueError) as exc:
                    # Its claim lapses, and it is tried again.
                    logger.warning("a snoozed message waits on, %s: %s", it.id, exc)
                else:
                    published.append(it.id)
        finally:
            if published:
                self.left -= len(published)
                self._unwanted.extend(published)
                self._forget(store)
                emit("shelf.emptied", messages=len(published), left=claimed.others)
        if wait_s is None:
            wait_s = policy.look_again_in_s(claimed.next_due_s, chance())
            if len(claimed.messages) == CLAIM:
                wait_s = 0.0
        self._look_at = self._clock() + wait_s

    def _forget(self, store: ShelfStore) -> None:
        """Remove what must not be published, or not again."""
        ids = list(self._unwanted)
        for start in range(0, len(ids), CLAIM):
            with thread_gate.inside():
                store.remove(ids[start : start + CLAIM])
            for _ in ids[start : start + CLAIM]:
                with contextlib.suppress(IndexError):
                    self._unwanted.popleft()

    def _went_away(self, exc: Exception) -> None:
        while self._waiting:
            self._decided.append((self._waiting.popleft(), False))
        self._look_at = self._clock() + AWAY_S
        level = logging.DEBUG if self.is_away else logging.WARNING
        self.is_away = True
        logger.log(level, "the store of snoozed messages is away: %s", exc)

    def _is_back(self) -> None:
        if self.is_away:
            self.is_away = False
            logger.info("the store of snoozed messages is back")
