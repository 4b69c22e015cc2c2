"""A message that the broker gave up: why, where, and what it was to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import HOSTILE_TEXT, KnownApp, a_message, replay_mark

from celery_resilience.failed.dead_letter import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    dead_letter,
    pause_s,
)
from celery_resilience.failed.envelope import dumps, loads
from celery_resilience.message import HEADER, OriginalMessage
from celery_resilience.packing import unpack

DEAD = "dead"


def naive(*parts: int) -> datetime:
    """A time in UTC that does not say so, as py-amqp reads it."""
    return datetime(*parts, tzinfo=UTC).replace(tzinfo=None)  # type: ignore[arg-type, misc]


DIED = naive(2026, 11, 24, 19, 19, 4)
NOW = 9_000_000_000.0

#: Delays of native delayed delivery, as a task with a countdown of 3 has passed them.
DELAYS = [
    {"queue": f"celery_delayed_{n}", "reason": "expired", "count": 1, "time": DIED}
    for n in (0, 1)
]


def died(queue: str = "work", reason: str = "rejected", **more: Any) -> dict[str, Any]:
    """An entry of `x-death`, as RabbitMQ 3.10 writes and py-amqp reads it."""
    return {
        "count": 1,
        "reason": reason,
        "queue": queue,
        "time": DIED,
        "exchange": "",
        "routing-keys": [queue],
        **more,
    }


def a_dead_message(*deaths: Any, **changes: Any) -> OriginalMessage:
    """A task message with this past, as it is taken from the dead-letter queue."""
    first = deaths[-1] if deaths and isinstance(deaths[-1], dict) else {}
    headers = {
        **a_message().headers,
        "x-death": list(deaths),
        "x-first-death-queue": first.get("queue"),
        "x-first-death-reason": first.get("reason"),
        "x-first-death-exchange": first.get("exchange"),
        **changes.pop("headers", {}),
    }
    parts = {"queue": DEAD, "routing_key": DEAD, **changes}
    return a_message(headers=headers, **parts)


def read(message: OriginalMessage, **facts: Any) -> dict[str, Any]:
    """Its document, as the store gets it back."""
    document = dead_letter(message, app=KnownApp(**facts), namespace="shop", at=NOW)
    return loads(dumps(document))


# --- why ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "reason", "said"),
    [
        ("rejected", "rejected", "a worker rejected it in queue 'work'"),
        ("expired", "expired", "its time to live ran out in queue 'work'"),
        ("delivery_limit", "worker_lost", "as often as its delivery limit allows"),
        ("maxlen", "rejected", "queue 'work' was full and rejected it"),
        ("of_the_future", "rejected", "the broker took it out of queue 'work'"),
    ],
)
def test_the_brokers_word_becomes_a_reason(word: str, reason: str, said: str) -> None:
    """And the text says the word, the queues, the count and the time."""
    document = read(a_dead_message(died(reason=word)))

    assert document["reason"] == document["attempt"]["reason"] == reason
    assert document["exception"] == "DeadLettered"
    assert said in document["message"]
    assert (
        f"({word} once, first at 2026-11-24T19:19:04+00:00; found in 'dead')"
        in document["message"]
    )


def test_a_limit_that_the_app_declares_is_said() -> None:
    """RabbitMQ itself does not tell it."""
    message = a_dead_message(died(reason="delivery_limit"))

    document = read(message, limits={"work": 2})

    assert "as often as its delivery limit of 2 allows" in document["message"]


def test_the_first_death_counts_and_not_the_last() -> None:
    """A retry through a queue with a TTL has died of that too."""
    document = read(
        a_dead_message(
            died("wait", "expired", count=3),
            died("work", count=3, **{"routing-keys": ["orders.new"], "exchange": "x"}),
        )
    )

    assert document["reason"] == "rejected"
    assert document["queue"] == "work"
    assert (document["exchange"], document["routing_key"]) == ("x", "orders.new")
    assert "rejected 3 times" in document["message"]


def test_of_two_deaths_in_one_queue_the_last_counts() -> None:
    """Rejected first, and then delivered too often: that is what ended it."""
    document = read(
        a_dead_message(
            died("work", "delivery_limit"),
            died("wait", "expired"),
            died("work", "rejected"),
        )
    )

    assert document["reason"] == "worker_lost"
    assert document["queue"] == "work"


@pytest.mark.parametrize("prefix", ["", "eu_"])
def test_a_delay_is_no_death(prefix: str) -> None:
    """A task with a countdown has died in each queue of native delayed delivery."""
    key = "0." * 26 + "1.1.work"
    delays = [{**delay, "queue": prefix + str(delay["queue"])} for delay in DELAYS]
    death = died(
        "work",
        **{"exchange": f"{prefix}celery_delayed_delivery", "routing-keys": [key]},
    )

    document = read(a_dead_message(death, *delays))

    assert document["reason"] == "rejected"
    assert document["queue"] == document["routing_key"] == "work"
    assert document["exchange"] == ""


def test_behind_delays_the_oldest_death_counts() -> None:
    """`x-first-death-queue` is a delay's then."""
    document = read(
        a_dead_message(
            died("work", count=2, time=naive(2026, 1, 1)),
            died("wait", "expired", time=naive(2026, 1, 2)),
            *DELAYS,
        )
    )

    assert document["queue"] == "work"


def test_without_x_death_the_first_death_counts() -> None:
    """Where somebody has taken the table away."""
    names = {"queue": "work", "reason": "expired", "exchange": "x"}
    headers = {f"x-first-death-{name}": value for name, value in names.items()}
    headers |= {f"x-last-death-{name}": f"{value}2" for name, value in names.items()}

    document = read(a_dead_message(headers=headers))

    assert (document["queue"], document["reason"]) == ("work", "expired")


# --- where ----------------------------------------------------------------------------


def test_the_original_is_the_message_as_it_was_sent() -> None:
    """Byte for byte, with its headers, from the queue where it died."""
    message = a_dead_message(died())

    document = read(message)
    original = unpack(document["original"])

    assert original.body == message.body
    assert original.headers == {
        **message.headers,
        # py-amqp does not say that it is UTC.
        "x-death": [died()],
    }
    assert original.properties == message.properties
    assert (original.queue, original.exchange, original.routing_key) == (
        *("work", "", "work"),
    )
    assert document["failed_queue"] == DEAD
    assert document["failed_at"] == DIED.replace(tzinfo=UTC).timestamp()


def test_without_a_death_the_message_tells_where_it_was_sent() -> None:
    """Redis and the filesystem transport have no dead-lettering: somebody moved it."""
    document = read(a_dead_message(routing_key="work"))

    assert document["reason"] == "manual"
    assert (document["queue"], document["routing_key"]) == ("work", "work")
    assert "nothing tells how it came there" in document["message"]
    assert document["failed_at"] == NOW


def test_an_exchange_is_looked_up_among_the_apps_queues() -> None:
    """A topic exchange's routing key is no queue."""
    message = a_dead_message(exchange="orders", routing_key="new")

    document = read(message, bindings={("orders", "new"): "work"})

    assert document["queue"] == "work"
    assert (document["exchange"], document["routing_key"]) == ("orders", "new")


@pytest.mark.parametrize("exchange", ["", "orders"])
def test_a_message_that_was_sent_to_the_dead_letter_queue_goes_home(
    exchange: str,
) -> None:
    """Else its replay would come back as another failure."""
    message = a_dead_message(exchange=exchange, routing_key=DEAD)

    document = read(message, bindings={("orders", DEAD): DEAD})

    assert document["queue"] == document["routing_key"] == "home of shop.ship"
    assert document["exchange"] == ""


def test_a_failed_queue_of_the_brokers_is_a_filter() -> None:
    """`failed list --failed-queue dead`."""
    assert read(a_dead_message(died(), queue="other"))["failed_queue"] == "other"


# --- what -----------------------------------------------------------------------------


def a_body(*call: Any, **embedded: Any) -> bytes:
    """Of protocol 2."""
    return json.dumps([*call, embedded]).encode()


def test_the_call_is_shown_redacted() -> None:
    """By the names of the task's own arguments, which are not in the message."""
    message = a_dead_message(
        died(),
        body=a_body(["me", "hunter2"], {"card": "4111", "note": "x"}),
        headers={"retries": 2, "root_id": "r", "parent_id": "p"},
    )

    document = read(message, tasks={"shop.ship": (["user", "pin"], ["pin", "card"])})

    assert document["args"] == "('me', '***')"
    assert document["kwargs"] == "{'card': '***', 'note': 'x'}"
    assert document["arguments"]["user"] == "'me'"
    assert document["attempt_number"] == 3
    assert (document["root_id"], document["parent_id"]) == ("r", "p")


def test_arguments_of_an_unknown_task_are_not_shown() -> None:
    """Nobody knows which of them are secret; nor are the sender's own texts shown."""
    message = a_dead_message(
        died(),
        body=a_body(["hunter2"], {}),
        headers={"task": "of.another.app", "argsrepr": "('hunter2',)"},
    )
    document = read(message)

    assert document["task"] == "of.another.app"
    assert "hunter2" not in json.dumps({**document, "original": None})
    assert b"hunter2" in unpack(document["original"]).body


class Dangerous:
    """Tells on whoever unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (pickle.dumps([[Dangerous()], {}, {}]), "application/x-python-serialize"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"[1, 2]", "application/json"),
        (b"{}", None),
        (b"[[7], {}, {}]", "application/x-yaml"),
    ],
    ids=["pickle", "no text", "nested", "no call", "no type", "yaml"],
)
def test_a_body_that_cannot_be_read_is_kept(
    body: bytes, content_type: str | None
) -> None:
    """With the broker's reason, and never unpickled."""
    message = a_dead_message(died(), body=body, content_type=content_type)

    document = read(message)

    assert (document["reason"], document["task"]) == ("rejected", "shop.ship")
    assert (document["args"], document["kwargs"]) == ("", "")
    assert unpack(document["original"]).body == body


def test_chain_and_chord_are_known() -> None:
    """`failed show` says what a replay goes on with, and what it does not."""
    body = a_body([], {}, chain=[{}, {}], chord={"task": "t"})

    document = read(a_dead_message(died(), body=body))

    assert (document["chain_length"], document["in_chord"]) == (2, True)


def test_values_that_kombu_tags_are_shown_as_their_text() -> None:
    """As the task would see them, more or less."""
    tagged = {"__type__": "datetime", "__value__": "2026-01-01T00:00:00"}

    document = read(a_dead_message(died(), body=a_body([tagged], {})))

    assert document["args"] == "('2026-01-01T00:00:00',)"


def test_a_message_of_protocol_1_has_its_call_in_the_body() -> None:
    """As Celery 3 sent it."""
    body = {"task": "shop.ship", "id": "i", "args": [7], "kwargs": {}, "retries": 1}
    message = a_dead_message(died(), body=json.dumps(body).encode())
    for name in a_message().headers:
        del message.headers[name]

    document = read(message)

    assert (document["task"], document["task_id"]) == ("shop.ship", "i")
    assert (document["args"], document["attempt_number"]) == ("(7,)", 2)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"hello"),
        ({}, b'{"hello": "world"}'),
        ({"task": "t"}, b"[[], {}, {}]"),
        ({"task": 5, "id": "i"}, b"[[], {}, {}]"),
        ({"task": "t", "id": ["i"]}, b"[[], {}, {}]"),
        ({}, b'{"task": "t"}'),
    ],
    ids=["text", "json", "no id", "task no text", "id no text", "no id in body"],
)
def test_what_is_no_task_message_is_malformed(
    headers: Mapping[str, Any], body: bytes
) -> None:
    """Another system's; kept byte for byte, with the queue where it died."""
    message = a_message(body=body, headers={**headers, "x-death": [died()]}, queue=DEAD)

    document = read(message)

    assert document["reason"] == "malformed"
    assert document["message"] == "found on 'dead': it is no task message"
    assert (document["queue"], document["failed_queue"]) == ("work", DEAD)
    assert unpack(document["original"]).body == body


# --- one death, one failure -----------------------------------------------------------


def test_a_death_that_is_taken_twice_is_one_capture() -> None:
    """Killed between commit and ack, the message comes again, redelivered."""
    first, again = (
        read(a_dead_message(died(), redelivered=redelivered))
        for redelivered in (False, True)
    )

    assert first == again


@pytest.mark.parametrize(
    "change",
    [
        {"count": 2},
        {"time": naive(2026, 11, 24, 19, 19, 5)},
        {"reason": "expired"},
        {"queue": "work2"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_death_is_another_capture(change: dict[str, Any]) -> None:
    """Of the same task, which somebody has sent again."""
    first, second = read(a_dead_message(died())), read(a_dead_message(died(**change)))

    assert first["id"] == second["id"]
    assert first["capture"] != second["capture"]


def test_a_replay_that_dies_is_another_capture_of_its_record() -> None:
    """It carries the record's id and its own number."""
    marks = replay_mark("r" * 32, "t", 2)

    document = read(a_dead_message(died(), headers={HEADER: marks}))

    assert (document["id"], document["replay_number"]) == ("r" * 32, 2)
    assert document["token"] == "t"
    assert document["capture"] != read(a_dead_message(died()))["capture"]


def test_a_tag_for_life_is_an_identity() -> None:
    """A virtual transport writes it at the publish, and keeps it."""
    same = [
        read(a_dead_message(routing_key="work", properties={"delivery_tag": "t" * 36}))
        for _ in range(2)
    ]
    other = a_dead_message(routing_key="work", properties={"delivery_tag": "u" * 36})

    assert same[0]["capture"] == same[1]["capture"] != read(other)["capture"]


def test_without_an_identity_a_redelivery_is_told_by_its_flag() -> None:
    """A message on RabbitMQ without a death: the broker says that it comes again."""
    documents = [read(a_dead_message(redelivered=again)) for again in (False, True)]

    assert documents[0]["capture"] != documents[1]["capture"]
    assert [document["redelivered"] for document in documents] == [False, True]


def test_a_death_that_was_not_the_only_one_is_dated_when_it_is_found() -> None:
    """RabbitMQ keeps the time of the first, which is older than other failures."""
    assert read(a_dead_message(died(count=2)))["failed_at"] == NOW


# --- SQS ------------------------------------------------------------------------------


def an_sqs_message(**changes: Any) -> OriginalMessage:
    """
    A message from a redrive queue, as kombu's SQS transport makes it.

    Source: kombu 5.7, ``SQS/__init__.py:1629``; the attributes are SQS's own.
    """
    sqs = {
        "MessageId": "2f6d3b2e-9f0c-4c53-a7a9-1f0f6a3b8f11",
        "ReceiptHandle": changes.pop("receipt", "AQEB" + "x" * 300),
        "MD5OfBody": "0" * 32,
        "Body": "the body once more",
        "Attributes": {"ApproximateReceiveCount": "4"} | changes.pop("attributes", {}),
    }
    info = {
        "exchange": "",
        "routing_key": changes.get("routing_key", "work"),
        "sqs_message": sqs,
        "sqs_queue": "https://sqs.eu-west-1.amazonaws.com/123456789012/dead",
    }
    properties = {
        "correlation_id": "task-1",
        "delivery_tag": sqs["ReceiptHandle"],
        "delivery_info": info,
    }
    parts = {"queue": DEAD, "routing_key": "work", "properties": properties, **changes}
    return a_message(**parts)


def test_a_redriven_message_was_received_too_often() -> None:
    """Its worker died with it, again and again, or never deleted it."""
    document = read(an_sqs_message())

    assert document["reason"] == "worker_lost"
    assert document["queue"] == "work"
    assert document["message"] == (
        "SQS moved it from queue 'work' to 'dead', for it was received too often "
        "(ApproximateReceiveCount 4)"
    )


def test_sqs_may_tell_the_queue_by_its_arn() -> None:
    """For a message that kombu did not send; it must be asked for."""
    arn = "arn:aws:sqs:eu-west-1:123456789012:orders"
    message = an_sqs_message(
        attributes={"DeadLetterQueueSourceArn": arn}, routing_key=""
    )

    document = read(message)

    assert document["queue"] == "orders"
    assert arn in document["message"]


def test_sqs_gives_another_receipt_at_each_delivery() -> None:
    """One record and one capture all the same, of a foreign message too."""
    for headers in (a_message().headers, {}):
        documents = [
            read(an_sqs_message(receipt=receipt * 300, headers=headers))
            for receipt in "ab"
        ]
        assert documents[0]["id"] == documents[1]["id"]
        if headers:
            assert documents[0]["capture"] == documents[1]["capture"]


def test_the_body_is_not_kept_twice() -> None:
    """SQS's own message lies beside kombu's."""
    assert "the body once more" not in json.dumps(read(an_sqs_message()))


@pytest.mark.parametrize("sqs", [{}, {"Attributes": 5}, {"Attributes": {}}])
def test_sqs_may_tell_nothing(sqs: Mapping[str, Any]) -> None:
    """It gives what it is asked for, and kombu asks for little."""
    message = an_sqs_message()
    message.properties["delivery_info"]["sqs_message"] = sqs

    assert read(message)["message"].endswith("received too often")


# --- anything at all ------------------------------------------------------------------

_anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([HOSTILE_TEXT, DIED, datetime(1, 1, 1, tzinfo=UTC)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*died(), "task", "id", "retries", "__type__", "__value__"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(
    headers=st.dictionaries(
        st.sampled_from([*a_dead_message().headers, "x-last-death-queue", HEADER]),
        _anything,
    ),
    properties=st.dictionaries(
        st.sampled_from(["delivery_info", "delivery_tag", "priority"]), _anything
    ),
    body=_anything.map(lambda value: json.dumps(value, default=str).encode()),
)
def test_no_message_stops_the_collector(
    headers: dict[str, Any], properties: dict[str, Any], body: bytes
) -> None:
    """Whatever anybody has put there, it is kept, byte for byte."""
    message = a_message(
        headers=headers, properties=properties, body=body, queue=DEAD, routing_key=DEAD
    )

    document = read(message)

    assert unpack(document["original"]).body == body
    assert document["failed_queue"] == DEAD


# --- a store that does not keep -------------------------------------------------------


def test_the_pause_grows_to_its_limit() -> None:
    """20 deliveries, RabbitMQ 4's limit, take more than half a day."""
    pauses = [pause_s(failures) for failures in range(1, 20)]

    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert max(pauses) == LONGEST_PAUSE_S
    assert sum(pauses) > 0.4 * 86_400
    assert pause_s(0) == 0.0
    assert pause_s(10_000) == LONGEST_PAUSE_S
