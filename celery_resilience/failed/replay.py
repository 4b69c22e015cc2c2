"""Sends failed tasks' messages again, each at most once at a time.

Claimed before it is published, marked after. Killed in between, the claim
grows stale and the same token is published again; the worker runs one copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol
from uuid import uuid4

from celery_resilience.delivery.message import HEADER, OriginalMessage
from celery_resilience.delivery.outcome import Reason
from celery_resilience.errors import PublishRefused
from celery_resilience.failed.store import Claim, FailedTaskStore

logger = logging.getLogger("celery_resilience.failed")

#: Records claimed together: few enough to be sent before the claims grow stale.
PAGE = 100

#: Celery drops a message whose id it remembers as revoked or expired
#: (``worker/state.py:65``), so these get a new one.
NEEDS_NEW_ID = frozenset({Reason.EXPIRED, Reason.REVOKED})

#: Headers that were about the first delivery only.
SPENT_HEADERS = ("eta", "expires")


class SendsClaims(Protocol):
    """Publishes the message of a claim."""

    def send(self, claim: Claim) -> str | None:
        """Returns the message's task id where it is new; raises PublishRefused."""
        ...


@dataclass(slots=True)
class ReplayReport:
    """
    What a replay did.

    Attributes:
        sent: Records whose message the broker has.
        failed: Records whose message it refused, with why.
        skipped: Ids that were not unresolved (any more).
        operation_id: Names this replay in the log.
    """

    operation_id: str = field(default_factory=lambda: uuid4().hex[:12])
    sent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def replayed(
    claim: Claim, *, to_queue: str | None = None, new_id: str | None = None
) -> OriginalMessage:
    """
    The message that is sent for *claim*.

    The original bytes, chain, links, stamps and priority; no retries spent, no
    eta, no expiry, nothing of its past deliveries. The copy has a name of its
    own, so that a worker tells it from another of the same replay.

    Args:
        to_queue: Another queue than the original one.
        new_id: Another task id than the original one.
    """
    message = claim.original.without_past()
    headers = {k: v for k, v in message.headers.items() if k not in SPENT_HEADERS}
    headers.pop(HEADER, None)
    properties = {k: v for k, v in message.properties.items() if k != "expiration"}
    if "id" in headers:
        headers.update(eta=None, expires=None, retries=0)
    if new_id is not None:
        if headers.get("root_id") == headers.get("id"):
            headers["root_id"] = new_id
        headers["id"] = new_id
        properties["correlation_id"] = new_id
    headers[HEADER] = {
        "replay": {
            "record": claim.id,
            "token": claim.token,
            "copy": uuid4().hex,
            "number": claim.number,
        }
    }
    return replace(
        message,
        headers=headers,
        properties=properties,
        queue=to_queue or message.queue,
    )


class Replayer:
    """
    Replays for one app.

    Args:
        store: Where the records are.
        publish: Returns when the broker has confirmed a message.
        is_followed: Whether a task's worker reports how its replay ended; one
            that is not resilient does not.
    """

    def __init__(
        self,
        store: FailedTaskStore,
        publish: Callable[[OriginalMessage], None],
        *,
        is_followed: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._publish = publish
        self._is_followed = is_followed

    def send(
        self, claim: Claim, *, to_queue: str | None = None, new_id: bool = False
    ) -> str | None:
        """
        Publish the message of one claim.

        Returns:
            The message's task id where it is new.

        Raises:
            PublishRefused: The broker did not take it.
            BrokerUnavailable: Nobody knows.
        """
        id = uuid4() if new_id or claim.reason in NEEDS_NEW_ID else None
        self._publish(
            replayed(claim, to_queue=to_queue, new_id=None if id is None else str(id))
        )
        return None if id is None else str(id)

    def replay(
        self,
        ids: Iterable[str],
        *,
        to_queue: str | None = None,
        new_id: bool = False,
        on_progress: Callable[[ReplayReport], None] | None = None,
    ) -> ReplayReport:
        """
        Send the messages of *ids* again; one that is refused never stops the rest.

        Args:
            ids: Whole ids.
            to_queue: Another queue than the original ones.
            new_id: Give each message a new task id.
            on_progress: Called after each page.

        Raises:
            BrokerUnavailable: The rest was not tried. Claims that were not sent
                are sent by whoever collects a minute later.
        """
        report = ReplayReport()
        for page in _pages(ids, PAGE):
            claims = self._store.claim(page)
            claimed = {claim.id for claim in claims}
            report.skipped += [id for id in page if id not in claimed]
            sent: list[tuple[Claim, str | None]] = []
            try:
                for claim in claims:
                    try:
                        sent.append(
                            (claim, self.send(claim, to_queue=to_queue, new_id=new_id))
                        )
                    except PublishRefused as exc:
                        self._store.release(claim, str(exc))
                        report.failed[claim.id] = str(exc)
            finally:
                self._store.mark_sent(sent)
            report.sent += [claim.id for claim, _ in sent]
            unfollowed = [c.id for c, _ in sent if not self._is_followed(c.task)]
            if unfollowed:
                self._store.finish(unfollowed, "sent; its task is not resilient")
            if on_progress is not None:
                on_progress(report)
        logger.info(
            "replay %s: %d sent, %d refused, %d skipped",
            report.operation_id,
            len(report.sent),
            len(report.failed),
            len(report.skipped),
        )
        return report


def _pages(ids: Iterable[str], size: int) -> Iterator[Sequence[str]]:
    iterator = iter(ids)
    while page := list(islice(iterator, size)):
        yield page


def chord_note(claims: Iterable[Any]) -> str:
    """What to say when chords wait for replayed tasks in vain, or ""."""
    count = sum(1 for claim in claims if claim.in_chord)
    if not count:
        return ""
    return (
        f"{count} of them belong to a chord: Celery failed it with their first "
        "failure, and its body will not run"
    )
