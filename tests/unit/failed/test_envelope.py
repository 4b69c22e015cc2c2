"""The document of one failed task, from a settlement to bytes and back."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from unit.specimens import (
    HOSTILE_TEXT,
    NAMESPACE,
    a_failed_document,
    a_message,
    a_settlement,
    a_success_document,
    replay_mark,
)

from celery_resilience.failed.envelope import (
    FAILED,
    SETTLED,
    dumps,
    envelope,
    foreign,
    iso,
    loads,
    posted,
    record_id,
    settled,
)
from celery_resilience.message import HEADER, OriginalMessage
from celery_resilience.outcome import Outcome, Reason
from celery_resilience.packing import pack, unpack

any_text = st.text(st.characters(exclude_categories=()), max_size=20)

zones = st.sampled_from([UTC, timezone(timedelta(hours=-3, minutes=-30)), None])

#: What a header may hold: JSON's values, and what AMQP's tables have besides.
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | any_text
    | st.binary(max_size=20)
    | st.decimals(allow_nan=False)
    | st.datetimes(timezones=zones)
)
names = any_text.filter(lambda name: not name.startswith("$"))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=8,
)
tables = st.dictionaries(names, values, max_size=4)

messages = st.builds(
    OriginalMessage,
    body=st.binary(max_size=200),
    headers=tables,
    properties=tables,
    content_type=st.none() | any_text,
    content_encoding=st.none() | any_text,
    exchange=any_text,
    routing_key=any_text,
    queue=any_text,
    redelivered=st.booleans(),
)


# --- there and back -------------------------------------------------------------------


@given(messages)
@example(a_message(body=b"\x00\xff\x80"))
def test_a_message_comes_back_byte_for_byte(message: OriginalMessage) -> None:
    """Through pack, JSON bytes and unpack, every value with its type."""
    document = {**a_failed_document(), "original": pack(message)}

    back = unpack(loads(dumps(document))["original"])

    assert back == message
    assert types_of(back.headers) == types_of(message.headers)


def types_of(value: Any) -> Any:
    """The same structure with each value's type, for 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {name: types_of(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [types_of(inner) for inner in value]
    return type(value)


def test_every_body_comes_back() -> None:
    """All 256 bytes, and megabytes of them."""
    body = bytes(range(256)) * 4_096

    document = a_failed_document(message=a_message(body=body))

    assert unpack(loads(dumps(document))["original"]).body == body


def test_a_document_comes_back_whole() -> None:
    """Envelopes and reports alike."""
    for document in (a_failed_document(), a_success_document()):
        assert loads(dumps(document)) == document


def test_a_hostile_document_is_plain_ascii() -> None:
    """The wire holds no control character and no broken text."""
    document = a_failed_document(
        task=HOSTILE_TEXT, message=a_message(headers={"id": "i", "x": HOSTILE_TEXT})
    )

    data = dumps(document)

    assert all(32 <= byte < 127 for byte in data)
    assert loads(data) == document


@pytest.mark.parametrize(
    ("value", "back"),
    [
        ((1, 2), [1, 2]),
        ({5}, [5]),
        (bytearray(b"a"), b"a"),
        (memoryview(b"a"), b"a"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (ValueError("x"), "x"),
    ],
)
def test_what_json_lacks_becomes_what_is_nearest(value: Any, back: Any) -> None:
    """No header makes a failure unkeepable."""
    document = a_failed_document(message=a_message(headers={"x": value}))

    assert loads(dumps(document))["original"]["headers"]["x"] == back


def test_an_object_whose_text_raises_is_kept_too() -> None:
    """A hostile header costs its own text only."""

    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError

    document = a_failed_document(message=a_message(headers={"x": Hostile()}))

    assert "Hostile" in loads(dumps(document))["original"]["headers"]["x"]


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"5",
        b'"failed"',
        b"[]",
        b"{}",
        b'{"schema": 1}',
        b'{"kind": "failed"}',
        b'{"kind": "else", "schema": 1}',
        b'{"kind": ["failed"], "schema": 1}',
        b"\xff\xfe\x00",
        b"\x80abc",
        b'{"kind": "failed", "schema": 1, "x": {"$datetime": "yesterday"}}',
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    """Whatever lies on a failed queue, ValueError says that it is none of ours."""
    with pytest.raises(ValueError):  # noqa: PT011 - its subclasses too
        loads(data)


@given(st.binary(max_size=50) | st.text(max_size=50).map(str.encode))
def test_random_bytes_are_refused(data: bytes) -> None:
    """Nothing but a ValueError comes of them."""
    with pytest.raises(ValueError):  # noqa: PT011 - its subclasses too
        loads(data)


@pytest.mark.parametrize("schema", [2, 0, None, "1", "2.0"])
def test_another_schema_is_refused_by_its_name(schema: Any) -> None:
    """A newer release's document is not taken for ours."""
    data = dumps({**a_failed_document(), "schema": schema})

    with pytest.raises(ValueError, match=f"schema {schema!r}"):
        loads(data)


# --- the record's id ------------------------------------------------------------------


def test_a_redelivery_has_the_same_record() -> None:
    """Whatever the broker added to it, and from whichever queue it came."""
    first = a_message()
    again = replace(
        first,
        headers={**first.headers, "x-delivery-count": 2},
        properties={"delivery_tag": "other"},
        redelivered=True,
        queue="other",
    )

    assert record_id(NAMESPACE, a_settlement(), first) == record_id(
        NAMESPACE, a_settlement(worker="celery@two"), again
    )


@given(any_text.filter(bool), any_text.filter(bool))
@example("1", "2")
def test_two_tasks_have_two_records(one: str, two: str) -> None:
    """One record for each task id."""
    ids = [
        record_id(NAMESPACE, a_settlement(task_id=task_id), a_message())
        for task_id in (one, two)
    ]

    assert all(len(id) == 32 and set(id) <= set("0123456789abcdef") for id in ids)
    if one.encode(errors="replace") != two.encode(errors="replace"):
        assert ids[0] != ids[1]


def test_two_apps_have_two_records_for_one_task_id() -> None:
    """They may share a store."""
    ids = {record_id(ns, a_settlement(), a_message()) for ns in ("a", "b")}

    assert len(ids) == 2


def test_a_message_without_a_task_id_is_known_by_its_tag() -> None:
    """A virtual transport keeps a uuid over a redelivery."""
    nameless = a_settlement(task_id="")
    tag, other = "a" * 36, "b" * 36

    def id_with(properties: dict[str, Any]) -> str:
        return record_id(NAMESPACE, nameless, a_message(properties=properties))

    assert id_with({"delivery_tag": tag}) == id_with({"delivery_tag": tag, "x": 1})
    assert id_with({"delivery_tag": tag}) != id_with({"delivery_tag": other})


@pytest.mark.parametrize("tag", [None, 7, "7", "x" * 31])
def test_without_a_name_no_two_messages_are_one(tag: Any) -> None:
    """AMQP counts tags for each channel, so that they name nothing."""
    message = a_message(properties={"delivery_tag": tag})
    nameless = a_settlement(task_id="")

    assert record_id(NAMESPACE, nameless, message) != record_id(
        NAMESPACE, nameless, message
    )


def test_a_tag_is_not_taken_for_a_task_id() -> None:
    """A task whose id is another message's tag has its own record."""
    tag = "a" * 36

    assert record_id(
        NAMESPACE, a_settlement(task_id=""), a_message(properties={"delivery_tag": tag})
    ) != record_id(NAMESPACE, a_settlement(task_id=tag), a_message())


# --- what is in it --------------------------------------------------------------------


def test_an_envelope_tells_all_of_a_failure() -> None:
    """Every fact of the settlement, and the message."""
    settlement = a_settlement(
        attempt=3,
        pid=77,
        run_s=1.5,
        root_id="r",
        parent_id="p",
        in_chord=True,
        chain_length=2,
        args="(1,)",
        kwargs="{}",
        arguments={"a": "1"},
        facts={"sentry_event_id": "s", "idempotency_key": "k"},
    )
    message = a_message(
        headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
        properties={"priority": 6},
        body=b"x" * 1536,
    )

    document = envelope(
        settlement,
        message,
        namespace="shop",
        failed_queue="fq",
        at=1_000.5,
        release="v1",
    )

    assert document["schema"] == 1
    assert document["kind"] == FAILED
    assert document["id"] == record_id("shop", settlement, message)
    assert document["app"] == "shop"
    assert document["failed_queue"] == "fq"
    assert document["queue"] == "shop"
    assert document["reason"] == "exception"
    assert document["exception"] == "shop.errors.NoStock"
    assert document["message"] == "none left"
    assert document["traceback"].startswith("Traceback")
    assert document["fingerprint"] == settlement.failure.fingerprint
    assert document["attempt"] == {
        "at": "1970-01-01T00:16:40.500000+00:00",
        "worker": "celery@one",
        "pid": 77,
        "reason": "exception",
        "exception": "shop.errors.NoStock",
        "message": "none left",
        "runtime_s": 1.5,
    }
    assert document["attempt_number"] == 3
    assert document["failed_at"] == 1_000.5
    assert (document["root_id"], document["parent_id"]) == ("r", "p")
    assert (document["in_chord"], document["chain_length"]) == (True, 2)
    assert (document["args"], document["kwargs"]) == ("(1,)", "{}")
    assert document["arguments"] == {"a": "1"}
    assert document["priority"] == 6
    assert document["body_kib"] == 1.5
    assert document["release"] == "v1"
    assert document["trace_id"] == "a" * 32
    assert document["sentry_event_id"] == "s"
    assert document["idempotency_key"] == "k"
    assert (document["replay_number"], document["token"]) == (0, None)
    assert unpack(document["original"]) == message


def test_a_replays_failure_belongs_to_its_record() -> None:
    """Even where the message had to get a new task id."""
    settlement = a_settlement(task_id="new", marks=replay_mark("r" * 32, "t", 2))

    document = envelope(
        settlement, a_message(), namespace="shop", failed_queue="fq", at=0.0
    )

    assert document["id"] == "r" * 32
    assert (document["replay_number"], document["token"]) == (2, "t")


def test_a_report_names_the_record_and_the_replay() -> None:
    """A success is told with its token, and belongs to the same record."""
    ordinary = a_settlement(outcome=Outcome.SUCCEEDED)
    replay = replace(ordinary, task_id="new", marks=replay_mark("r" * 32, "t", 2))

    def report(settlement: Any) -> dict[str, Any]:
        return settled(
            settlement, a_message(), namespace="shop", failed_queue="fq", at=5.0
        )

    assert report(ordinary)["kind"] == SETTLED
    assert report(ordinary)["id"] == record_id("shop", a_settlement(), a_message())
    assert report(ordinary)["outcome"] == "succeeded"
    assert report(ordinary)["settled_at"] == 5.0
    assert report(replay)["id"] == "r" * 32
    assert (report(replay)["replay_number"], report(replay)["token"]) == (2, "t")


def test_every_capture_has_a_name_of_its_own() -> None:
    """A document that comes twice is told from two captures."""
    assert a_failed_document()["capture"] != a_failed_document()["capture"]
    assert a_success_document()["capture"] != a_success_document()["capture"]


def test_what_is_no_envelope_gets_one() -> None:
    """Something that lies on a failed queue is kept as malformed, byte for byte."""
    message = a_message(body=b"\x00junk", queue="shop.failed")

    document = foreign(message, why="not an envelope", namespace="shop", at=3.0)

    assert document["reason"] == Reason.MALFORMED
    assert document["failed_queue"] == document["queue"] == "shop.failed"
    assert (document["task"], document["task_id"]) == ("shop.ship", "task-1")
    assert unpack(loads(dumps(document))["original"]) == message


def test_garbage_in_headers_of_what_is_no_envelope_is_no_name() -> None:
    """Only texts name a task."""
    message = a_message(headers={"task": 5, "id": ["x"]})

    document = foreign(message, why="not an envelope", namespace="shop", at=3.0)

    assert (document["task"], document["task_id"]) == ("", "")


def test_a_posted_document_is_a_message_for_its_queue() -> None:
    """Marked as what it is, so that nobody takes it for a task."""
    document = a_failed_document(failed_queue="fq")

    message = posted(document)

    assert message.queue == message.routing_key == "fq"
    assert message.exchange == ""
    assert message.content_type == "application/json"
    assert loads(message.body) == document
    assert message.headers == {HEADER: {"kind": "failed", "id": document["id"]}}


def test_times_are_written_in_utc() -> None:
    """ISO 8601, or nothing."""
    assert iso(0.0) == "1970-01-01T00:00:00+00:00"
    assert datetime.fromisoformat(str(iso(1_764_000_000.25))).timestamp() == (
        1_764_000_000.25
    )
    assert iso(None) is None


def test_decimals_and_datetimes_keep_their_form() -> None:
    """AMQP's tables have them: 1.10 is not 1.1, and a zone is kept."""
    headers = {
        "price": Decimal("1.10"),
        "at": datetime(2026, 11, 23, tzinfo=timezone(timedelta(hours=2))),
    }

    back = loads(dumps(a_failed_document(message=a_message(headers=headers))))

    assert str(back["original"]["headers"]["price"]) == "1.10"
    assert back["original"]["headers"]["at"].utcoffset() == timedelta(hours=2)


def test_the_body_on_the_wire_is_base64() -> None:
    """JSON holds no bytes."""
    document = json.loads(dumps(a_failed_document(message=a_message(body=b"\xff"))))

    assert base64.b64decode(document["original"]["body"]) == b"\xff"


@pytest.mark.parametrize(
    "value",
    [
        {"$bytes": "not ours"},
        {"$decimal": "1.5"},
        {"$datetime": "2026-11-23"},
        {"$datetime": 5},
        {"$bytes": None},
        {"$decimal": "x"},
    ],
    ids=str,
)
def test_a_header_that_looks_like_our_tag_comes_back(value: Any) -> None:
    """JSON has one way to write a dict, and the user has used it."""
    document = a_failed_document(message=a_message(headers={"x": value}))

    assert loads(dumps(document))["original"]["headers"]["x"] == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"kind": "failed", "schema": 1, "x": {"$decimal": "x"}}',
        b'{"kind": "failed", "schema": 1, "x": {"$bytes": null}}',
        b'{"kind": "failed", "schema": 1, "x": {"$datetime": 5}}',
        b"[" * 100_000,
    ],
    ids=["decimal", "bytes", "datetime", "nested"],
)
def test_every_garbage_is_a_value_error(data: bytes) -> None:
    """One such message on a failed queue must not stop all behind it."""
    with pytest.raises(ValueError):  # noqa: PT011 - its subclasses too
        loads(data)


@pytest.mark.parametrize(
    "missing", ["id", "capture", "failed_at", "attempt", "original"]
)
def test_a_document_without_a_field_is_refused(missing: str) -> None:
    """It would fail in the store, each time anew, and stop all behind it."""
    document = a_failed_document()
    del document[missing]

    with pytest.raises(ValueError):  # noqa: PT011 - its subclasses too
        loads(dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        *({"id": 5}, {"task": 5}, {"queue": ["q"]}, {"failed_at": "now"}),
        *({"attempt": []}, {"replay_number": 10**30}, {"original": {}}),
    ],
    ids=str,
)
def test_a_document_with_a_garbled_field_is_refused(change: dict[str, Any]) -> None:
    """As the above."""
    with pytest.raises(ValueError):  # noqa: PT011 - its subclasses too
        loads(dumps({**a_failed_document(), **change}))


@pytest.mark.parametrize("id", ["", "a" * 33, "a b", "\u00e9", "a\n"])
def test_a_document_with_a_name_that_no_store_takes_is_refused(id: str) -> None:
    """It would stop every batch that it is in."""
    with pytest.raises(ValueError, match="wrong id"):
        loads(dumps({**a_failed_document(), "id": id}))


def test_a_garbled_replay_mark_does_not_stop_the_capture() -> None:
    """Anybody may write a header named resilience; the failure is kept anyway."""
    settlement = a_settlement(marks={"replay": "yes"})

    document = envelope(
        settlement, a_message(), namespace="shop", failed_queue="fq", at=0.0
    )

    assert document["id"] == record_id("shop", settlement, a_message())


@pytest.mark.parametrize("make", [a_failed_document, a_success_document])
def test_a_document_of_a_later_year_is_read(make: Any) -> None:
    """A wall time is no whole number of a store's."""
    document = make(at=2.0**31)

    assert loads(dumps(document)) == document


def test_an_argument_that_is_named_like_our_tag_comes_back() -> None:
    """A task called with `**{"$decimal": ...}` fails as any other does."""
    document = a_failed_document(arguments={"$decimal": "'x'"})

    assert loads(dumps(document)) == document
