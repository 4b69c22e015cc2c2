"""Moves documents from failed queues and the spool into the store.

Upsert, commit, then ack: killed at any point it makes neither a loss nor a
second record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from celery_resilience.errors import PublishRefused
from celery_resilience.failed.envelope import foreign, loads
from celery_resilience.failed.inbox import Inbox
from celery_resilience.failed.replay import SendsClaims
from celery_resilience.failed.spool import Spool
from celery_resilience.failed.store import FailedTaskStore

logger = logging.getLogger("celery_resilience.failed")

#: Documents in one transaction.
BATCH = 500

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
        namespace: The app's; documents of another are kept under its own name.
        clock: Wall time, in seconds.
        spool: This host's, if the app has one.
        resend: Sends claims whose owner died.
    """

    def __init__(
        self,
        store: FailedTaskStore,
        *,
        namespace: str,
        clock: Callable[[], float],
        spool: Spool | None = None,
        resend: SendsClaims | None = None,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._clock = clock
        self._spool = spool
        self._resend = resend

    def collect(self, inboxes: Sequence[Inbox]) -> Collected:
        """
        Empty the failed queues and the spool, once.

        Raises:
            StoreUnavailable: Nothing of the last batch was acknowledged.
        """
        collected = Collected()
        for inbox in inboxes:
            while True:
                batch = inbox.take(BATCH)
                if not batch.messages:
                    break
                self._store.keep([self._document(m) for m in batch.messages])
                batch.done()
                collected.documents += len(batch.messages)
        if self._spool is not None:
            collected.documents += self._spool.drain(
                lambda message: self._store.keep([self._document(message)])
            )
        collected.resent = self._resend_stale_claims()
        return collected

    def _document(self, message: Any) -> dict[str, Any]:
        try:
            return loads(message.body)
        except (ValueError, KeyError) as exc:
            logger.warning("%s holds %s: kept as malformed", message.queue, exc)
            return foreign(message, namespace=self._namespace, at=self._clock())

    def _resend_stale_claims(self) -> int:
        if self._resend is None:
            return 0
        claims = self._store.take_stale_claims(older_than_s=STALE_CLAIM_S, limit=BATCH)
        sent = 0
        for claim in claims:
            try:
                self._store.mark_sent([(claim, self._resend.send(claim))])
                sent += 1
            except PublishRefused as exc:
                self._store.release(claim, str(exc))
        if claims:
            logger.info("sent %d replays whose sender had died", sent)
        return sent
