"""The message of a replay, and the order in which it is claimed, sent and marked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import a_message, headers_with

from celery_resilience.errors import BrokerUnavailable, NoRoute, StoreUnavailable
from celery_resilience.failed.replay import PAGE, Replayer, ReplayReport, replayed
from celery_resilience.failed.store import Claim
from celery_resilience.message import (
    DELIVERY_HEADERS,
    HEADER,
    TRANSPORT_PROPERTIES,
    OriginalMessage,
)
from celery_resilience.outcome import Reason

TOKEN = "a" * 32


def a_claim(**changes: Any) -> Claim:
    """A record that was claimed for a replay."""
    parts: dict[str, Any] = {
        "id": "r1",
        "token": TOKEN,
        "number": 1,
        "task": "shop.ship",
        "task_id": "task-1",
        "reason": "exception",
        "original": a_message(),
    }
    return Claim(**{**parts, **changes})


# --- the message ----------------------------------------------------------------------


def test_a_replay_is_the_original_as_if_it_were_new() -> None:
    """No retries spent, no eta, no expiry; bytes, headers and priority as they were."""
    original = a_message(
        headers={
            **a_message().headers,
            "retries": 3,
            "eta": "2026-01-01T00:00:00",
            "expires": "2026-01-02T00:00:00",
            "timelimit": [300, 200],
            "group": "g",
            "group_index": 2,
            "stamps": {"s": [1]},
            "stamped_headers": ["s"],
            "my": "own",
            "compression": "application/x-gzip",
        },
        properties={
            **a_message().properties,
            "priority": 7,
            "reply_to": "r",
            "expiration": "60000",
        },
        queue="late",
    )

    message = replayed(a_claim(original=original))

    assert message.body == original.body
    assert message.queue == "late"
    headers = {k: v for k, v in message.headers.items() if k != HEADER}
    assert headers == {**original.headers, "retries": 0, "eta": None, "expires": None}
    properties = dict(original.properties)
    del properties["expiration"]
    assert message.properties == properties
    assert message.content_type == original.content_type
    assert message.content_encoding == original.content_encoding


def test_a_replay_has_no_past() -> None:
    """A broker that counts deaths starts anew; so do our crashes and snoozes."""
    original = a_message(
        headers={
            **headers_with({"crashes": 2, "alone": True, "snoozes": 9}),
            **dict.fromkeys(DELIVERY_HEADERS, 5),
        },
        properties={**a_message().properties, **dict.fromkeys(TRANSPORT_PROPERTIES, 1)},
        redelivered=True,
    )

    message = replayed(a_claim(original=original))

    assert not DELIVERY_HEADERS & set(message.headers)
    assert not TRANSPORT_PROPERTIES & set(message.properties)
    assert set(message.marks) == {"replay"}
    assert message.redelivered is False


def test_a_replay_carries_its_record_and_token() -> None:
    """With them the worker asks whether it may run."""
    mark = replayed(a_claim(number=4)).marks["replay"]

    assert mark["record"] == "r1"
    assert mark["token"] == TOKEN
    assert mark["number"] == 4


def test_a_replay_keeps_its_idempotency_key() -> None:
    """The same key, the same effect; `--force` is written on the message."""
    key = ["charge:1", "f" * 32]
    headers = {"id": "1", HEADER: {"key": key, "crashes": 2}}
    claim = a_claim(original=a_message(headers=headers))

    marks = replayed(claim).marks

    assert marks.keys() == {"replay", "key"}
    assert marks["key"] == key
    assert replayed(replace(claim, is_forced=True)).marks["forced"] is True


def test_a_replay_starts_a_trace_of_its_own() -> None:
    """It names the one of the first publish, and so does the replay of a replay."""
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    original = a_message(headers={**a_message().headers, "traceparent": traceparent})

    message = replayed(a_claim(original=original))
    again = replayed(a_claim(original=message))

    assert "traceparent" not in message.headers
    assert message.marks["trace"] == again.marks["trace"] == traceparent
    assert "trace" not in replayed(a_claim()).marks


def test_of_several_records_with_one_key_the_first_is_forced() -> None:
    """The others end with the result that it had, though no message carries the key."""
    log: list[Any] = []
    store = Store(["a", "b", "c"], log, key="charge:1")
    sent: list[OriginalMessage] = []
    replayer = Replayer(
        store,  # type: ignore[arg-type]
        sent.append,
        is_followed=lambda task: True,
    )

    report = replayer.replay(["a", "b", "c"], force=True)

    assert report.sent == ["a", "b", "c"]
    assert [message.marks.get("forced") for message in sent] == [True, None, None]
    # As the store has it, for who sends what is left of this replay if it is killed.
    claimed = [
        (ids, words["is_forced"]) for what, ids, words in log[:-1] if what == "claim"
    ]
    assert claimed == [(["a", "b", "c"], True), (["b", "c"], False)]


def test_every_copy_of_a_replay_has_a_name_of_its_own() -> None:
    """A worker tells the second copy from a redelivery of the first."""
    one, two = (replayed(a_claim()).marks["replay"]["copy"] for _ in range(2))

    assert one != two
    assert len(one) == 32


def test_the_task_id_stays_unless_a_new_one_is_wanted() -> None:
    """Callers wait for the result under the old one."""
    message = replayed(a_claim())

    assert message.headers["id"] == message.headers["root_id"] == "task-1"
    assert message.properties["correlation_id"] == "task-1"


def test_a_new_id_is_written_wherever_the_old_one_was() -> None:
    """The root of a lone task is itself."""
    message = replayed(a_claim(), new_id="new")

    assert message.headers["id"] == message.headers["root_id"] == "new"
    assert message.properties["correlation_id"] == "new"


def test_a_link_of_a_chain_keeps_its_root() -> None:
    """Its family is told by the root, whatever its own id."""
    headers = {**a_message().headers, "root_id": "root", "parent_id": "parent"}

    message = replayed(a_claim(original=a_message(headers=headers)), new_id="new")

    assert message.headers["id"] == "new"
    assert (message.headers["root_id"], message.headers["parent_id"]) == (
        "root",
        "parent",
    )


def test_another_queue_may_be_wanted() -> None:
    """The claim says which."""
    assert replayed(a_claim(to_queue="other")).queue == "other"
    assert replayed(a_claim()).queue == "shop"


def test_a_message_without_a_tasks_headers_gets_none() -> None:
    """What was never a task is sent as it came, with our mark."""
    original = a_message(headers={"x": 1}, properties={}, body=b"raw")

    message = replayed(a_claim(original=original))

    assert {k: v for k, v in message.headers.items() if k != HEADER} == {"x": 1}


def test_the_claims_original_is_not_changed() -> None:
    """It may be sent again."""
    claim = a_claim()
    before = replace(
        claim.original,
        headers=dict(claim.original.headers),
        properties=dict(claim.original.properties),
    )

    replayed(claim, new_id="new")

    assert claim.original == before


# --- the order ------------------------------------------------------------------------


class Store:
    """A store in memory that writes down what it is asked."""

    def __init__(self, ids: Sequence[str], log: list[Any], **facts: Any) -> None:
        self.unresolved = list(ids)
        self.log = log
        self.facts = facts

    def claim(self, ids: Sequence[str], **words: Any) -> Sequence[Claim]:
        found = [id for id in ids if id in self.unresolved]
        self.unresolved = [id for id in self.unresolved if id not in found]
        self.log.append(("claim", list(ids), {"is_forced": False, **words}))
        return [
            a_claim(
                **{
                    "id": id,
                    "token": f"{n:032x}",
                    "is_forced": words.get("is_forced", False),
                    **self.facts,
                }
            )
            for n, id in enumerate(found)
        ]

    def mark_sent(self, claims: Sequence[tuple[Claim, str | None]]) -> None:
        self.log.append(("sent", [(claim.id, new_id) for claim, new_id in claims]))

    def release(self, claim: Claim, note: str) -> None:
        self.log.append(("release", claim.id, note))
        self.unresolved.append(claim.id)

    def finish(self, ids: Sequence[str], note: str) -> None:
        self.log.append(("finish", list(ids)))


class Broker:
    """Takes messages, except where it is told not to."""

    def __init__(self, log: list[Any], errors: dict[str, Exception] | None = None):
        self.log = log
        self.errors = errors or {}

    def publish(self, message: OriginalMessage) -> None:
        record = message.marks["replay"]["record"]
        if record in self.errors:
            raise self.errors[record]
        self.log.append(("publish", record, message.queue))


def a_replayer(
    ids: Sequence[str],
    errors: dict[str, Exception] | None = None,
    is_followed: bool = True,
    **facts: Any,
) -> tuple[Replayer, list[Any]]:
    """A replayer over fakes, and the log of what they were asked."""
    log: list[Any] = []
    replayer = Replayer(
        Store(ids, log, **facts),  # type: ignore[arg-type]
        Broker(log, errors).publish,
        is_followed=lambda task: is_followed,
    )
    return replayer, log


def test_claimed_then_published_then_marked() -> None:
    """The order is the promise: killed anywhere, nothing is lost or doubled."""
    replayer, log = a_replayer(["a", "b"])

    report = replayer.replay(["a", "b"], to_queue="q", new_id=False)

    assert log == [
        (
            "claim",
            ["a", "b"],
            {"to_queue": "q", "wants_new_id": False, "is_forced": False},
        ),
        ("publish", "a", "shop"),
        ("publish", "b", "shop"),
        ("sent", [("a", None), ("b", None)]),
    ]
    assert report.sent == ["a", "b"]
    assert (report.failed, report.skipped) == ({}, [])


def test_what_is_not_unresolved_is_skipped() -> None:
    """And named."""
    replayer, log = a_replayer(["b"])

    report = replayer.replay(["a", "b", "c"])

    assert (report.sent, report.skipped) == (["b"], ["a", "c"])
    assert [entry for entry in log if entry[0] == "publish"] == [
        ("publish", "b", "shop")
    ]


def test_a_refused_message_never_stops_the_rest() -> None:
    """It is unresolved again at once, with the reason."""
    replayer, log = a_replayer(["a", "b", "c"], {"b": NoRoute("no queue")})

    report = replayer.replay(["a", "b", "c"])

    assert report.sent == ["a", "c"]
    assert report.failed == {"b": "no queue"}
    assert ("release", "b", "no queue") in log
    assert ("sent", [("a", None), ("c", None)]) in log


def test_a_broker_that_goes_away_stops_it() -> None:
    """What was sent is marked, one is in doubt, what was not tried is let go."""
    replayer, log = a_replayer(["a", "b", "c"], {"b": BrokerUnavailable("away")})
    report = ReplayReport()

    with pytest.raises(BrokerUnavailable, match="away"):
        replayer.replay(["a", "b", "c"], report=report)

    assert log[-3][:3] == ("publish", "a", "shop")
    assert log[-2][:2] == ("release", "c")
    assert log[-1] == ("sent", [("a", None)])
    assert (report.sent, report.in_doubt, report.failed) == (["a"], ["b"], {})


def test_a_store_that_goes_away_is_told() -> None:
    """It is not taken for a refusal of the broker."""
    replayer, _ = a_replayer(["a"], {"a": StoreUnavailable("away")})

    with pytest.raises(StoreUnavailable):
        replayer.replay(["a"])


def test_many_are_claimed_page_by_page() -> None:
    """Claims must not grow stale before they are sent."""
    ids = [f"id{i}" for i in range(2 * PAGE + 5)]
    replayer, log = a_replayer(ids)
    seen: list[int] = []

    report = replayer.replay(iter(ids), on_progress=lambda r: seen.append(len(r.sent)))

    assert [len(entry[1]) for entry in log if entry[0] == "claim"] == [PAGE, PAGE, 5]
    assert report.sent == ids
    assert seen == [PAGE, 2 * PAGE, 2 * PAGE + 5]


def test_nothing_to_replay_asks_nobody() -> None:
    """An empty list of ids is not everything."""
    replayer, log = a_replayer(["a"])

    assert replayer.replay([]).sent == []
    assert log == []


@pytest.mark.parametrize("reason", [Reason.EXPIRED, Reason.REVOKED])
def test_what_celery_would_drop_gets_a_new_id(reason: str) -> None:
    """A worker remembers revoked ids."""
    replayer, log = a_replayer(["a"], reason=reason)

    replayer.replay(["a"])

    ((_, [(_, new_id)]),) = [entry for entry in log if entry[0] == "sent"]
    assert new_id == str(UUID(int=0))


def test_a_claim_that_is_sent_twice_has_the_same_new_id() -> None:
    """Its caller must be able to wait for it."""
    replayer, _ = a_replayer([])

    ids = {replayer.send(a_claim(wants_new_id=True)) for _ in range(2)}

    assert ids == {str(UUID(TOKEN))}


def test_other_tasks_keep_their_id() -> None:
    """Only where a new one was asked for."""
    replayer, _ = a_replayer([])

    assert replayer.send(a_claim()) is None


def test_a_task_that_reports_nothing_is_resolved_when_it_is_sent() -> None:
    """A task without ResilientTask has nobody to tell how its replay ended."""
    replayer, log = a_replayer(["a", "b"], {"b": NoRoute("x")}, is_followed=False)

    replayer.replay(["a", "b"])

    assert log[-2:] == [("sent", [("a", None)]), ("finish", ["a"])]


def test_chords_are_counted() -> None:
    """Celery has failed them already; the operator is told."""
    replayer, _ = a_replayer(["a", "b"], {"b": NoRoute("x")}, in_chord=True)

    assert replayer.replay(["a", "b"]).in_chord == 1


def test_the_log_tells_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    """One line, with a name that the report has too."""
    replayer, _ = a_replayer(["a", "b"], {"b": NoRoute("x")})

    with caplog.at_level(logging.INFO, "celery_resilience.failed"):
        report = replayer.replay(["a", "b", "c"])

    assert caplog.messages == [
        f"replay {report.operation_id}: 1 sent, 1 refused, 1 skipped"
    ]


@given(
    st.lists(st.sampled_from("abcdefgh"), unique=True),
    st.lists(st.sampled_from("abcdefgh"), unique=True),
    st.lists(st.sampled_from("abcdefgh"), unique=True),
)
def test_every_id_ends_in_exactly_one_place(
    ids: list[str], unresolved: list[str], refused: list[str]
) -> None:
    """Sent, failed or skipped; and only what was sent is marked so."""
    replayer, log = a_replayer(unresolved, {id: NoRoute("x") for id in refused})

    report = replayer.replay(ids)

    ended = [*report.sent, *report.failed, *report.skipped]
    assert sorted(ended) == sorted(ids)
    published = [entry[1] for entry in log if entry[0] == "publish"]
    marked = [id for entry in log if entry[0] == "sent" for id, _ in entry[1]]
    assert published == marked == report.sent
