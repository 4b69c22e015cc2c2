"""Is the worker alive, and is it ready? Policy only: what is seen is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Seconds for which the main loop may stand still, and work may wait for a child that
#: is free, before the worker is not live.
LOOP_STUCK_S = 60.0
POOL_STUCK_S = 60.0

#: Seconds for which every child may be stopped or gone.
CHILDREN_STUCK_S = 5.0


@dataclass(frozen=True, slots=True)
class Seen:
    """
    What is seen of a worker at one moment.

    Attributes:
        is_draining: It takes no new tasks, and ends.
        is_connected: Its consumer has the broker.
        loop_age_s: Since the main loop has turned; None where a task holds it up by
            right, or there is none to turn.
        children: Children of the pool; None for a pool without.
        children_stuck_s: Since when none of them could answer: stopped by a signal,
            or gone; None: one can.
        work_waits_s: Since when messages wait though a child is free, and none was
            accepted.
        store: What the store said when it was asked last; "" is well.
    """

    is_draining: bool = False
    is_connected: bool = False
    loop_age_s: float | None = None
    children: int | None = None
    children_stuck_s: float | None = None
    work_waits_s: float | None = None
    store: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe is told; well where there are no reasons to the contrary."""

    reasons: tuple[str, ...] = field(default_factory=tuple)

    @property
    def is_well(self) -> bool:
        """Nothing speaks against it."""
        return not self.reasons


def live(seen: Seen) -> Answer:
    """
    Whether a new start would help.

    The broker has no say: it would be away for the next worker too. Nor has a store.
    """
    reasons = []
    loop_age_s = seen.loop_age_s
    if (
        loop_age_s is not None
        and loop_age_s > LOOP_STUCK_S
        and seen.is_connected
        and not seen.is_draining
    ):
        reasons.append(f"the main loop has not turned for {loop_age_s:.0f} s")
    stuck_s = seen.children_stuck_s
    if stuck_s is not None and stuck_s >= CHILDREN_STUCK_S:
        reasons.append(
            f"none of the {seen.children} children could answer for {stuck_s:.0f} s"
        )
    waits_s = seen.work_waits_s
    if waits_s is not None and waits_s >= POOL_STUCK_S and not seen.is_draining:
        reasons.append(f"the pool has accepted nothing for {waits_s:.0f} s")
    return Answer(tuple(reasons))


def ready(seen: Seen) -> Answer:
    """Whether it takes tasks, and can keep their failures and keys."""
    reasons = list(live(seen).reasons)
    if seen.is_draining:
        reasons.append("it drains")
    if not seen.is_connected:
        reasons.append("the broker is not connected")
    if seen.store:
        reasons.append(f"the store: {seen.store}")
    return Answer(tuple(reasons))


class Since:
    """Since when something is true without a break."""

    def __init__(self) -> None:
        self._began_at: float | None = None

    def look(self, is_true: bool, now: float) -> float | None:
        """Seconds for which it has been true; None where it is not."""
        if not is_true:
            self._began_at = None
            return None
        if self._began_at is None:
            self._began_at = now
        return now - self._began_at
