"""Sends failed tasks' messages again, each at most once at a time.

Claimed before it is published, marked after. Killed in between, the claim
grows stale and the same token is published again; the worker runs one copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from uuid import UUID, uuid4

from celery_resilience.errors import BrokerUnavailable, PublishRefused
from celery_resilience.failed.pages import pages
from celery_resilience.failed.store import Claim, FailedTaskStore
from celery_resilience.message import HEADER, KEY, OriginalMessage
from celery_resilience.outcome import Reason

logger = logging.getLogger("celery_resilience.failed")

#: Records claimed together: few enough to be sent before the claims grow stale.
PAGE = 100

#: Celery drops a message whose id it remembers as revoked or expired
#: (``worker/state.py:65``), so these get a new one.
NEEDS_NEW_ID = frozenset({Reason.EXPIRED, Reason.REVOKED})

#: Headers that were about the first delivery only.
SPENT_HEADERS = ("eta", "expires")


@dataclass(slots=True)
class ReplayReport:
    """
    What a replay did.

    Attributes:
        sent: Records whose message the broker has.
        failed: Records whose message it refused, with why.
        skipped: Ids that were not unresolved (any more).
        in_doubt: Records whose message the broker may have: whoever collects a
            minute later sends it again, and one copy runs.
        would_send: What a dry run would send.
        in_chord: How many of those sent belong to a chord, which Celery has failed.
        operation_id: Names this replay in the log.
    """

    operation_id: str = field(default_factory=lambda: uuid4().hex[:12])
    sent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    in_doubt: list[str] = field(default_factory=list)
    would_send: list[str] = field(default_factory=list)
    in_chord: int = 0


def replayed(claim: Claim, *, new_id: str | None = None) -> OriginalMessage:
    """
    The message that is sent for *claim*.

    The original bytes, chain, links, stamps, priority and idempotency key; no retries
    spent, no eta, no expiry, nothing of its past deliveries; in a trace of its own, which
    is linked to the original one. The copy has a name of its own, so that a worker tells
    it from another of the same replay.

    Args:
        new_id: Another task id than the original one.
    """
    message = claim.original.without_past().in_new_trace()
    headers = {k: v for k, v in message.headers.items() if k not in SPENT_HEADERS}
    properties = {k: v for k, v in message.properties.items() if k != "expiration"}
    if "id" in headers:
        headers.update(eta=None, expires=None, retries=0)
    if new_id is not None:
        if headers.get("root_id") == headers.get("id"):
            headers["root_id"] = new_id
        headers["id"] = new_id
        properties["correlation_id"] = new_id
    marks = message.marks
    headers[HEADER] = {
        "replay": {
            "record": claim.id,
            "token": claim.token,
            "copy": uuid4().hex,
            "number": claim.number,
        },
        **{name: marks[name] for name in (KEY, "trace") if name in marks},
        **({"forced": True} if claim.is_forced else {}),
    }
    return replace(
        message,
        headers=headers,
        properties=properties,
        queue=claim.to_queue or message.queue,
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

    def send(self, claim: Claim) -> str | None:
        """
        Publish the message of one claim.

        Where the answer is lost it is sent once more, as another copy: the worker runs
        one of them, if it is resilient.

        Returns:
            The message's task id where it is new.

        Raises:
            PublishRefused: The broker did not take it.
            BrokerUnavailable: Nobody knows.
        """
        if claim.original.is_broadcast and claim.to_queue is None:
            raise PublishRefused(
                f"{claim.original.queue} takes only what is told to every worker: name "
                "another queue (--to-queue)"
            )
        new_id = None
        if claim.wants_new_id or claim.reason in NEEDS_NEW_ID:
            # The same one where a claim is sent twice.
            new_id = str(UUID(claim.token))
        try:
            self._publish(replayed(claim, new_id=new_id))
        except BrokerUnavailable:
            if not self._is_followed(claim.task):
                raise
            self._publish(replayed(claim, new_id=new_id))
        return new_id

    def send_claims(
        self, claims: Sequence[Claim], report: ReplayReport, *, are_new: bool = False
    ) -> None:
        """
        Publish the messages of *claims*; one that is refused never stops the rest.

        Args:
            are_new: Nobody else has tried to send them.

        Raises:
            BrokerUnavailable: One is in doubt; the rest was not tried, and those
                that are new are unresolved again.
        """
        sent: list[tuple[Claim, str | None]] = []
        untried = list(reversed(claims))
        try:
            while untried:
                claim = untried.pop()
                try:
                    sent.append((claim, self.send(claim)))
                except PublishRefused as exc:
                    self._store.release(claim, str(exc))
                    report.failed[claim.id] = str(exc)
        except BaseException:
            report.in_doubt.append(claim.id)
            for claim in untried if are_new else ():
                self._store.release(
                    claim, "its replay was broken off before it was sent"
                )
            raise
        finally:
            self._store.mark_sent(sent)
            report.sent += [claim.id for claim, _ in sent]
        report.in_chord += sum(claim.in_chord for claim, _ in sent)
        unfollowed = [c.id for c, _ in sent if not self._is_followed(c.task)]
        if unfollowed:
            self._store.finish(unfollowed, "sent; its task is not resilient")

    def replay(
        self,
        ids: Iterable[str],
        *,
        to_queue: str | None = None,
        new_id: bool = False,
        force: bool = False,
        report: ReplayReport | None = None,
        on_progress: Callable[[ReplayReport], None] | None = None,
    ) -> ReplayReport:
        """
        Send the messages of *ids* again; one that is refused never stops the rest.

        Args:
            ids: Whole ids.
            to_queue: Another queue than the original ones.
            new_id: Give each message a new task id.
            force: Run tasks whose idempotency key is done or interrupted, too: of
                several records with one key, the first.
            report: Filled in, also where an error breaks the replay off.
            on_progress: Called after each page.

        Raises:
            BrokerUnavailable: One is in doubt, and the rest was not tried.
        """
        report = report or ReplayReport()
        forced: set[tuple[str, str]] = set()
        for page in pages(ids, PAGE):
            claim = partial(self._store.claim, to_queue=to_queue, wants_new_id=new_id)
            claims = [*claim(page, is_forced=force)]
            duplicates = [c for c in claims if not _is_first_forced(c, forced)]
            if duplicates:
                # In the store, too: whoever sends a stale claim sends it as it is there.
                for duplicate in duplicates:
                    self._store.release(duplicate, "its key is another record's")
                    claims.remove(duplicate)
                claims += claim([duplicate.id for duplicate in duplicates])
            claimed = {claim.id for claim in claims}
            report.skipped += [id for id in page if id not in claimed]
            self.send_claims(claims, report, are_new=True)
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


def _is_first_forced(claim: Claim, forced: set[tuple[str, str]]) -> bool:
    """Whether a claim is sent as it is: of those with one key the first is forced."""
    if not claim.is_forced or claim.key is None:
        return True
    name = (claim.task, claim.key)
    if name in forced:
        return False
    forced.add(name)
    return True
