"""Whether and when a failed run is tried again, and what its message remembers of it.

Policy only: no Celery, no I/O, no clock of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from celery_resilience.retries.rules import MAX_WAIT_S, On

#: Failed attempts that a message remembers, the last ones.
REMEMBERED = 20

#: Share of what a server asks for by which the wait is longer at random, so that not
#: all whom it has told the same come back in the same second.
HINT_SPREAD = 0.1

#: Doublings of a backoff beyond which a float says no more.
_MAX_DOUBLINGS = 60


class History(NamedTuple):
    """
    What a message knows of the failures that were tried again.

    Attributes:
        since: Wall time in seconds of the first of them.
        spent: How many of them there were by each rule.
        failures: The last of them: attempt, wall time, name of the exception, and the
            seconds until the next attempt.
    """

    since: float
    spent: Mapping[str, int]
    failures: tuple[tuple[int, float, str, float], ...] = ()

    @classmethod
    def from_mark(cls, mark: Mapping[str, Any]) -> History:
        """From what a message carries, which was checked as it was read."""
        failures = tuple((n, at, name, s) for n, at, name, s in mark["failures"])
        return cls(mark["since"], mark["spent"], failures)

    def to_mark(self) -> dict[str, Any]:
        """What a message carries."""
        return {
            "since": self.since,
            "spent": dict(self.spent),
            "failures": [list(failure) for failure in self.failures],
        }


class Again(NamedTuple):
    """The task is tried again in *delay_s* seconds, and its message knows *history*."""

    delay_s: float
    history: History


class GiveUp(NamedTuple):
    """The task has failed: *why* is "attempts" or "deadline"."""

    why: str


def decide(
    rule: On,
    history: History | None,
    *,
    attempt: int,
    exception: str,
    hint_s: float | None,
    now: float,
    chance: float,
) -> Again | GiveUp:
    """
    What a rule says to a failed attempt.

    Args:
        rule: The one for what was raised.
        history: What the message knows; None: nothing failed before.
        attempt: Celery's number of it.
        exception: The name of what was raised.
        hint_s: What a server has asked for.
        now: Wall time in seconds.
        chance: At random, from 0 to 1.
    """
    if history is None:
        history = History(now, {})
    since = min(history.since, now)
    failures = history.spent.get(rule.key, 0) + 1
    if rule.attempts is not None and failures >= rule.attempts:
        return GiveUp("attempts")
    left_s = MAX_WAIT_S
    if rule.deadline_s is not None:
        left_s = min(left_s, since + rule.deadline_s - now)
    delay_s = wait_s(rule, failures, hint_s=hint_s or 0.0, left_s=left_s, chance=chance)
    if delay_s is None:
        return GiveUp("deadline")
    kept = (*history.failures, (attempt, now, exception, delay_s))
    return Again(
        delay_s,
        History(since, {**history.spent, rule.key: failures}, kept[-REMEMBERED:]),
    )


def wait_s(
    rule: On, failures: int, *, hint_s: float, left_s: float, chance: float
) -> float | None:
    """
    Seconds until the next attempt; None: there is no time left for one.

    Args:
        failures: By this rule, from 1.
        hint_s: What a server has asked for, which is the least; 0: nothing.
        left_s: Until the deadline.
        chance: From 0 to 1.
    """
    least_s, cap_s = rule.backoff_s
    if max(least_s, hint_s) > left_s:
        return None
    most_s = min(cap_s, least_s * 2.0 ** min(failures, _MAX_DOUBLINGS))
    delay_s = min(most_s, least_s + chance * (most_s - least_s))  # it may be rounded up
    if hint_s:
        spread_s = max(least_s, hint_s * HINT_SPREAD)
        delay_s = max(delay_s, hint_s + chance * spread_s)
    return min(delay_s, left_s)
