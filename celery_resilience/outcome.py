"""How a delivery ended, as plain data.

Every message that a worker takes ends in exactly one settlement; metrics,
logs, tracing and the failed queue all hear that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from celery_resilience.failure import Failure
from celery_resilience.message import KEY
from celery_resilience.trace_ids import trace_id_of


class Outcome(StrEnum):
    """What a settlement says."""

    SUCCEEDED = "succeeded"
    SKIPPED = "skipped"
    RETRIED = "retried"
    SNOOZED = "snoozed"
    REQUEUED = "requeued"
    FAILED = "failed"
    REVOKED = "revoked"


#: The event that is emitted with a settlement, by its outcome.
EVENTS = {outcome: f"delivery.{outcome}" for outcome in Outcome}


class Reason(StrEnum):
    """Why a delivery failed; `failed list --reason` takes these."""

    EXCEPTION = "exception"
    RETRIES_EXHAUSTED = "retries_exhausted"
    HARD_TIME_LIMIT = "hard_time_limit"
    WORKER_LOST = "worker_lost"
    MEMORY_LIMIT = "memory_limit"
    REJECTED = "rejected"
    UNKNOWN_TASK = "unknown_task"
    UNDECODABLE = "undecodable"
    NOT_ACCEPTED = "not_accepted"
    MALFORMED = "malformed"
    EXPIRED = "expired"
    REVOKED = "revoked"
    CIRCUIT_OPEN = "circuit_open"
    KEY_MISMATCH = "key_mismatch"
    INTERRUPTED = "interrupted"
    MANUAL = "manual"


@dataclass(frozen=True, slots=True)
class Settlement:
    """
    The one outcome of one delivery.

    Attributes:
        outcome: What became of the delivery.
        reason: Of a failure, a `Reason`; of anything else a word or None.
        attempt: Celery's number of the try, from 1.
        run_s: Seconds from accept to settlement; None if it never started.
        wait_s: Seconds from when it might run to its start; None where nobody knows.
        failure: What went wrong, when the outcome is failed.
        args, kwargs: Redacted texts, when the outcome is failed.
        arguments: The same by name, or by position where there is none.
        in_chord: A chord waits for this task's result.
        chain_length: Tasks that follow this one in its chain.
        marks: What we had written on the message (replay, crashes, snoozes).
        facts: What only the child knew: reason, peak memory, counts.
        is_silent: The run raised no error that others report where it happened: it
            ended with its process, or was cut off.
        traceparent: The span in which the message was sent, as W3C writes it.
    """

    outcome: Outcome
    reason: str | None
    task: str
    task_id: str
    queue: str
    worker: str
    attempt: int = 1
    root_id: str | None = None
    parent_id: str | None = None
    pid: int | None = None
    run_s: float | None = None
    wait_s: float | None = None
    failure: Failure | None = None
    args: str = ""
    kwargs: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    in_chord: bool = False
    chain_length: int = 0
    marks: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    is_silent: bool = False
    traceparent: str | None = None

    @property
    def idempotency_key(self) -> str | None:
        """The name of its key; None where it has none, or nobody told it."""
        found: str | None = (
            self.marks[KEY][0]
            if KEY in self.marks
            else self.facts.get("idempotency_key")
        )
        return found

    @property
    def trace_id(self) -> str | None:
        """Of the run's trace, where a process knew it, or else of its sender's."""
        found: str | None = self.facts.get("trace_id")
        return found or trace_id_of({"traceparent": self.traceparent})


#: The event that is emitted with an `Ended`, for each delivery of a resilient task and
#: for each message that never became one.
ENDED = "delivery.ended"


#: The event by which is told what a run has counted itself.
COUNTED = "delivery.counted"


class Ended(NamedTuple):
    """
    What is counted of a delivery that has ended: cheap, for there is one for each.

    Attributes:
        attempt: Celery's number of the try, from 1.
        run_s: Seconds from accept to settlement; None if it never started.
        wait_s: Seconds from when it might run to its start; None where nobody knows.
    """

    task: str
    queue: str
    outcome: Outcome
    attempt: int = 1
    run_s: float | None = None
    wait_s: float | None = None
