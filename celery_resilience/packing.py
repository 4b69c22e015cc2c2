"""A message as JSON, byte for byte, with what JSON itself lacks.

Plain data: no Celery, no kombu, no I/O.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from celery_resilience.message import OriginalMessage
from celery_resilience.redaction import safe_text


def message_to_text(original: OriginalMessage) -> str:
    """A message as a text, for a store."""
    packed = escaped(pack(original))
    return json.dumps(packed, default=tagged, separators=(",", ":"))


def message_from_text(text: str) -> OriginalMessage:
    """
    The message of a text that `message_to_text` has made.

    Raises:
        ValueError: It is none.
    """
    try:
        return unpack(json.loads(text, object_hook=untagged))
    except (TypeError, KeyError, ArithmeticError, RecursionError) as exc:
        raise ValueError(f"not a message: {exc!r}") from exc


def pack(original: OriginalMessage) -> dict[str, Any]:
    """A message as part of a document."""
    return {
        "body": base64.b64encode(original.body).decode(),
        "headers": original.headers,
        "properties": original.properties,
        "content_type": original.content_type,
        "content_encoding": original.content_encoding,
        "exchange": original.exchange,
        "routing_key": original.routing_key,
        "queue": original.queue,
        "redelivered": original.redelivered,
        **({"is_broadcast": True} if original.is_broadcast else {}),
    }


def unpack(packed: Mapping[str, Any]) -> OriginalMessage:
    """The message of a document, byte for byte."""
    return OriginalMessage(
        body=base64.b64decode(packed["body"]),
        headers=dict(packed["headers"]),
        properties=dict(packed["properties"]),
        content_type=packed["content_type"],
        content_encoding=packed["content_encoding"],
        exchange=packed["exchange"],
        routing_key=packed["routing_key"],
        queue=packed["queue"],
        redelivered=bool(packed.get("redelivered")),
        is_broadcast=bool(packed.get("is_broadcast")),
    )


def escaped(value: Any) -> Any:
    """What a user wrote, so that `untagged` does not take it for a tag of ours."""
    if isinstance(value, Mapping):
        inner = {str(key): escaped(part) for key, part in value.items()}
        if len(inner) == 1 and next(iter(inner)).startswith("$"):
            return {"$dict": list(inner.items())}
        return inner
    if isinstance(value, list | tuple):
        return [escaped(part) for part in value]
    return value


def tagged(value: Any) -> Any:
    """What JSON lacks, as a mapping of one entry that names its type."""
    if isinstance(value, datetime | date):
        return {"$datetime": value.isoformat()}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, Decimal):
        return {"$decimal": str(value)}
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return safe_text(value)


def untagged(value: dict[str, Any]) -> Any:
    """What `tagged` and `escaped` have made a mapping of."""
    if len(value) == 1:
        ((kind, text),) = value.items()
        if kind == "$dict":
            return dict(text)
        if kind == "$datetime":
            return datetime.fromisoformat(text)
        if kind == "$bytes":
            return base64.b64decode(text)
        if kind == "$decimal":
            return Decimal(text)
    return value
