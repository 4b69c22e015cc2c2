"""Why a run failed, by the exception that it ended in; and what its child tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_resilience.errors import (
    CircuitIsOpen,
    KeyMismatch,
    MemoryLimitExceeded,
    RunInterrupted,
    TooManyCrashes,
)
from celery_resilience.failure import describe
from celery_resilience.outcome import Reason

#: Of our own exceptions, whoever raises them.
REASONS: Mapping[type[BaseException], Reason] = {
    TooManyCrashes: Reason.WORKER_LOST,
    KeyMismatch: Reason.KEY_MISMATCH,
    RunInterrupted: Reason.INTERRUPTED,
    MemoryLimitExceeded: Reason.MEMORY_LIMIT,
    CircuitIsOpen: Reason.CIRCUIT_OPEN,
}


def reason_of(exc: BaseException, told: str = Reason.EXCEPTION) -> str:
    """
    Why a run that ended in *exc* failed.

    Args:
        told: What the process knows that ran it.
    """
    for kind, reason in REASONS.items():
        if isinstance(exc, kind):
            return reason
    return told


def facts_of_failure(
    exc: BaseException, package: str, *, is_exhausted: bool
) -> dict[str, Any]:
    """
    What the process that ran a task tells of its failure.

    Args:
        exc: The exception with its traceback.
        package: Top-level package of the task.
        is_exhausted: It is that of a retry when there was none left.
    """
    facts: dict[str, Any] = describe(exc, package)
    if is_exhausted:
        facts["reason"] = Reason.RETRIES_EXHAUSTED
    if isinstance(exc, CircuitIsOpen):
        facts["reason"] = Reason.CIRCUIT_OPEN
    return facts
