"""A message as it was handed over, and the copies that are made of it."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection
from kombu.message import Message
from unit.specimens import a_message, headers_with

from celery_resilience.message import (
    DELIVERY_HEADERS,
    HEADER,
    TRANSPORT_PROPERTIES,
    OriginalMessage,
    body_bytes,
    foreign_message,
    marks_of,
    original_message,
    undelayed,
)

counts = st.integers(min_value=0, max_value=2**31)

names = st.text(alphabet="0123456789abcdef", min_size=1, max_size=32)
marks = st.fixed_dictionaries(
    {},
    optional={
        "alone": st.booleans(),
        "crashed_at": st.floats(0, 1e11, exclude_max=True),
        "crashes": counts,
        "snoozes": counts,
        "replay": st.fixed_dictionaries(
            {
                "record": names,
                "token": names,
                "copy": names,
                "number": counts,
            }
        ),
        "mark_of_a_later_release": st.integers() | st.text(max_size=5),
    },
).filter(bool)


# --- our marks ------------------------------------------------------------------------


@given(marks)
def test_marks_are_written_below_one_header(added: dict[str, Any]) -> None:
    """Celery copies unknown headers, so that ours are all in one place."""
    message = a_message()

    marked = message.marked(**added)

    assert marked.headers == {**message.headers, HEADER: added}
    assert marked.marks == added
    assert HEADER not in message.headers


@given(marks, marks)
def test_marks_are_added_to_those_that_are_there(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    """The later one wins, the others stay."""
    assert a_message().marked(**first).marked(**second).marks == {**first, **second}


GARBLED = {
    "alone": ["yes", 1, None],
    "crashed_at": ["now", float("nan"), float("inf"), None],
    "key": [
        *("k", ["k"], ["", ""], ["k" * 256, ""], ["k", 5], ["k", "f" * 31]),
        *(["k", "F" * 32], ["k", "f" * 33], ["k", "f" * 32 + "\n"], ["k", "\0" * 32]),
    ],
    "crashes": ["many", -1, 1.5, True, [], None],
    "redeliveries": ["many"],
    "replay": [
        *(0, [], {}, {"record": 5, "token": "t", "copy": "c", "number": 1}),
        {"record": "a" * 33, "token": "t", "copy": "c", "number": 1},
        {"record": "r", "token": "", "copy": "c", "number": 1},
        {"record": "r", "token": "t", "copy": "é", "number": 1},
    ],
    "snoozes": ["many", {}],
    "unrecorded": [-1],
}


@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_mark_is_none(name: str) -> None:
    """Anybody may write a header of that name; what is sound counts."""
    for mark in GARBLED[name]:
        assert marks_of({HEADER: {name: mark, "kind": "failed"}}) == {"kind": "failed"}


def test_none_takes_a_mark_away() -> None:
    """Without the last mark the header is gone too."""
    message = a_message().marked(crashes=1, alone=True)

    assert message.marked(alone=None).marks == {"crashes": 1}
    assert message.marked(alone=None, crashes=None) == a_message()
    assert message.marked(unknown=None) == message
    assert message.marked(crashes=0, alone=False).marks == {
        "crashes": 0,
        "alone": False,
    }


def test_a_marked_copy_leaves_the_original_alone() -> None:
    """Nothing is shared that the copy changes."""
    message = a_message(headers=headers_with({"crashes": 1}))

    message.marked(crashes=2)

    assert message.marks == {"crashes": 1}


@pytest.mark.parametrize("garbage", [None, 5, "x", [1], [["a", 1]], True])
def test_garbage_below_our_header_is_no_mark(garbage: Any) -> None:
    """Anybody may write a header of our name."""
    assert marks_of({HEADER: garbage}) == {}
    assert a_message(headers={HEADER: garbage}).marked(crashes=1).marks == {
        "crashes": 1
    }


def test_no_headers_hold_no_marks() -> None:
    """A message of another system may have none."""
    assert marks_of(None) == {}
    assert marks_of({}) == {}


# --- copies ---------------------------------------------------------------------------


def test_a_copy_without_past_was_never_delivered() -> None:
    """No broker's count and no death goes along; everything else does."""
    message = a_message(
        headers={**a_message().headers, **dict.fromkeys(DELIVERY_HEADERS, 3), "my": 1},
        properties={
            **a_message().properties,
            **dict.fromkeys(TRANSPORT_PROPERTIES, "x"),
            "reply_to": "r",
        },
        redelivered=True,
    )

    copy = message.without_past()

    assert copy.headers == {**a_message().headers, "my": 1}
    assert copy.properties == {**a_message().properties, "reply_to": "r"}
    assert copy.redelivered is False
    assert copy.body == message.body
    assert copy.without_past() == copy


def test_a_copy_keeps_our_marks() -> None:
    """Crashes are counted over copies."""
    message = a_message(headers=headers_with({"crashes": 2}))

    assert message.without_past().marks == {"crashes": 2}


@pytest.mark.parametrize(
    ("at", "eta"),
    [
        (datetime(2026, 11, 23, 22, 10, tzinfo=UTC), "2026-11-23T22:10:00+00:00"),
        (
            datetime(2026, 11, 24, 0, 10, tzinfo=timezone(timedelta(hours=2))),
            "2026-11-23T22:10:00+00:00",
        ),
        (None, None),
    ],
)
def test_a_due_copy_has_an_eta_in_utc(at: datetime | None, eta: str | None) -> None:
    """The zone of the host does not matter, and None takes an eta away."""
    message = a_message(headers={**a_message().headers, "eta": "2020-01-01T00:00:00"})

    copy = message.due_at(at)

    assert copy.headers == {**a_message().headers, "eta": eta}
    assert message.headers["eta"] == "2020-01-01T00:00:00"


# --- bodies ---------------------------------------------------------------------------


@given(st.binary())
def test_bytes_stay_as_they_are(body: bytes) -> None:
    """Whatever encoding the message claims."""
    assert body_bytes(body, "utf-8") == body
    assert body_bytes(bytearray(body), None) == body
    assert body_bytes(memoryview(body), "nonsense") == body


@given(
    st.text(st.characters(codec="utf-8")),
    st.sampled_from(["utf-8", "utf-16-le", None]),
)
def test_a_decoded_body_is_encoded_again(text: str, encoding: str | None) -> None:
    """py-amqp decodes a body that has a text encoding."""
    assert body_bytes(text, encoding) == text.encode(encoding or "utf-8")


def test_a_body_in_another_encoding_comes_back_byte_for_byte() -> None:
    """Latin-1 was published, so latin-1 is replayed."""
    body = "Grüße".encode("latin-1")

    assert body_bytes(body.decode("latin-1"), "latin-1") == body


@pytest.mark.parametrize("encoding", ["binary", "nonsense", "base64", "latin-1", ""])
def test_an_encoding_that_does_not_fit_is_no_error(encoding: str) -> None:
    """The body is kept as UTF-8 then."""
    assert body_bytes("€", encoding) == "€".encode()


def test_bytes_that_were_decoded_with_surrogates_come_back() -> None:
    """What is not UTF-8 survives as py-amqp may hand it over."""
    body = b"a\xff\xfe"

    assert body_bytes(body.decode(errors="surrogateescape"), "utf-8") == body


def test_no_body_is_an_empty_one() -> None:
    """Some transports hand over None."""
    assert body_bytes(None, "utf-8") == b""


# --- the original of a kombu message --------------------------------------------------


def test_the_original_of_a_kombu_message_has_all_of_it() -> None:
    """Nothing of the broker's facts is lost."""
    message = Message(
        body="[[], {}, {}]",
        delivery_tag=1,
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": "t", "id": "i"},
        properties={"priority": 3},
        delivery_info={"exchange": "e", "routing_key": "k", "redelivered": True},
    )

    original = original_message(message, "q")

    assert original.body == b"[[], {}, {}]"
    assert original.headers == {"task": "t", "id": "i"}
    assert original.properties == {"priority": 3}
    assert original.content_type == "application/json"
    assert original.content_encoding == "utf-8"
    assert (original.exchange, original.routing_key, original.queue) == ("e", "k", "q")
    assert original.redelivered is True


def test_the_original_of_a_bare_kombu_message_is_empty() -> None:
    """What the broker did not tell is not invented."""
    original = original_message(Message(), "q")

    assert original == OriginalMessage(
        body=b"",
        headers={},
        properties={},
        content_type=None,
        content_encoding=None,
        exchange="",
        routing_key="",
        queue="q",
    )


def test_the_original_does_not_change_with_its_message() -> None:
    """Celery pops headers as it goes."""
    message = Message(headers={"a": 1}, properties={"b": 2}, delivery_info={})

    original = original_message(message, "q")
    message.headers.clear()
    message.properties.clear()

    assert original.headers == {"a": 1}
    assert original.properties == {"b": 2}


def test_a_virtual_transports_message_is_unwrapped() -> None:
    """Its body lies in base64 on the broker."""
    with Connection("memory://") as connection:
        channel = connection.default_channel
        raw = {
            "body": base64.b64encode(b"\x00\xff").decode(),
            "headers": {},
            "content-type": "application/data",
            "content-encoding": "binary",
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": "t",
                "delivery_info": {"exchange": "", "routing_key": "q"},
            },
        }
        message = channel.Message(json.loads(json.dumps(raw)), channel=channel)

        original = original_message(message, "q")

    assert original.body == b"\x00\xff"
    assert original.routing_key == "q"


def test_what_is_no_message_is_kept_with_its_queue() -> None:
    """Raw bytes that another program pushed onto a list."""
    message = foreign_message(b"\x00raw", "q")

    assert message.body == b"\x00raw"
    assert (message.queue, message.routing_key, message.exchange) == ("q", "q", "")
    assert message.headers == message.properties == {}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("\ud800", "utf-8"), ("a", "undefined"), ("a" * 80, "idna")],
    ids=["surrogate", "undefined", "idna"],
)
def test_every_text_body_has_bytes(text: str, encoding: str) -> None:
    """A virtual transport's JSON may hold a lone surrogate, or any encoding's name."""
    assert body_bytes(text, encoding)


def test_a_number_as_a_body_is_not_a_size() -> None:
    """{"body": 5000} on Redis is four characters; 10**15 is a MemoryError."""
    assert body_bytes(5_000, "utf-8") == b"5000"


# --- native delayed delivery ---------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "key", "found"),
    [
        ("celery_delayed_27", "0." * 27 + "1.shop", ("", "shop")),
        ("celery_delayed_0", "1." * 28 + "a.b", ("", "a.b")),
        (
            "celery_delayed_x",
            "0." * 28 + "shop",
            ("celery_delayed_x", "0." * 28 + "shop"),
        ),
        ("", "0.1.shop", ("", "0.1.shop")),
        ("celery_delayed_5", "shop", ("", "shop")),
        ("celery_delayed_delivery", "0." * 27 + "1.shop", ("", "shop")),
        ("eu_celery_delayed_27", "0." * 27 + "1.shop", ("", "shop")),
        ("eu_celery_delayed_delivery", "0." * 28 + "shop", ("", "shop")),
    ],
)
def test_native_delayed_delivery_leaves_marks_that_go(
    exchange: str, key: str, found: tuple[str, str]
) -> None:
    """28 levels before the routing key, and an exchange of its own."""
    assert undelayed(exchange, key) == found


@pytest.mark.parametrize(
    "header",
    [
        *("x-first-death-queue", "x-first-death-reason", "x-first-death-exchange"),
        *("x-last-death-queue", "x-last-death-reason", "x-last-death-exchange"),
        *("x-opt-deaths", "x-opt-delivery-count", "x-opt-deliver-at"),
        *("x-opt-acquired-count", "x-delivery-count", "x-acquired-count", "x-death"),
        *("CC", "BCC", "redelivered"),
    ],
)
def test_what_brokers_write_is_no_part_of_a_copy(header: str) -> None:
    """A copy arrives in one queue, as if it had never been delivered."""
    message = a_message(headers={**a_message().headers, header: 1, "x-mine": 2})

    assert message.without_past().headers == {**a_message().headers, "x-mine": 2}


def test_the_original_of_a_delayed_message_is_as_if_it_had_not_been() -> None:
    """Its exchange and routing key are the delay's."""
    info = {
        "exchange": "celery_delayed_delivery",
        "routing_key": "0." * 27 + "1.shop",
    }

    original = original_message(Message(delivery_info=info), "shop")

    assert (original.exchange, original.routing_key) == ("", "shop")


def test_a_trace_that_is_none_is_no_mark() -> None:
    """Anybody may write the header."""
    assert marks_of({HEADER: {"trace": "x", "crashes": 1}}) == {"crashes": 1}
    message = a_message(headers={**a_message().headers, "traceparent": "x"})
    assert message.in_new_trace() is message


@pytest.mark.parametrize(
    "time_s", [10**400, 1e300, float("nan"), float("inf"), -1.0, True]
)
@pytest.mark.parametrize("name", ["sent_at", "waits_since", "crashed_at"])
def test_a_time_of_which_no_date_can_be_made_is_no_mark(name: str, time_s: Any) -> None:
    """Whoever wrote it: JSON has whole numbers of any length."""
    assert marks_of({HEADER: {name: time_s, "snoozes": 1}}) == {"snoozes": 1}
