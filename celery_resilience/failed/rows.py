"""What a row of a failed task means, in whatever store it is."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from celery_resilience.failed.envelope import dumps, loads
from celery_resilience.failed.merge import Record
from celery_resilience.failed.record import (
    FailedTask,
    Phase,
    State,
    Summary,
    tried_again,
)
from celery_resilience.failed.store import Claim, Kept
from celery_resilience.packing import unpack
from celery_resilience.redaction import cut, storable

#: Characters of a message that a list and its filter see; the document has all.
LISTED_MESSAGE_CHARS = 500

#: The reason of a success that was collected before the failure it makes void.
GHOST = ""

#: Seconds that it waits for that failure.
GHOST_S = 3_600.0

#: Characters of a task id that are enough to look for it.
SHORTEST_START = 4

#: Names in a count by task, reason or exception.
TOP = 20

#: The columns that may be large, and what the others and the indexes take besides:
#: in bytes, as measured on Redis, which is the most.
LARGE = ("document", "attempts", "arguments")
ROW_BYTES = 2_500

#: The columns that each of these reads.
RECORD = (
    *("id", "state", "document", "attempts", "number", "token", "phase"),
    *("settled_at", "note"),
)
SUMMARY = (
    *("id", "state", "reason", "task", "task_id", "queue", "failed_queue"),
    *("exception", "message", "fingerprint", "worker", "release"),
    *("first_failed_at", "last_failed_at", "replays", "phase", "note"),
)
TASK = (*SUMMARY, "document", "attempts", "replayed_as")
KEPT = (
    *(*RECORD, "replays", "replayed_as", "copy", "claimed_at", "to_queue"),
    *("wants_new_id", "is_forced", "size"),
)
CLAIM = (
    *("id", "token", "number", "task", "task_id", "reason", "to_queue"),
    *("wants_new_id", "is_forced", "in_chord", "document"),
)


def record_of(row: Any) -> Record:
    """A record, as far as documents change it, from its row."""
    return Record(
        id=row.id,
        state=State(row.state),
        document=None if row.document is None else unpacked(row.document),
        attempts=tuple(json.loads(row.attempts)),
        number=row.number,
        token=row.token,
        phase=None if row.phase is None else Phase(row.phase),
        settled_at=row.settled_at,
        note=row.note,
    )


def row_of(record: Record) -> dict[str, Any]:
    """The columns that a record fills, without its namespace."""
    document = record.document or {}
    failed_at = document.get("failed_at", record.settled_at)
    first = record.attempts[0]["_failed_at"] if record.attempts else failed_at
    attempt = document.get("attempt", {})

    def text(name: str, limit: int) -> str:
        return storable(document.get(name, ""))[:limit]

    row = {
        "id": record.id,
        "state": record.state,
        "phase": record.phase,
        "token": record.token,
        "number": record.number,
        "settled_at": record.settled_at,
        "note": record.note,
        "reason": text("reason", 32) or GHOST,
        "task": text("task", 255),
        "task_id": text("task_id", 255),
        "queue": text("queue", 255),
        "failed_queue": text("failed_queue", 255),
        "exception": text("exception", 255),
        "message": cut(storable(document.get("message", "")), LISTED_MESSAGE_CHARS),
        "fingerprint": text("fingerprint", 16),
        "worker": storable(attempt.get("worker", ""))[:255],
        "release": text("release", 255) if document.get("release") else None,
        "first_failed_at": first,
        "last_failed_at": failed_at,
        "in_chord": bool(document.get("in_chord")),
        "arguments": json.dumps(document.get("arguments", {})),
        "attempts": json.dumps(record.attempts),
        "document": _packed(document) if document else None,
    }
    size = ROW_BYTES + sum(len(row[name] or b"") for name in LARGE)
    return {**row, "size": size}


def kept_of(row: Any) -> Kept:
    """All of a failed task, from its row."""
    return Kept(
        record=record_of(row),
        replays=row.replays,
        replayed_as=row.replayed_as,
        copy=row.copy,
        claimed_at=row.claimed_at,
        to_queue=row.to_queue,
        wants_new_id=bool(row.wants_new_id),
        is_forced=bool(row.is_forced),
        size=row.size,
    )


def row_of_kept(kept: Kept) -> dict[str, Any]:
    """All columns of a failed task, without its namespace."""
    return {
        **row_of(kept.record),
        "replays": kept.replays,
        "replayed_as": kept.replayed_as,
        "copy": kept.copy,
        "claimed_at": kept.claimed_at,
        "to_queue": kept.to_queue,
        "wants_new_id": kept.wants_new_id,
        "is_forced": kept.is_forced,
    }


def summary_of(row: Any) -> Summary:
    """A summary from its row."""
    values = {name: getattr(row, name) for name in SUMMARY}
    values["state"] = State(values["state"])
    values["phase"] = None if values["phase"] is None else Phase(values["phase"])
    return Summary(**values)


def task_of(row: Any) -> FailedTask:
    """A failed task from its row; what is ours of its attempts is left out."""
    document = unpacked(row.document)
    attempts = [
        {k: v for k, v in attempt.items() if not k.startswith("_")}
        for attempt in json.loads(row.attempts)
    ]
    attempts[-1:-1] = tried_again(document)
    return FailedTask(
        summary=summary_of(row),
        document=document,
        attempts=attempts,
        replayed_as=row.replayed_as,
    )


def claim_of(row: Any) -> Claim:
    """A claim from its row."""
    document = unpacked(row.document)
    return Claim(
        id=row.id,
        token=row.token,
        number=row.number,
        task=row.task,
        task_id=row.task_id,
        reason=row.reason,
        to_queue=row.to_queue,
        wants_new_id=bool(row.wants_new_id),
        is_forced=bool(row.is_forced),
        in_chord=bool(row.in_chord),
        original=unpack(document["original"]),
        key=document["idempotency_key"],
    )


def _packed(document: Mapping[str, Any]) -> bytes:
    return zlib.compress(dumps(document), 1)


def unpacked(data: bytes) -> dict[str, Any]:
    """An envelope from its column."""
    return loads(zlib.decompress(data))
