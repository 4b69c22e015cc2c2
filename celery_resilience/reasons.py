"""Why a run failed, by the exception that it ended in."""

from __future__ import annotations

from collections.abc import Mapping

from celery_resilience.errors import (
    CircuitIsOpen,
    KeyMismatch,
    MemoryLimitExceeded,
    RunInterrupted,
    TooManyCrashes,
)
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
