"""Chance for waits: of the system, so that it is nobody's seed.

An app that seeds `random` in each task or process, so that its own numbers come again,
would otherwise have all its workers wait alike, which is what jitter is there against;
and a thread of ours would take numbers out of the app's row.
"""

from __future__ import annotations

from random import SystemRandom

_system = SystemRandom()


def chance() -> float:
    """At random, from 0 to below 1."""
    return _system.random()


def between(low: float, high: float) -> float:
    """At random, from *low* to *high*."""
    return _system.uniform(low, high)
