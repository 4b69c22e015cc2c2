"""The document of one failed task: on the failed queue, in the spool, in an export.

Policy only: no Celery, no I/O, no clock of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from math import isfinite
from typing import Any
from uuid import UUID, uuid4

from celery_resilience.failure import Failure, fingerprint_of
from celery_resilience.message import (
    HEADER,
    OriginalMessage,
    id_text,
    is_of_delivery,
    replay_of,
)
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.packing import escaped, pack, tagged, untagged
from celery_resilience.trace_ids import trace_id_of

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
    replay = replay_of(settlement.marks)
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
        "trace_id": settlement.trace_id or trace_id_of(original.headers),
        "sentry_event_id": settlement.facts.get("sentry_event_id"),
        "idempotency_key": settlement.idempotency_key,
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
    replay = replay_of(settlement.marks)
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


def foreign(
    original: OriginalMessage,
    *,
    why: str,
    namespace: str,
    at: float,
    found_on: str | None = None,
) -> dict[str, Any]:
    """
    The envelope of something that is none, nor a task message, and why not.

    Args:
        found_on: The dead-letter queue where it was; None: a failed queue, from
            which it comes.
    """
    where = "a failed queue" if found_on is None else repr(found_on)
    text = f"found on {where}: {why}"
    task = original.headers.get("task")
    settlement = Settlement(
        outcome=Outcome.FAILED,
        reason=Reason.MALFORMED,
        task=task if isinstance(task, str) else "",
        task_id=id_text(original.headers.get("id")),
        queue=original.queue,
        worker="",
        failure=Failure("InvalidTaskError", text, fingerprint_of("foreign")),
    )
    return envelope(
        settlement,
        original,
        namespace=namespace,
        failed_queue=found_on or original.queue,
        at=at,
    )


def record_id(namespace: str, settlement: Settlement, original: OriginalMessage) -> str:
    """
    The record of a message: the same for its redelivery, another for another.

    By the task's id; without one by the transport's own tag, which a virtual
    transport keeps over a redelivery; without that no two are one.
    """
    if settlement.task_id:
        return task_record_id(namespace, settlement.task_id)
    tag = original.properties.get("delivery_tag")
    if isinstance(tag, str) and len(tag) >= 32:
        return _digest(namespace, f"tag\0{tag}")
    return _digest(namespace, f"new\0{uuid4().hex}")


def task_record_id(namespace: str, task_id: str) -> str:
    """The record of every message with a task id."""
    return _digest(namespace, f"task\0{task_id}")


def message_name(packed: Mapping[str, Any]) -> str:
    """
    What tells one message of a task id from another, and not from its redelivery.

    The tag that kombu's Redis, filesystem and database transports keep over a
    redelivery. AMQP has none: there, messages with the same bytes and headers are
    taken for one.

    Args:
        packed: The message as part of a document.
    """
    tag = packed["properties"].get("delivery_tag")
    if isinstance(tag, str) and len(tag) == len(str(UUID(int=0))):
        return tag
    own = {
        name: value
        for name, value in packed["headers"].items()
        if not is_of_delivery(name) and name != HEADER
    }
    return _digest(packed["body"], json.dumps(own, default=str, sort_keys=True))


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
    safe = {
        name: escaped(value) if name in ("arguments", "original") else value
        for name, value in document.items()
    }
    return json.dumps(safe, default=tagged, separators=(",", ":")).encode()


def loads(data: bytes | str) -> dict[str, Any]:
    """
    A document from bytes.

    Raises:
        ValueError: It is not a document of ours, or of a later schema.
    """
    try:
        document: Any = json.loads(data, object_hook=untagged)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as exc:
        raise ValueError(f"not an envelope: {exc}") from exc
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError("not an envelope")
    found: dict[str, Any] = document
    if document.get("schema") != SCHEMA:
        raise ValueError(f"an envelope of schema {document.get('schema')!r}")
    wrong = wrong_fields(document, FIELDS[kind])
    if not wrong and not re.fullmatch(r"[!-~]{1,32}", document["id"]):
        wrong = ["id"]
    if wrong:
        raise ValueError(f"an envelope with a wrong {', '.join(wrong)}")
    return found


def iso(at: float | None) -> str | None:
    """Wall time in seconds as ISO 8601 in UTC."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()


def _digest(namespace: str, identity: str) -> str:
    data = f"{namespace}\0{identity}".encode(errors="replace")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def wrong_fields(document: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """
    The names of fields that are missing, or not of their type.

    Args:
        fields: Types by name; in a mapping, those of a part.
    """
    wrong = []
    for name, types in fields.items():
        value = document.get(name, _MISSING)
        if isinstance(types, Mapping):
            inner = value if isinstance(value, Mapping) else {}
            wrong += [f"{name}.{part}" for part in wrong_fields(inner, types)]
        elif (
            not isinstance(value, types)
            or value is _MISSING
            or (types is int and not 0 <= value <= LARGEST_COUNT)
            or (isinstance(value, float) and not isfinite(value))
        ):
            wrong.append(name)
    return wrong


_MISSING = object()

#: What every store takes as a whole number.
LARGEST_COUNT = 2**31 - 1

_TEXT, _OPTIONAL_TEXT = str, (str, type(None))
_NUMBER, _OPTIONAL_NUMBER = (int, float), (int, float, type(None))

#: What a document must hold, by its kind: types, and what is in its parts.
FIELDS: Mapping[str, Mapping[str, Any]] = {
    FAILED: {
        **dict.fromkeys(
            (
                *("capture", "id", "app", "reason", "task", "task_id", "queue"),
                *("exchange", "routing_key", "failed_queue", "exception", "message"),
                *("traceback", "fingerprint", "args", "kwargs"),
            ),
            _TEXT,
        ),
        **dict.fromkeys(
            (
                *("token", "root_id", "parent_id", "content_type", "release"),
                *("trace_id", "sentry_event_id", "idempotency_key"),
            ),
            _OPTIONAL_TEXT,
        ),
        **dict.fromkeys(("attempt_number", "replay_number", "chain_length"), int),
        "arguments": dict,
        "attempt": {
            **dict.fromkeys(("at", "worker", "reason", "exception", "message"), _TEXT),
            **dict.fromkeys(("pid", "runtime_s"), _OPTIONAL_NUMBER),
        },
        "redelivered": bool,
        "failed_at": _NUMBER,
        "in_chord": bool,
        "priority": object,
        "body_kib": _NUMBER,
        "original": {
            **dict.fromkeys(("body", "exchange", "routing_key", "queue"), _TEXT),
            **dict.fromkeys(("content_type", "content_encoding"), _OPTIONAL_TEXT),
            **dict.fromkeys(("headers", "properties"), dict),
        },
    },
    SETTLED: {
        **dict.fromkeys(("id", "task", "outcome"), _TEXT),
        **dict.fromkeys(("reason", "token"), _OPTIONAL_TEXT),
        "replay_number": int,
        "settled_at": _NUMBER,
    },
}
