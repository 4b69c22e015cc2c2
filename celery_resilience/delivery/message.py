"""A message as the broker handed it over, and the copy of it that is sent again.

Plain data: no Celery, no kombu, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

#: The one header of ours. Celery copies unknown headers to retries, so
#: everything that we write on a message is below it.
HEADER = "resilience"

#: Headers that tell of a message's past deliveries, not of the task.
DELIVERY_HEADERS = frozenset(
    {
        "redelivered",
        "x-acquired-count",
        "x-death",
        "x-delivery-count",
        "x-first-death-exchange",
        "x-first-death-queue",
        "x-first-death-reason",
        "x-last-death-exchange",
        "x-last-death-queue",
        "x-last-death-reason",
    }
)

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
    """One message, byte for byte, with the queue it came from."""

    body: bytes
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str | None
    content_encoding: str | None
    exchange: str
    routing_key: str
    queue: str
    redelivered: bool = False

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
            headers={
                k: v for k, v in self.headers.items() if k not in DELIVERY_HEADERS
            },
            properties={
                k: v
                for k, v in self.properties.items()
                if k not in TRANSPORT_PROPERTIES
            },
            redelivered=False,
        )

    def due_at(self, at: datetime | None) -> OriginalMessage:
        """The message, to be run not before *at*."""
        eta = None if at is None else at.astimezone(UTC).isoformat()
        return replace(self, headers={**self.headers, "eta": eta})


def marks_of(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our own marks on a message with these headers; {} when there are none."""
    marks = (headers or {}).get(HEADER)
    return marks if isinstance(marks, dict) else {}


def body_bytes(body: Any, content_encoding: str | None) -> bytes:
    """
    The bytes of a body as it was published.

    py-amqp decodes a body with a text encoding (``amqp/channel.py:52``), and
    the threads and solo pools may hand over a buffer.
    """
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        try:
            return body.encode(content_encoding or "utf-8")
        except (LookupError, UnicodeEncodeError):
            return body.encode(errors="surrogateescape")
    return b"" if body is None else bytes(body)


def original_message(message: Any, queue: str) -> OriginalMessage:
    """
    The original of a kombu message, taken before anything happens to it.

    Args:
        message: A `kombu.message.Message` of any transport.
        queue: The queue that it was taken from.
    """
    info = message.delivery_info or {}
    return OriginalMessage(
        body=body_bytes(message.body, message.content_encoding),
        headers=dict(message.headers or {}),
        properties=dict(message.properties or {}),
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        exchange=info.get("exchange") or "",
        routing_key=info.get("routing_key") or "",
        queue=queue,
        redelivered=bool(info.get("redelivered")),
    )
