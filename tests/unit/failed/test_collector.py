"""Upsert, commit, then ack: what the collector promises over any store and queue."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.specimens import (
    KnownApp,
    a_failed_document,
    a_message,
    a_success_document,
)

from celery_resilience.errors import (
    BrokerUnavailable,
    PublishRefused,
    StoreUnavailable,
)
from celery_resilience.failed.collector import (
    BATCH,
    FIRST_BATCH,
    STALE_CLAIM_S,
    Collector,
)
from celery_resilience.failed.envelope import posted
from celery_resilience.failed.inbox import Batch
from celery_resilience.failed.replay import Replayer
from celery_resilience.failed.spool import Spool
from celery_resilience.failed.store import Claim
from celery_resilience.message import OriginalMessage
from celery_resilience.packing import unpack


class Inbox:
    """A failed queue in memory, which keeps what is not done."""

    def __init__(self, messages: Sequence[OriginalMessage], log: list[Any]) -> None:
        self.messages = list(messages)
        self.log = log
        self.takes = 0

    def take(self, limit: int) -> Batch:
        taken = self.messages[:limit]
        self.takes += bool(taken)

        def done() -> None:
            self.log.append(("done", len(taken)))
            self.messages = [m for m in self.messages if m not in taken]

        return Batch(taken, done)


class Store:
    """Remembers documents, or is away."""

    def __init__(self, log: list[Any], claims: Sequence[Claim] = ()) -> None:
        self.log = log
        self.kept: list[Mapping[str, Any]] = []
        self.claims = claims
        self.is_away = False
        self.is_full = False

    def check(self) -> None:
        if self.is_away:
            raise StoreUnavailable
        self.log.append("check")

    def keep(self, documents: Sequence[Mapping[str, Any]]) -> None:
        if self.is_away or self.is_full:
            raise StoreUnavailable
        self.log.append(("keep", len(documents)))
        self.kept += documents

    def take_stale_claims(self, *, older_than_s: float, limit: int) -> Sequence[Claim]:
        self.log.append(("stale", older_than_s))
        return self.claims[:limit]

    def mark_sent(self, claims: Sequence[tuple[Claim, str | None]]) -> None:
        self.log.append(("sent", [(claim.id, new_id) for claim, new_id in claims]))

    def release(self, claim: Claim, note: str) -> None:
        self.log.append(("release", claim.id, note))

    def finish(self, ids: Sequence[str], note: str) -> None:
        self.log.append(("finish", list(ids)))


def a_claim(id: str) -> Claim:
    """One whose owner died."""
    return Claim(
        id=id,
        token="t",
        number=1,
        task="t",
        task_id="i",
        reason="exception",
        original=a_message(),
    )


def a_sender(
    store: Store,
    errors: Mapping[str, Exception] | None = None,
    is_followed: bool = True,
) -> Replayer:
    """Sends claims, except those that the broker refuses."""

    def publish(message: OriginalMessage) -> None:
        error = (errors or {}).get(message.marks["replay"]["record"])
        if error is not None:
            raise error

    return Replayer(
        store,  # type: ignore[arg-type]
        publish,
        is_followed=lambda task: is_followed,
    )


def a_collector(store: Store, **options: Any) -> Collector:
    """A collector of the app shop."""
    return Collector(
        store,  # type: ignore[arg-type]
        **{
            "app": KnownApp(),
            "namespace": "shop",
            "clock": lambda: 9_000.0,
            **options,
        },
    )


@pytest.fixture
def log() -> list[Any]:
    """What the fakes were asked, in order."""
    return []


@pytest.fixture
def store(log: list[Any]) -> Store:
    """A store that answers."""
    return Store(log)


def test_kept_before_done(store: Store, log: list[Any]) -> None:
    """Killed in between, a document comes again and changes nothing."""
    documents = [a_failed_document(task_id="a"), a_success_document(task_id="b")]
    inbox = Inbox([posted(document) for document in documents], log)

    collected = a_collector(store).collect([inbox])

    assert log == [("keep", 2), ("done", 2)]
    assert store.kept == documents
    assert (collected.documents, collected.resent) == (2, 0)


def test_a_store_that_is_away_acknowledges_nothing(
    store: Store, log: list[Any]
) -> None:
    """Everything stays on its queue."""
    store.is_away = True
    inbox = Inbox([posted(a_failed_document())], log)

    with pytest.raises(StoreUnavailable):
        a_collector(store).collect([inbox])

    assert log == []
    assert len(inbox.messages) == 1


def test_every_queue_is_emptied_batch_by_batch(store: Store, log: list[Any]) -> None:
    """In flat memory, however many wait."""
    many = [posted(a_failed_document(task_id=str(i))) for i in range(BATCH + 121)]
    inboxes = [Inbox(many, log), Inbox([], log), Inbox(many[:2], log)]

    collected = a_collector(store).collect(inboxes)

    sizes = [FIRST_BATCH, 100, BATCH, 1, 2]
    assert log == [(what, size) for size in sizes for what in ("keep", "done")]
    assert collected.documents == BATCH + 123


def test_a_queue_that_goes_on_filling_ends(store: Store, log: list[Any]) -> None:
    """Else a few at a time are a transaction each, and what else there is waits."""
    messages = [posted(a_failed_document(task_id=str(i))) for i in range(30)]

    class Filling(Inbox):
        def take(self, limit: int) -> Batch:
            self.messages.append(messages.pop())
            return super().take(limit)

    filling, other = Filling([], log), Inbox([messages[0]], log)
    for _ in range(FIRST_BATCH):
        filling.messages.append(messages.pop())

    collected = a_collector(store).collect([filling, other])

    # What was there comes in a full batch, and what came meanwhile in the last one.
    assert [size for what, size in log if what == "keep"] == [FIRST_BATCH, 2, 1]
    assert collected.documents == FIRST_BATCH + 3


def test_large_documents_come_in_small_batches(store: Store, log: list[Any]) -> None:
    """A batch is in memory, whole."""
    large = a_message(body=os.urandom(1_500_000))
    many = [posted(a_failed_document(message=large, task_id=str(i))) for i in range(30)]

    collected = a_collector(store).collect([Inbox(many, log)])

    assert collected.documents == 30
    assert [size for what, size in log if what == "keep"] == [FIRST_BATCH, 4, 4, 2]


@pytest.mark.parametrize(
    "body", [b"garbage", b"null", b'{"kind": "failed", "schema": 2}', b"\xff"]
)
def test_what_is_no_envelope_is_kept_as_malformed(
    store: Store, log: list[Any], caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    """It is acknowledged, told, and stops nothing behind it."""
    foreign = a_message(body=body, queue="shop.failed")
    inbox = Inbox([foreign, posted(a_failed_document())], log)

    with caplog.at_level(logging.WARNING, "celery_resilience.failed"):
        collected = a_collector(store).collect([inbox])

    assert collected.documents == 2
    first = store.kept[0]
    assert (first["reason"], first["app"]) == ("malformed", "shop")
    assert first["failed_at"] == 9_000.0
    assert unpack(first["original"]) == foreign
    assert "shop.failed holds" in caplog.text


def test_the_spool_is_collected_too(
    store: Store, log: list[Any], tmp_path: Path
) -> None:
    """A file is removed once its document is kept, and not before."""
    spool = Spool(tmp_path)
    for task_id in ("a", "b"):
        spool.put(posted(a_failed_document(task_id=task_id)))
    store.is_away = True
    with pytest.raises(StoreUnavailable):
        a_collector(store, spool=spool).collect([])
    assert len(spool.files()) == 2
    store.is_away = False

    collected = a_collector(store, spool=spool).collect([])

    assert collected.documents == 2
    assert [document["task_id"] for document in store.kept] == ["a", "b"]
    assert spool.files() == []


def test_a_dead_senders_claims_are_sent(log: list[Any]) -> None:
    """Marked as sent once the broker has them."""
    store = Store(log, [a_claim("a"), a_claim("b")])

    collected = a_collector(store, resend=a_sender(store)).collect([])

    assert log == [("stale", STALE_CLAIM_S), ("sent", [("a", None), ("b", None)])]
    assert collected.resent == 2


def test_a_claim_that_is_refused_is_released(log: list[Any]) -> None:
    """And stops no other."""
    store = Store(log, [a_claim("a"), a_claim("b")])
    sender = a_sender(store, {"a": PublishRefused("full")})

    collected = a_collector(store, resend=sender).collect([])

    assert log[1:] == [("release", "a", "full"), ("sent", [("b", None)])]
    assert collected.resent == 1


def test_a_broker_that_goes_away_leaves_the_claims(log: list[Any]) -> None:
    """They stay claimed, for the next one who collects; what was sent is marked."""
    store = Store(log, [a_claim("a"), a_claim("b"), a_claim("c")])
    sender = a_sender(store, {"b": BrokerUnavailable("away")})

    with pytest.raises(BrokerUnavailable):
        a_collector(store, resend=sender).collect([])

    assert log == [("stale", STALE_CLAIM_S), ("sent", [("a", None)])]


def test_without_a_sender_claims_are_left_alone(store: Store, log: list[Any]) -> None:
    """A collector that cannot publish takes none."""
    a_collector(store).collect([])

    assert log == []


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"kind": "failed", "schema": 1, "x": {"$decimal": "x"}}'],
    ids=["nested", "decimal"],
)
def test_no_message_stops_those_behind_it(
    store: Store, log: list[Any], body: bytes
) -> None:
    """Every pass ends at it, and no failed task is collected any more."""
    inbox = Inbox([a_message(body=body), posted(a_failed_document())], log)

    collected = a_collector(store).collect([inbox])

    assert collected.documents == 2


def test_a_resent_claim_of_a_plain_task_is_resolved(log: list[Any]) -> None:
    """As Replayer.replay does; else it says replaying for ever."""
    store = Store(log, [a_claim("a")])
    sender = a_sender(store, is_followed=False)

    a_collector(store, resend=sender).collect([])

    assert ("finish", ["a"]) in log


# --- dead letters ---------------------------------------------------------------------


def test_dead_letters_are_kept_before_they_are_acknowledged(
    store: Store, log: list[Any]
) -> None:
    """As documents are; each a failed task with the broker's reason."""
    dead = a_message(
        queue="dead", headers={**a_message().headers, "x-first-death-queue": "work"}
    )

    collected = a_collector(store).collect([], [Inbox([dead], log)])

    assert log == ["check", ("keep", 1), ("done", 1)]
    assert collected.documents == 1
    assert store.kept[0]["failed_queue"] == "dead"
    assert store.kept[0]["exception"] == "DeadLettered"


def test_an_envelope_among_dead_letters_is_what_it_was(
    store: Store, log: list[Any]
) -> None:
    """A policy of the broker's for all queues has put a failed queue's there."""
    document = a_failed_document()

    a_collector(store).collect([], [Inbox([posted(document)], log)])

    assert store.kept == [document]


def test_no_dead_letter_is_taken_while_the_store_is_away(
    store: Store, log: list[Any]
) -> None:
    """Each taking counts, and a quorum queue drops what was taken too often."""
    inbox = Inbox([a_message(queue="dead")], log)
    store.is_away = True
    collector = a_collector(store)

    for _ in range(30):
        with pytest.raises(StoreUnavailable):
            collector.collect([], [inbox])

    assert inbox.takes == 0


def test_a_store_that_keeps_nothing_is_tried_seldom(
    store: Store, log: list[Any]
) -> None:
    """A full disk is only seen when it is written to; the failed queues go on."""
    inbox = Inbox([a_message(queue="dead")], log)
    store.is_full = True
    now = [1_000.0]
    collector = a_collector(store, clock=lambda: now[0])

    for _ in range(600):  # a pass each second
        with contextlib.suppress(StoreUnavailable):
            collector.collect([], [inbox])
        now[0] += 1.0

    assert inbox.takes == 6
    store.is_full = False
    failed = Inbox([posted(a_failed_document())], log)
    assert collector.collect([failed], [inbox]).documents == 1
    now[0] += 3_600.0
    assert collector.collect([], [inbox]).documents == 1
    store.is_full, inbox.messages = True, [a_message(queue="dead")]
    with pytest.raises(StoreUnavailable):
        collector.collect([], [inbox])
    now[0] += 11.0
    with pytest.raises(StoreUnavailable):
        collector.collect([], [inbox])
