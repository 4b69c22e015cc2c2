"""When a circuit opens, who may try it, and when it closes.

One state for the whole fleet, which every function here takes and returns: no store, no
clock and no chance of its own. Times are seconds of the store's clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from celery_resilience.circuits.options import CircuitOptions

#: Parts of the window, the oldest of which is forgotten as a whole.
PARTS = 10

#: Seconds until a refused call may ask again where no time is known.
ASK_AGAIN_S = 1.0

#: Seconds without a refusal after which a closed circuit has no limit any more.
QUIET_S = 10.0

#: Seconds after which calls are probes of a circuit whose function nobody calls.
OVERDUE_S = 10.0

#: What a failure leaves of the limit, at most once in so many seconds.
CUT = 0.7
CUT_EVERY_S = 1.0

#: Seconds that an operator's word holds where none are given.
FORCED_S = 3_600.0


class Position(StrEnum):
    """What a circuit does with a call; the words are pybreaker's."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Forced(StrEnum):
    """
    What an operator has said.

    `open` refuses every call, `disabled` lets every call through and counts none,
    `shadow` lets every call through and counts: what would have happened is told.
    """

    OPEN = "open"
    DISABLED = "disabled"
    SHADOW = "shadow"


class Part(NamedTuple):
    """
    The calls of a part of the window.

    Attributes:
        number: Of the part: its time divided by its length.
        calls: How many ended, without those that count nothing.
        failures: How many of them failed.
    """

    number: int
    calls: int
    failures: int


class Lease(NamedTuple):
    """One probe that runs, until when it is waited for."""

    token: str
    until: float


@dataclass(frozen=True, slots=True)
class State:
    """
    One circuit, as the fleet sees it.

    Attributes:
        generation: Grows with each change of position: an outcome that was begun in an
            older one counts nothing.
        parts: The window, the oldest part first.
        streak: Failures since the last success.
        opened_at: When it opened last.
        retry_at: When a probe may run.
        openings: How often it has opened since it was last closed.
        leases: The probes that run.
        successes: Probes that have succeeded.
        forced: What an operator has said, until `forced_until`.
        closed_at: When it was closed last.
        limit: How many tasks run at once after it has closed; 0: any number.
        limited_at: When one was refused last for that.
        cut_at: When a failure has cut the limit last.
    """

    generation: int = 0
    position: Position = Position.CLOSED
    parts: tuple[Part, ...] = ()
    streak: int = 0
    opened_at: float = 0.0
    retry_at: float = 0.0
    openings: int = 0
    leases: tuple[Lease, ...] = ()
    successes: int = 0
    forced: Forced | None = None
    forced_until: float = 0.0
    closed_at: float = 0.0
    limit: float = 0.0
    limited_at: float = 0.0
    cut_at: float = 0.0

    def forced_at(self, now: float) -> Forced | None:
        """What an operator has said, if it still holds."""
        return self.forced if self.forced and now < self.forced_until else None

    @property
    def calls(self) -> int:
        """Calls in the window."""
        return sum(part.calls for part in self.parts)

    @property
    def failures(self) -> int:
        """Failures in the window."""
        return sum(part.failures for part in self.parts)

    def to_text(self) -> str:
        """The state as the stores keep it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> State:
        """The state that a store has kept; a new one where it has none."""
        if not text:
            return cls()
        found: dict[str, Any] = json.loads(text)
        found["position"] = Position(found["position"])
        found["parts"] = tuple(Part(*part) for part in found["parts"])
        found["leases"] = tuple(Lease(*lease) for lease in found["leases"])
        found["forced"] = Forced(found["forced"]) if found["forced"] else None
        known = cls.__dataclass_fields__
        return cls(**{name: value for name, value in found.items() if name in known})


class Entry(NamedTuple):
    """
    Whether a call may run.

    Attributes:
        is_allowed: It may.
        token: Of its lease where it is a probe, else "".
        retry_after_s: Seconds until a refused call may ask again.
    """

    is_allowed: bool
    token: str = ""
    retry_after_s: float = 0.0


class Report(NamedTuple):
    """
    What one process has seen since it last told.

    Attributes:
        generation: In which the calls began.
        parts: Of the window; their numbers need no order.
        streak: Failures after the last success, at the end.
        is_all_failed: There was no success.
        retry_after_s: What the dependency itself asks for, if it does.
        is_limited: A task was refused for the limit.
    """

    generation: int
    parts: tuple[Part, ...]
    streak: int = 0
    is_all_failed: bool = False
    retry_after_s: float | None = None
    is_limited: bool = False


def part_number(now: float, options: CircuitOptions) -> int:
    """The part of the window that a call which ends now belongs to."""
    return int(now * PARTS / options.window_s)


def entry_now(state: State, now: float) -> Entry | None:
    """
    What is known of a call without asking the fleet.

    Returns:
        None: it may be a probe, and the fleet must be asked for its lease.
    """
    forced = state.forced_at(now)
    if forced is Forced.OPEN:
        return Entry(False, retry_after_s=_wait(state.forced_until - now))
    if forced is Forced.DISABLED or state.position is Position.CLOSED:
        return Entry(True)
    if state.position is Position.OPEN and now < state.retry_at:
        is_allowed = forced is Forced.SHADOW
        return Entry(is_allowed, retry_after_s=_wait(state.retry_at - now))
    return None


def enter(
    state: State, options: CircuitOptions, *, now: float, token: str
) -> tuple[State, Entry]:
    """
    Let a call through, or not; a probe gets a lease.

    Args:
        state: What is so before.
        options: The circuit's.
        now: By the store's clock.
        token: The lease's, if there will be one.

    Returns:
        What is so after, and what becomes of the call.
    """
    entry = entry_now(state, now)
    if entry is not None:
        return state, entry
    if state.position is Position.OPEN:
        state = half_open(state, now=now)
    leases = tuple(lease for lease in state.leases if now < lease.until)
    if len(leases) + state.successes < options.probes:
        leases = (*leases, Lease(token, now + options.probe_lease_s))
        return replace(state, leases=leases), Entry(True, token=token)
    if state.forced_at(now) is Forced.SHADOW:
        return state, Entry(True)
    first = min((lease.until for lease in leases), default=now)
    # The probe may end at any moment, and its process may be dead.
    return state, Entry(False, retry_after_s=min(_wait(first - now), ASK_AGAIN_S))


def has_free_probe(state: State, options: CircuitOptions, now: float) -> bool:
    """Whether one more probe may run of a circuit that may be tried."""
    if state.position is Position.OPEN:
        return True
    running = sum(now < lease.until for lease in state.leases)
    return running + state.successes < options.probes


def is_probe_overdue(state: State, now: float) -> bool:
    """
    Whether nobody has called the probe function of a circuit that may be tried.

    No worker of the fleet runs, which alone call it.
    """
    asked_at = max((lease.until for lease in state.leases), default=state.retry_at)
    return now > asked_at + OVERDUE_S


def count(
    state: State, options: CircuitOptions, report: Report, *, now: float, chance: float
) -> State:
    """
    Add what a process has seen to the window; it may open the circuit.

    Args:
        state: What is so before.
        options: The circuit's.
        report: Ignored where it is of an older generation.
        now: By the store's clock.
        chance: From 0 to 1, of the jitter.
    """
    if (
        report.generation != state.generation
        or state.position is not Position.CLOSED
        or state.forced_at(now) is Forced.DISABLED
    ):
        return state
    parts = _merged(state.parts, report.parts, first=part_number(now, options) - PARTS)
    streak = report.streak + (state.streak if report.is_all_failed else 0)
    state = replace(state, parts=parts, streak=streak)
    is_failing = (
        state.calls >= options.min_calls
        and state.failures > 0
        and state.failures >= options.failure_rate * state.calls
    )
    is_streak = options.consecutive is not None and streak >= options.consecutive
    if is_failing or is_streak:
        return _opened(state, options, now, chance, report.retry_after_s)
    return _limited(state, report, now) if state.limit else state


def _limited(state: State, report: Report, now: float) -> State:
    """One more at once each time so many have succeeded; fewer where one fails."""
    failures = sum(part.failures for part in report.parts)
    successes = sum(part.calls for part in report.parts) - failures
    limited_at = now if report.is_limited else state.limited_at
    if now > limited_at + QUIET_S:
        return replace(state, limit=0.0)
    if failures and now < state.cut_at + CUT_EVERY_S:
        return replace(state, limited_at=limited_at)
    if failures:
        limit = max(1.0, state.limit * CUT)
        return replace(state, limit=limit, limited_at=limited_at, cut_at=now)
    limit = state.limit + successes / state.limit
    return replace(state, limit=limit, limited_at=limited_at)


def probed(
    state: State,
    options: CircuitOptions,
    *,
    token: str,
    generation: int,
    is_success: bool | None,
    now: float,
    chance: float,
    retry_after_s: float | None = None,
) -> State:
    """
    A probe has ended, perhaps after its lease.

    Args:
        state: What is so before.
        options: The circuit's.
        token: Of its lease.
        generation: In which it began; where the circuit has changed since, nothing
            changes.
        is_success: None: it counts nothing, and the lease is given back.
        now: By the store's clock.
        chance: From 0 to 1, of the jitter.
        retry_after_s: What the dependency itself asks for, if it does.
    """
    if state.position is not Position.HALF_OPEN or state.generation != generation:
        return state
    leases = tuple(lease for lease in state.leases if lease.token != token)
    if is_success is None:
        return replace(state, leases=leases)
    if not is_success:
        return _opened(state, options, now, chance, retry_after_s)
    successes = state.successes + 1
    if successes < options.probes:
        return replace(state, leases=leases, successes=successes)
    limit = float(options.ramp_from or 0)
    return replace(closed(state, now=now), limit=limit, limited_at=now)


def closed(state: State, *, now: float) -> State:
    """The circuit closed and its window empty; what an operator has said stays."""
    return State(
        generation=_next(state, now),
        closed_at=now,
        forced=state.forced,
        forced_until=state.forced_until,
    )


def half_open(state: State, *, now: float) -> State:
    """The circuit such that the next calls are probes."""
    return replace(
        state,
        generation=_next(state, now),
        position=Position.HALF_OPEN,
        retry_at=min(state.retry_at, now),
        leases=(),
        successes=0,
    )


def opened(
    state: State, options: CircuitOptions, *, now: float, chance: float = 0.0
) -> State:
    """The circuit open, as if it had tripped now."""
    return _opened(state, options, now, chance, None)


def forced(
    state: State, word: Forced | None, *, now: float, for_s: float = FORCED_S
) -> State:
    """What an operator says holds from now for so many seconds; None takes it back."""
    if word is None:
        return replace(state, forced=None, forced_until=0.0)
    return replace(state, forced=word, forced_until=now + for_s)


def keep_s(state: State, options: CircuitOptions, now: float) -> float:
    """Seconds after which nobody needs this state any more."""
    until = max(state.forced_until, state.retry_at) - now
    return max(until, 0.0) + 2 * options.window_s + options.max_open_s + 3_600.0


def _opened(
    state: State,
    options: CircuitOptions,
    now: float,
    chance: float,
    retry_after_s: float | None,
) -> State:
    openings = state.openings + 1
    # The exponent is bounded: it may open for years.
    open_s = min(options.open_s * 2 ** min(openings - 1, 30), options.max_open_s)
    open_s *= 1 + options.jitter * chance
    if retry_after_s is not None:
        open_s = max(retry_after_s, ASK_AGAIN_S)
    return replace(
        state,
        generation=_next(state, now),
        position=Position.OPEN,
        parts=(),
        streak=0,
        opened_at=now,
        retry_at=now + min(open_s, options.max_open_s),
        openings=openings,
        leases=(),
        successes=0,
        limit=0.0,
    )


def _next(state: State, now: float) -> int:
    """Never one that was before, also where the store has forgotten the state."""
    return max(state.generation + 1, int(now))


def _wait(seconds: float) -> float:
    return max(seconds, 0.001)


def _merged(
    known: Iterable[Part], more: Iterable[Part], *, first: int
) -> tuple[Part, ...]:
    """Parts added to each other, without those before the window."""
    sums: dict[int, tuple[int, int]] = {}
    for number, calls, failures in (*known, *more):
        if number > first:
            had = sums.get(number, (0, 0))
            sums[number] = had[0] + calls, had[1] + failures
    return tuple(Part(number, *sums[number]) for number in sorted(sums))
