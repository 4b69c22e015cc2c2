"""The document of one failed task: on the failed queue, in the spool, in an export.

Policy only: no Celery, no I/O, no clock of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from celery_resilience.delivery.failure import Failure, fingerprint_of
from celery_resilience.delivery.message import HEADER, OriginalMessage
from celery_resilience.delivery.outcome import Outcome, Reason, Settlement
from celery_resilience.redaction import safe_text

SCHEMA = 1
CONTENT_TYPE = "application/json"

#: Kinds of documents on a failed queue.
FAILED = "failed"
SETTLED = "settled"


def envelope(
    settlement: Settlement,
    original: OriginalMessage,
    *,
    namespace: str,
    failed_queue: str,
    at: float,
    release: str | None = None,
) -> dict[str, Any]:
    """
    The envelope of a failed delivery.

    Args:
        settlement: Of outcome failed or revoked, with its failure.
        original: The message, byte for byte.
        namespace: The app's.
        failed_queue: Where the envelope goes.
        at: Wall time of the failure, in seconds.
        release: The app's release.
    """
    failure = settlement.failure
    assert failure is not None
    replay = settlement.marks.get("replay") or {}
    return {
        "schema": SCHEMA,
        "kind": FAILED,
        "capture": uuid4().hex,
        "id": replay.get("record") or record_id(namespace, settlement, original),
        "app": namespace,
        "reason": str(settlement.reason),
        "task": settlement.task,
        "task_id": settlement.task_id,
        "queue": original.queue,
        "exchange": original.exchange,
        "routing_key": original.routing_key,
        "failed_queue": failed_queue,
        "exception": failure.exception,
        "message": failure.message,
        "traceback": failure.traceback,
        "fingerprint": failure.fingerprint,
        "args": settlement.args,
        "kwargs": settlement.kwargs,
        "arguments": dict(settlement.arguments),
        "attempt": {
            "at": iso(at),
            "worker": settlement.worker,
            "pid": settlement.pid,
            "reason": str(settlement.reason),
            "exception": failure.exception,
            "message": failure.message,
            "runtime_s": settlement.run_s,
        },
        "attempt_number": settlement.attempt,
        "replay_number": int(replay.get("number", 0)),
        "token": replay.get("token"),
        "redelivered": original.redelivered,
        "failed_at": at,
        "root_id": settlement.root_id,
        "parent_id": settlement.parent_id,
        "in_chord": settlement.in_chord,
        "chain_length": settlement.chain_length,
        "priority": original.properties.get("priority"),
        "content_type": original.content_type,
        "body_kib": round(len(original.body) / 1024, 1),
        "release": release,
        "trace_id": trace_id(original.headers),
        "sentry_event_id": settlement.facts.get("sentry_event_id"),
        "idempotency_key": settlement.facts.get("idempotency_key"),
        "original": pack(original),
    }


def settled(
    settlement: Settlement,
    original: OriginalMessage,
    *,
    namespace: str,
    failed_queue: str,
    at: float,
) -> dict[str, Any]:
    """
    What the collector must hear of a delivery that did not fail.

    A replay's success resolves its record. So does the success of a message
    that was delivered again after its failure was captured and before its ack.
    """
    replay = settlement.marks.get("replay") or {}
    return {
        "schema": SCHEMA,
        "kind": SETTLED,
        "capture": uuid4().hex,
        "id": replay.get("record") or record_id(namespace, settlement, original),
        "app": namespace,
        "task": settlement.task,
        "task_id": settlement.task_id,
        "failed_queue": failed_queue,
        "outcome": str(settlement.outcome),
        "reason": settlement.reason,
        "replay_number": int(replay.get("number", 0)),
        "token": replay.get("token"),
        "settled_at": at,
        "worker": settlement.worker,
    }


def foreign(original: OriginalMessage, *, namespace: str, at: float) -> dict[str, Any]:
    """The envelope of something on a failed queue that is not one."""
    text = "found on a failed queue, and not an envelope"
    task, task_id = original.headers.get("task"), original.headers.get("id")
    settlement = Settlement(
        outcome=Outcome.FAILED,
        reason=Reason.MALFORMED,
        task=task if isinstance(task, str) else "",
        task_id=task_id if isinstance(task_id, str) else "",
        queue=original.queue,
        worker="",
        failure=Failure("InvalidTaskError", text, fingerprint_of(text)),
    )
    return envelope(
        settlement,
        original,
        namespace=namespace,
        failed_queue=original.queue,
        at=at,
    )


def record_id(namespace: str, settlement: Settlement, original: OriginalMessage) -> str:
    """
    The record of a message: the same for its redelivery, another for another.

    By the task's id; without one by the transport's own tag, which a virtual
    transport keeps over a redelivery; without that no two are one.
    """
    if settlement.task_id:
        return _digest(namespace, f"task\0{settlement.task_id}")
    tag = original.properties.get("delivery_tag")
    if isinstance(tag, str) and len(tag) >= 32:
        return _digest(namespace, f"tag\0{tag}")
    return _digest(namespace, f"new\0{uuid4().hex}")


def trace_id(headers: Mapping[str, Any]) -> str | None:
    """The W3C trace id that the sender wrote, if any (W3C Trace Context, 3.2)."""
    parts = str(headers.get("traceparent") or "").split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else None


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
    )


def posted(document: Mapping[str, Any]) -> OriginalMessage:
    """The message that carries a document to its failed queue."""
    return OriginalMessage(
        body=dumps(document),
        headers={HEADER: {"kind": document["kind"], "id": document["id"]}},
        properties={},
        content_type=CONTENT_TYPE,
        content_encoding="utf-8",
        exchange="",
        routing_key=document["failed_queue"],
        queue=document["failed_queue"],
    )


def dumps(document: Mapping[str, Any]) -> bytes:
    """A document as bytes; what JSON lacks is tagged with its type."""
    return json.dumps(document, default=_tag, separators=(",", ":")).encode()


def loads(data: bytes | str) -> dict[str, Any]:
    """
    A document from bytes.

    Raises:
        ValueError: It is not a document of ours, or of a later schema.
    """
    document = json.loads(data, object_hook=_untag)
    if not isinstance(document, dict) or document.get("kind") not in (FAILED, SETTLED):
        raise ValueError("not an envelope")
    if document.get("schema") != SCHEMA:
        raise ValueError(f"an envelope of schema {document.get('schema')!r}")
    return document


def iso(at: float | None) -> str | None:
    """Wall time in seconds as ISO 8601 in UTC."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()


def _digest(namespace: str, identity: str) -> str:
    data = f"{namespace}\0{identity}".encode(errors="replace")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _tag(value: Any) -> Any:
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


def _untag(value: dict[str, Any]) -> Any:
    if len(value) == 1:
        ((kind, text),) = value.items()
        if kind == "$datetime":
            return datetime.fromisoformat(text)
        if kind == "$bytes":
            return base64.b64decode(text)
        if kind == "$decimal":
            return Decimal(text)
    return value
