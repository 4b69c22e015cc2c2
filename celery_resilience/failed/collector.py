"""Moves documents from failed queues and the spool into the store, and dead letters.

Upsert, commit, then ack: killed at any point it makes neither a loss nor a
second record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from celery_resilience.failed.caps import Trimmer
from celery_resilience.failed.dead_letter import KnownApp, dead_letter, pause_s
from celery_resilience.failed.envelope import foreign, loads
from celery_resilience.failed.inbox import Inbox
from celery_resilience.failed.replay import Replayer, ReplayReport
from celery_resilience.failed.spool import Spool
from celery_resilience.failed.store import FailedTaskStore, Usage
from celery_resilience.message import OriginalMessage

logger = logging.getLogger("celery_resilience.failed")

#: Documents in one transaction, and about how many bytes of them.
BATCH = 500
BATCH_BYTES = 8 * 2**20

#: Documents in the first one, while nobody knows how large they are.
FIRST_BATCH = 20

#: A replay's claim is as old as this before somebody else sends its message:
#: a page of a replay takes seconds.
STALE_CLAIM_S = 60.0


@dataclass(slots=True)
class Collected:
    """What one pass moved."""

    documents: int = 0
    resent: int = 0


class Collector:
    """
    Collects for one app.

    Args:
        store: Where failed tasks are kept.
        app: What dead letters are read with.
        namespace: The app's, for what it finds that is no envelope.
        clock: Wall time, in seconds.
        spool: This host's, if the app has one.
        resend: Sends claims whose owner died.
        trimmer: Keeps the store below its caps.
    """

    def __init__(
        self,
        store: FailedTaskStore,
        *,
        app: KnownApp,
        namespace: str,
        clock: Callable[[], float],
        spool: Spool | None = None,
        resend: Replayer | None = None,
        trimmer: Trimmer | None = None,
    ) -> None:
        self._store = store
        self._app = app
        self._namespace = namespace
        self._clock = clock
        self._spool = spool
        self._resend = resend
        self._trimmer = trimmer
        self._batch = FIRST_BATCH
        self._failures_to_keep = 0
        self._dead_letters_from = 0.0

    def collect(
        self, inboxes: Sequence[Inbox], dead_letters: Sequence[Inbox] = ()
    ) -> Collected:
        """
        Empty the failed queues, the spool and the dead-letter queues, once.

        Args:
            inboxes: The failed queues.
            dead_letters: The dead-letter queues. They may have a delivery limit,
                so that nothing is taken from them while the store is away, and
                seldom while it fails to keep.

        Raises:
            StoreUnavailable: Nothing of the last batch was acknowledged.
        """
        collected = Collected()
        for inbox in inboxes:
            collected.documents += self._empty(inbox, self._keep)
        if self._spool is not None:
            collected.documents += self._spool.drain(
                lambda message: self._store.keep([self._document(message)])
            )
        collected.documents += self._collect_dead_letters(dead_letters)
        self._trim(Usage())
        collected.resent = self._resend_stale_claims()
        return collected

    def _empty(
        self, inbox: Inbox, keep: Callable[[Sequence[OriginalMessage]], None]
    ) -> int:
        moved = 0
        is_full = True
        # What comes while a last, smaller batch is kept waits for the next pass.
        while is_full and (batch := inbox.take(self._batch)).messages:
            keep(batch.messages)
            batch.done()
            taken = Usage(len(batch.messages), sum(len(m.body) for m in batch.messages))
            moved += taken.count
            is_full = taken.count == self._batch
            self._batch = _next_batch(taken)
            self._trim(taken)
        return moved

    def _trim(self, taken: Usage) -> None:
        if self._trimmer is not None:
            self._trimmer.after(taken)

    def _keep(self, messages: Sequence[OriginalMessage]) -> None:
        self._store.keep([self._document(message) for message in messages])

    def _collect_dead_letters(self, inboxes: Sequence[Inbox]) -> int:
        moved = 0
        for inbox in inboxes:
            if self._clock() < self._dead_letters_from:
                break
            self._store.check()
            moved += self._empty(inbox, self._keep_dead_letters)
        return moved

    def _keep_dead_letters(self, messages: Sequence[OriginalMessage]) -> None:
        documents = [self._dead_letter(message) for message in messages]
        try:
            self._store.keep(documents)
        except Exception:
            self._failures_to_keep += 1
            self._dead_letters_from = self._clock() + pause_s(self._failures_to_keep)
            raise
        self._failures_to_keep = 0

    def _dead_letter(self, message: OriginalMessage) -> dict[str, Any]:
        try:
            # A failed queue's own envelope may die on the broker too.
            return loads(message.body)
        except ValueError:
            return dead_letter(
                message, app=self._app, namespace=self._namespace, at=self._clock()
            )

    def _document(self, message: OriginalMessage) -> dict[str, Any]:
        try:
            return loads(message.body)
        except ValueError as exc:
            logger.warning("%s holds %s: kept as malformed", message.queue, exc)
            return foreign(
                message, why=str(exc), namespace=self._namespace, at=self._clock()
            )

    def _resend_stale_claims(self) -> int:
        if self._resend is None:
            return 0
        claims = self._store.take_stale_claims(older_than_s=STALE_CLAIM_S, limit=BATCH)
        if not claims:
            return 0
        report = ReplayReport()
        self._resend.send_claims(claims, report)
        logger.info("sent %d replays whose sender had died", len(report.sent))
        return len(report.sent)


def _next_batch(taken: Usage) -> int:
    """How many documents of that size are a batch; it grows slowly."""
    fitting = BATCH_BYTES * taken.count // max(1, taken.size)
    return max(1, min(BATCH, 5 * taken.count, fitting))
