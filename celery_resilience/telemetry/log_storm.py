"""When many failures of one group come at once, how many are told one by one.

Policy only: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Groups that are looked at at a time; of more, the one that began first is summed up.
MAX_GROUPS = 1_000


@dataclass(slots=True)
class Group:
    """
    One fingerprint's failures within a window.

    Attributes:
        ends_at: When the window ends, on the caller's clock.
        allowed: How many are told one by one in it.
        told: How many were.
        more: How many were not, and wait for a summary.
        last: Facts of the last one of these.
    """

    ends_at: float
    allowed: int
    told: int = 0
    more: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """
    Failures of one group that were not told one by one.

    Attributes:
        more: How many they are.
        last: Facts of the last one of them.
    """

    more: int
    last: Mapping[str, Any]


class Storms:
    """
    Counts the failures of each fingerprint in windows.

    In a window the first ones are told one by one. What comes after them waits for one
    summary at the window's end; and while a window still brings more than that many, the
    next one tells none one by one.

    Args:
        limit: Failures of a group that are told one by one in a window, from 1.
        window_s: Seconds of a window.
    """

    def __init__(self, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._groups: dict[str, Group] = {}

    def is_told(self, fingerprint: str, now: float) -> bool:
        """
        Whether a failure is told by itself; else it is to be `added`.

        What is `due` must have been asked for at *now*.
        """
        group = self._groups.get(fingerprint)
        if group is None:
            group = Group(now + self._window_s, self._limit)
            self._groups[fingerprint] = group
        if group.told < group.allowed:
            group.told += 1
            return True
        return False

    def added(self, fingerprint: str, facts: Mapping[str, Any]) -> None:
        """A failure of a group waits for the summary."""
        group = self._groups[fingerprint]
        group.more += 1
        group.last = facts

    def due(self, now: float) -> list[Summary]:
        """The summaries of the windows that have ended; their groups begin anew."""
        found = []
        for fingerprint, group in list(self._groups.items()):
            if now < group.ends_at:
                continue
            if group.more:
                found.append(Summary(group.more, group.last))
            # Taken out and put back: the dict stays in the order of the windows' ends.
            del self._groups[fingerprint]
            if group.more and group.told + group.more > self._limit:
                self._groups[fingerprint] = Group(now + self._window_s, allowed=0)
        while len(self._groups) >= MAX_GROUPS:
            group = self._groups.pop(next(iter(self._groups)))
            if group.more:
                found.append(Summary(group.more, group.last))
        return found

    def rest(self) -> list[Summary]:
        """What waits for a summary, whose windows have not ended; nothing then does."""
        groups, self._groups = self._groups, {}
        return [Summary(it.more, it.last) for it in groups.values() if it.more]

    def due_in_s(self, now: float) -> float | None:
        """Seconds until the next summary; None: none is waited for."""
        ends = [it.ends_at for it in self._groups.values() if it.more]
        return max(0.0, min(ends) - now) if ends else None
