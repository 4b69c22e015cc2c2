"""How claims and keys are written, whatever the store."""

from __future__ import annotations

from celery_resilience.idempotency.record import KeyState
from celery_resilience.redaction import storable

#: Characters of a text that a store keeps.
LONGEST = 255


def stored(text: str) -> str:
    """*text* as every store takes it."""
    if len(text) <= LONGEST and text.isascii() and "\0" not in text:
        return text
    return storable(text[:LONGEST])[:LONGEST]


def outcome(
    state: KeyState, result: bytes | None, until_s: float
) -> tuple[bytes | None, float]:
    """What is remembered of a run, and for how long its key waits for its owner."""
    return (
        result if state is KeyState.DONE else None,
        until_s if state is KeyState.RETRYING else 0.0,
    )
