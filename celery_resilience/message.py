"""A message as the broker handed it over, and the copy of it that is sent again.

Plain data: no Celery, no kombu, no I/O.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from celery_resilience.trace_ids import is_traceparent, traceparent_of, without_trace

#: The one header of ours. Celery copies unknown headers to retries, so
#: everything that we write on a message is below it.
HEADER = "resilience"

#: The mark by which a message carries its idempotency key: it says nothing of a past.
KEY = "key"

#: The marks of a retry by a rule: what has failed before; and until when, or on which
#: budget, it waits. A task that was tried again has no past to report either.
RETRY = "retry"
RETRY_WAIT = "retry_wait"

#: The mark by which a message tells when it was sent, in wall seconds: no past either.
SENT_AT = "sent_at"

#: The marks that say nothing of a past.
_OF_NO_PAST = frozenset({KEY, RETRY, RETRY_WAIT, SENT_AT})

#: Wall seconds, and seconds of a delay, below which a date can be made of them.
MAX_TIME_S = 1e11

#: Characters of a key's name, and of the name of a process.
MAX_KEY = 255

#: Headers that tell of a message's past deliveries, not of the task; and those by
#: which RabbitMQ would send a copy to other queues too.
DELIVERY_HEADERS = frozenset(
    {"redelivered", "x-acquired-count", "x-death", "x-delivery-count", "CC", "BCC"}
)

#: How other such headers begin: RabbitMQ's, of its streams and AMQP 1.0 too.
DELIVERY_PREFIXES = (
    "x-first-death-",
    "x-last-death-",
    "x-opt-acquired",
    "x-opt-deaths",
    "x-opt-deliver",
)

#: The exchanges of RabbitMQ's native delayed delivery, whose names may have a
#: prefix, and the 28 levels before the routing key of a message that has passed
#: through them (``kombu/transport/native_delayed_delivery.py``, kombu 5.7).
_DELAYED_NAME = re.compile(r"(?:.+_)?celery_delayed_(?:\d+|delivery)")
_DELAYED_PREFIX = re.compile(r"^(?:[01]\.){28}")

#: Properties that the transport writes itself, or that belong to the arguments
#: of a publish.
TRANSPORT_PROPERTIES = frozenset(
    {
        "application_headers",
        "body_encoding",
        "content_encoding",
        "content_type",
        "delivery_info",
        "delivery_tag",
        "headers",
    }
)


@dataclass(frozen=True, slots=True)
class OriginalMessage:
    """
    One message, byte for byte, with the queue it came from.

    Attributes:
        is_broadcast: Its queue takes only what is told to all: nothing can be sent
            there for this worker alone.
    """

    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str | None
    content_encoding: str | None
    exchange: str
    routing_key: str
    queue: str
    redelivered: bool = False
    is_broadcast: bool = False

    @property
    def marks(self) -> dict[str, Any]:
        """What we wrote on the message ourselves."""
        return marks_of(self.headers)

    def marked(self, **marks: Any) -> OriginalMessage:
        """The message with *marks* added to ours; None takes a mark away."""
        merged = {**self.marks, **marks}
        kept = {name: value for name, value in merged.items() if value is not None}
        headers = {k: v for k, v in self.headers.items() if k != HEADER}
        if kept:
            headers[HEADER] = kept
        return replace(self, headers=headers)

    def without_past(self) -> OriginalMessage:
        """The message as if it had never been delivered before."""
        return replace(
            self,
            headers={k: v for k, v in self.headers.items() if not is_of_delivery(k)},
            properties={
                k: v
                for k, v in self.properties.items()
                if k not in TRANSPORT_PROPERTIES
            },
            redelivered=False,
        )

    def in_new_trace(self) -> OriginalMessage:
        """The message, to start a trace of its own, which is linked to the one it had."""
        traceparent = traceparent_of(self.headers)
        if traceparent is None:
            return self
        message = self.marked(trace=traceparent)
        return replace(message, headers=without_trace(message.headers))

    def due_at(self, at: datetime | None) -> OriginalMessage:
        """The message, to be run not before *at*."""
        eta = None if at is None else at.astimezone(UTC).isoformat()
        return replace(self, headers={**self.headers, "eta": eta})


def marks_of(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our own marks on a message with these headers; {} when there are none."""
    marks = (headers or {}).get(HEADER)
    if not isinstance(marks, dict):
        return {}
    # Anybody may write a header of that name.
    return {
        name: mark
        for name, mark in marks.items()
        if name not in _MARKS or _MARKS[name](mark)
    }


def has_past(headers: Mapping[str, Any]) -> bool:
    """Whether a message with these headers was replayed or sent again."""
    marks = headers.get(HEADER)
    return bool(marks) and not (isinstance(marks, dict) and marks.keys() <= _OF_NO_PAST)


def _is_count(mark: Any) -> bool:
    return isinstance(mark, int) and not isinstance(mark, bool) and mark >= 0


def _is_name(value: Any) -> bool:
    """What every store takes as the name of a record, a replay or a copy."""
    return isinstance(value, str) and 1 <= len(value) <= 32 and value.isascii()


def _is_replay(mark: Any) -> bool:
    return (
        isinstance(mark, dict)
        and all(_is_name(mark.get(k)) for k in ("record", "token", "copy"))
        and _is_count(mark.get("number"))
    )


#: Of a call's arguments; "" where they are not compared.
_FINGERPRINT = re.compile(r"(?:[0-9a-f]{32})?")


def _is_key(mark: Any) -> bool:
    return (
        isinstance(mark, list | tuple)
        and len(mark) == 2
        and all(isinstance(text, str) for text in mark)
        and 1 <= len(mark[0]) <= MAX_KEY
        and _FINGERPRINT.fullmatch(mark[1]) is not None
    )


def is_time(mark: Any) -> bool:
    """Whether *mark* is wall seconds, or a delay, of which a date can be made."""
    return (
        isinstance(mark, int | float)
        and not isinstance(mark, bool)
        and 0 <= mark < MAX_TIME_S
    )


def _is_retry(mark: Any) -> bool:
    return (
        isinstance(mark, dict)
        and is_time(mark.get("since"))
        and isinstance(mark.get("spent"), dict)
        and all(_is_count(count) for count in mark["spent"].values())
        and isinstance(mark.get("failures"), list | tuple)
        and all(
            isinstance(failure, list | tuple)
            and len(failure) == 4
            and _is_count(failure[0])
            and isinstance(failure[2], str)
            and is_time(failure[1])
            and is_time(failure[3])
            for failure in mark["failures"]
        )
    )


def _is_retry_wait(mark: Any) -> bool:
    return (
        isinstance(mark, dict)
        and is_time(mark.get("due", 0.0))
        and isinstance(mark.get("budget", "-"), str)
        and 1 <= len(mark.get("budget", "-")) <= MAX_KEY
    )


#: What each of our marks must be to count.
_MARKS: Mapping[str, Callable[[Any], bool]] = {
    "alone": lambda mark: isinstance(mark, bool),
    "crashed": lambda mark: isinstance(mark, str) and 1 <= len(mark) <= MAX_KEY,
    "crashed_at": is_time,
    "crashes": _is_count,
    "forced": lambda mark: isinstance(mark, bool),
    "key": _is_key,
    "redeliveries": _is_count,
    "replay": _is_replay,
    RETRY: _is_retry,
    RETRY_WAIT: _is_retry_wait,
    "sent": lambda mark: isinstance(mark, str) and mark != "",
    "sent_at": is_time,
    "snoozes": _is_count,
    "trace": is_traceparent,
    "unrecorded": _is_count,
    "waits_since": is_time,
}


def replay_of(marks: Mapping[str, Any]) -> dict[str, Any]:
    """The mark of a replay, or {}: record, token, copy and number."""
    mark: Any = marks.get("replay")
    found: dict[str, Any] = mark if _is_replay(mark) else {}
    return found


def is_of_delivery(header: str) -> bool:
    """Whether a header tells of a message's past deliveries, not of its task."""
    return header in DELIVERY_HEADERS or header.startswith(DELIVERY_PREFIXES)


def is_delay(name: str) -> bool:
    """Whether an exchange or a queue is one of native delayed delivery."""
    return _DELAYED_NAME.fullmatch(name) is not None


def undelayed(exchange: str, routing_key: str) -> tuple[str, str]:
    """Exchange and routing key without the marks of native delayed delivery."""
    if is_delay(exchange):
        return "", _DELAYED_PREFIX.sub("", routing_key)
    return exchange, routing_key


def text_of(value: Any) -> str:
    """A text, whatever a message says where there should be one."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def id_text(value: Any) -> str:
    """A task's id as text, or "": Celery takes a UUID or a number for one too."""
    if type(value) is str:  # for each delivery, several times
        return value
    is_id = isinstance(value, str | int | UUID) and not isinstance(value, bool)
    return str(value) if is_id else ""


def body_bytes(body: Any, content_encoding: str | None) -> bytes:
    """
    The bytes of a body as it was published.

    py-amqp decodes a body with a text encoding (``amqp/channel.py:52``), and
    the threads and solo pools may hand over a buffer.
    """
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        for encoding, errors in (
            (content_encoding or "utf-8", "strict"),
            ("utf-8", "surrogateescape"),
        ):
            # The encoding is what the message says; it may be anything.
            with contextlib.suppress(LookupError, TypeError, ValueError):
                return body.encode(encoding, errors)
        return body.encode(errors="surrogatepass")
    if isinstance(body, bytearray | memoryview):
        return bytes(body)
    # A virtual transport's own JSON may have any value in its place.
    return b"" if body is None else json.dumps(body, default=str).encode()


def foreign_message(body: bytes, queue: str) -> OriginalMessage:
    """What lay on a queue and has no headers, for it is no message of kombu's."""
    return OriginalMessage(
        body=body,
        headers={},
        properties={},
        content_type=None,
        content_encoding=None,
        exchange="",
        routing_key=queue,
        queue=queue,
    )


def original_message(message: Any, queue: str) -> OriginalMessage:
    """
    The original of a kombu message, taken before anything happens to it.

    Args:
        message: A `kombu.message.Message` of any transport.
        queue: The queue that it was taken from.
    """
    info = message.delivery_info or {}
    exchange, routing_key = undelayed(
        text_of(info.get("exchange")), text_of(info.get("routing_key"))
    )
    return OriginalMessage(
        body=body_bytes(message.body, message.content_encoding),
        headers=dict(message.headers or {}),
        properties=dict(message.properties or {}),
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        exchange=exchange,
        routing_key=routing_key,
        queue=queue,
        redelivered=bool(info.get("redelivered")),
    )
