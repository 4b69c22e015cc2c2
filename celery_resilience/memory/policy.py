"""What memory asks for: no Celery, no reading, no clock of its own.

Sizes are in KiB, as the kernel and the slots have them; times are seconds of a
monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

KIB_PER_MIB = 1024

#: A trim that freed less than this part of the growth was useless, and another
#: is not tried before so many seconds.
USEFUL_TRIM = 0.05
TRIM_EVERY_S = 10.0

#: Runs within which a child is still fresh, and how many fresh children over the
#: limit one after the other say that the limit is below what a child needs.
FRESH_RUNS = 3
FRESH_IN_A_ROW = 2

#: Seconds that a run which was signalled may take to give memory back, and the
#: part of its limit above which it is not waited for.
GRACE_S = 2.0
NO_GRACE_ABOVE = 1.25

#: Seconds between two looks at runs with a limit; while one is above a part of it.
LOOK_S = 0.2
LOOK_CLOSELY_S = 0.05
LOOK_CLOSELY_ABOVE = 0.5

#: Seconds for which a process without children must stay over its limit.
SUSTAINED_S = 5.0

#: Parts of a container's limit: said once, said again, acted upon.
CONTAINER_WARNS = (0.8, 0.9)
CONTAINER_IS_FULL = 0.95


def share_of(amount: float | str, whole_kib: int) -> int:
    """
    An amount in KiB.

    Args:
        amount: MiB; or a share, such as "25%".
        whole_kib: What it is a share of.
    """
    if isinstance(amount, str):
        return max(1, int(whole_kib * float(amount.rstrip("%")) / 100))
    return max(1, int(amount * KIB_PER_MIB))


def is_over(growth_kib: int, limit_kib: int) -> bool:
    """Whether memory that was gained is above its limit."""
    return growth_kib > limit_kib


class Trims:
    """When giving free memory back to the system is worth its time."""

    def __init__(self) -> None:
        self._useless_at: float | None = None

    def may_trim(self, now: float) -> bool:
        """Whether to try: not soon after one that was useless."""
        return self._useless_at is None or now - self._useless_at >= TRIM_EVERY_S

    def trimmed(self, before_kib: int, after_kib: int, now: float) -> None:
        """What one has freed."""
        useless = before_kib - after_kib < before_kib * USEFUL_TRIM
        self._useless_at = now if useless else None


@dataclass(frozen=True, slots=True)
class Brake:
    """
    Fresh children that were over the limit, one after the other.

    Attributes:
        in_a_row: How many, of the whole pool.
        is_on: What a fresh child has gained is from now on its start.
    """

    in_a_row: int = 0
    is_on: bool = False

    def over(self, runs: int) -> Brake:
        """A child is over the limit after so many runs."""
        if self.is_on:
            return self
        in_a_row = self.in_a_row + 1 if runs <= FRESH_RUNS else 0
        return Brake(in_a_row, in_a_row >= FRESH_IN_A_ROW)

    def forgives(self, runs: int) -> bool:
        """Whether a child's first gain counts as what it had at its start."""
        return self.is_on and runs <= FRESH_RUNS


class Act(StrEnum):
    """What the main process does to a run."""

    NOTHING = "nothing"
    SIGNAL = "signal"
    KILL = "kill"


def act_on_run(
    used_kib: int, limit_kib: int, *, signalled_for_s: float | None, hears: bool
) -> Act:
    """
    What becomes of a run with a limit.

    Args:
        used_kib: Its own memory.
        limit_kib: At least 1.
        signalled_for_s: Seconds since it was signalled; None: it was not.
        hears: It is ready for the signal.
    """
    if used_kib <= limit_kib:
        return Act.NOTHING
    if used_kib > limit_kib * NO_GRACE_ABOVE or not hears:
        return Act.KILL
    if signalled_for_s is None:
        return Act.SIGNAL
    return Act.KILL if signalled_for_s >= GRACE_S else Act.NOTHING


def next_look_s(fullest: float, *, is_enforced: bool) -> float:
    """
    Seconds until the next look at runs with a limit.

    Args:
        fullest: The largest part of its limit that one of them uses.
        is_enforced: The system refuses allocations above a limit.
    """
    is_close = fullest > LOOK_CLOSELY_ABOVE or not is_enforced
    return LOOK_CLOSELY_S if is_close else LOOK_S


class Sustained:
    """
    Whether a process that cannot be recycled stays over its limit.

    It begins with the end of a run, so that what a run has while it lasts is no
    growth; it ends with any figure below the limit.
    """

    def __init__(self, limit_kib: int) -> None:
        self._limit_kib = limit_kib
        self._over_since: float | None = None

    def run_ended(self, growth_kib: int, now: float) -> None:
        """What the process had gained when a run ended."""
        if not is_over(growth_kib, self._limit_kib):
            self._over_since = None
        elif self._over_since is None:
            self._over_since = now

    def is_sustained(self, growth_kib: int, now: float) -> bool:
        """Whether it has been over the limit for long enough."""
        if not is_over(growth_kib, self._limit_kib):
            self._over_since = None
        return self._over_since is not None and now - self._over_since >= SUSTAINED_S


def container_level(used_kib: int, limit_kib: int) -> int:
    """0: enough; 1, 2: to be said; 3: the largest run goes."""
    part = used_kib / limit_kib
    return sum(part >= level for level in (*CONTAINER_WARNS, CONTAINER_IS_FULL))
