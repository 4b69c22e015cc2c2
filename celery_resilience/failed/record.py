"""A failed task as the store has it, and as the public JSON (schema 1) shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from celery_resilience.failed.envelope import SCHEMA, iso
from celery_resilience.message import RETRY, OriginalMessage
from celery_resilience.outcome import Reason
from celery_resilience.packing import unpack

#: The names of the public JSON, in their order.
FIELDS = (
    *("schema", "id", "app", "state", "reason", "task", "task_id", "queue"),
    *("exchange", "routing_key", "failed_queue", "exception", "message", "traceback"),
    *("fingerprint", "args", "kwargs", "attempts", "first_failed_at"),
    *("last_failed_at", "replays", "replayed_as", "root_id", "parent_id", "in_chord"),
    *("chain_length", "priority", "content_type", "body_kib", "release", "trace_id"),
    *("sentry_event_id", "idempotency_key"),
)


class State(StrEnum):
    """What became of a failed task."""

    UNRESOLVED = "unresolved"
    REPLAYING = "replaying"
    RESOLVED = "resolved"
    DISCARDED = "discarded"


class Phase(StrEnum):
    """How far a replay has come."""

    CLAIMED = "claimed"
    SENT = "sent"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Summary:
    """
    What a list shows of a failed task, without its message.

    Attributes:
        id: 32 hex digits.
        first_failed_at, last_failed_at: Wall time, in seconds.
        replays: How often it was sent again.
    """

    id: str
    state: State
    reason: str
    task: str
    task_id: str
    queue: str
    failed_queue: str
    exception: str
    message: str
    fingerprint: str
    worker: str
    release: str | None
    first_failed_at: float
    last_failed_at: float
    replays: int
    phase: Phase | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class FailedTask:
    """
    One failed task with all that is known of it.

    Attributes:
        summary: The columns of a list.
        document: The envelope of its last failure.
        attempts: Its failures, oldest first, as the public JSON has them; before the
            last one those that a retry rule had tried again, as far as its message
            remembers them.
        replayed_as: The task id of its last replay, where that had to be new.
    """

    summary: Summary
    document: Mapping[str, Any]
    attempts: list[dict[str, Any]] = field(default_factory=list)
    replayed_as: str | None = None

    @property
    def id(self) -> str:
        """32 hex digits."""
        return self.summary.id

    @property
    def original(self) -> OriginalMessage:
        """The message, byte for byte."""
        return unpack(self.document["original"])

    def to_dict(self) -> dict[str, Any]:
        """The public JSON, schema 1: everything redacted, no body."""
        summary, document = self.summary, self.document
        return {
            "schema": SCHEMA,
            "id": summary.id,
            "app": document["app"],
            "state": str(summary.state),
            "reason": summary.reason,
            "task": summary.task,
            "task_id": summary.task_id,
            "queue": summary.queue,
            "exchange": document["exchange"],
            "routing_key": document["routing_key"],
            "failed_queue": summary.failed_queue,
            "exception": summary.exception,
            "message": document["message"],
            "traceback": document["traceback"],
            "fingerprint": summary.fingerprint,
            "args": document["args"],
            "kwargs": document["kwargs"],
            "attempts": self.attempts,
            "first_failed_at": iso(summary.first_failed_at),
            "last_failed_at": iso(summary.last_failed_at),
            "replays": summary.replays,
            "replayed_as": self.replayed_as,
            "root_id": document["root_id"],
            "parent_id": document["parent_id"],
            "in_chord": document["in_chord"],
            "chain_length": document["chain_length"],
            "priority": document["priority"],
            "content_type": document["content_type"],
            "body_kib": document["body_kib"],
            "release": document["release"],
            "trace_id": document["trace_id"],
            "sentry_event_id": document["sentry_event_id"],
            "idempotency_key": document["idempotency_key"],
        }


def tried_again(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    The attempts before the last failure that a retry rule had tried again.

    Args:
        document: The envelope of that failure.
    """
    retry = unpack(document["original"]).marks.get(RETRY, {"failures": ()})
    return [
        {
            "at": iso(at),
            "worker": "",
            "pid": None,
            "reason": Reason.EXCEPTION,
            "exception": exception,
            "message": "",
            "runtime_s": None,
            "retried_in_s": round(delay_s, 3),
        }
        for _, at, exception, delay_s in retry["failures"]
    ]
