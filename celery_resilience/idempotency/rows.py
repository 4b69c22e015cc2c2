"""How claims and keys are written, whatever the store."""

from __future__ import annotations

from celery_resilience.redaction import storable

#: Characters of a text that a store keeps.
LONGEST = 255


def stored(text: str) -> str:
    """*text* as every store takes it."""
    return storable(text[:LONGEST])[:LONGEST]
