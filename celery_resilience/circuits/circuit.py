"""One circuit in one process: what is known of it, and what is to be told.

A call of a closed circuit asks nobody: it looks at what was read less than `FRESH_S`
ago, and its outcome waits for the thread that tells the store of several at once.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from celery_resilience.chance import chance
from celery_resilience.circuits import policy
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.page import Note
from celery_resilience.circuits.policy import Entry, Part, Position, Report, State
from celery_resilience.circuits.store import MAX_NAME, Stored
from celery_resilience.errors import ConfigurationError, TooBusy

if TYPE_CHECKING:
    from celery_resilience.circuits.fleet import Circuits

Result = TypeVar("Result")

#: Seconds that what was read is gone by.
FRESH_S = 0.5

Change = Callable[[State, float], tuple[State, Result]]
OnChange = Callable[[State, State], None]


class Permit(NamedTuple):
    """
    A call that was let through.

    Attributes:
        generation: In which it began.
        token: Of its lease where it is a probe.
        started: By the monotonic clock.
        slot: What it gives back where so many may run at once.
    """

    generation: int
    token: str
    started: float
    slot: str = ""


class Circuit:
    """
    One circuit in this process.

    Attributes:
        name: At most 64 characters.
        used_at: When somebody wanted to know last, by the monotonic clock.
        is_shared: The worker's main process reads it for its children.
        is_paused: Its queues are not to be consumed by this worker.
        canary_until: Until when this worker is the one that takes the probe.
        on_change: Called with the states before and after by the one process of the
            fleet that has changed it.
    """

    def __init__(self, fleet: Circuits, name: str) -> None:
        self.name = name
        self.on_change: list[OnChange] = []
        self.used_at = 0.0
        self.is_shared = False
        self.is_paused = False
        self.canary_until = 0.0
        self._fleet = fleet
        self._clock = fleet.clock
        #: Known with the options, at the first call.
        self._part_s = 1.0
        self._slow_s = float("inf")
        self._lock = Lock()
        self._note = Note(Stored(), 0.0, 0.0)
        self._fresh_until = 0.0
        self._refused_until = 0.0
        self._state = State()
        self._is_plain = True
        self._parts: dict[int, list[int]] = {}
        self._retry_after_s: float | None = None
        self._new_report()

    @cached_property
    def options(self) -> CircuitOptions:
        """
        What the app says about it, read at its first call.

        Raises:
            ConfigurationError: An option is wrong.
        """
        options = self._fleet.options_of(self.name)
        self._part_s = options.window_s / policy.PARTS
        self._slow_s = options.slow_call_s or float("inf")
        return options

    # --- a call ----------------------------------------------------------------------

    def enter(
        self, *, can_wait: bool = False, is_prober: bool = False
    ) -> Permit | Entry:
        """
        Let a call through, or not.

        Args:
            can_wait: Refused, it comes again: it may be refused for the limit too.
            is_prober: It is that of the circuit's probe function.

        Returns:
            What `leave` takes; or the refusal.
        """
        now = self._clock()
        if now >= self._fresh_until:
            self._fleet.refresh(self, now)
        if self._is_plain:
            return Permit(self._state.generation, "", now)
        if now < self._refused_until:
            return Entry(False, "", self._refused_until - now)
        entry = policy.entry_now(self._state, now + self._note.offset)
        if entry is None:
            if is_prober or self.may_be_tried:
                entry = self._ask_to_enter()
            else:
                return Entry(False, retry_after_s=policy.ASK_AGAIN_S)
        if not entry.is_allowed:
            return entry
        if not (can_wait and self._state.limit) or entry.token:
            return Permit(self._state.generation, entry.token, now)
        slot = self._fleet.take_slot(self, int(self._state.limit))
        if slot is None:
            with self._lock:
                self._is_limited = True
            self._fleet.wake()
            return Entry(False, retry_after_s=policy.ASK_AGAIN_S)
        return Permit(self._state.generation, "", now, slot)

    @property
    def may_be_tried(self) -> bool:
        """Whether an ordinary call may be a probe, once there may be one."""
        if self.options.probe is None:
            return True
        return policy.is_probe_overdue(self._state, self.store_now())

    @property
    def may_ask(self) -> bool:
        """Whether the next `enter` may wait for the store."""
        now = self._clock()
        return now >= self._fresh_until or (
            policy.entry_now(self._state, now + self._note.offset) is None
        )

    def leave(
        self,
        permit: Permit,
        is_success: bool | None,
        retry_after_s: float | None = None,
    ) -> None:
        """
        The call has ended.

        Args:
            permit: From `enter`.
            is_success: None: it counts nothing.
            retry_after_s: What the dependency asks for, if it does.
        """
        if self._fleet.is_off:
            return
        if permit.slot:
            self._fleet.give_slot(self, permit.slot)
        now = self._clock()
        if is_success and now - permit.started >= self._slow_s:
            is_success = False
        if permit.token:
            self._tell_probe(permit, is_success, retry_after_s)
            return
        if is_success is None:
            return
        number = int((now + self._note.offset) / self._part_s)
        with self._lock:
            if permit.generation != self._generation:
                return
            part = self._parts.get(number)
            if part is None:
                part = self._new_part(number)
            part[0] += 1
            if is_success:
                self._streak = 0
                self._is_all_failed = False
                return
            part[1] += 1
            self._streak += 1
            self._has_failure = True
            if retry_after_s is not None:
                self._retry_after_s = retry_after_s
        self._fleet.wake()

    def _ask_to_enter(self) -> Entry:
        token = secrets.token_hex(8)

        def change(state: State, now: float) -> tuple[State, Entry]:
            return policy.enter(state, self.options, now=now, token=token)

        try:
            return self._fleet.ask(self, change)
        except TooBusy:
            return Entry(False, retry_after_s=policy.ASK_AGAIN_S)

    def _tell_probe(
        self, permit: Permit, is_success: bool | None, retry_after_s: float | None
    ) -> None:
        def change(state: State, now: float) -> tuple[State, None]:
            after = policy.probed(
                state,
                self.options,
                token=permit.token,
                generation=permit.generation,
                is_success=is_success,
                now=now,
                chance=chance(),
                retry_after_s=retry_after_s,
            )
            return after, None

        with contextlib.suppress(TooBusy):  # its lease lapses
            self._fleet.ask(self, change)

    # --- what is known, and what is to be told -----------------------------------------

    @property
    def state(self) -> State:
        """The state as it was read last."""
        return self._state

    @property
    def note(self) -> Note:
        """What was read last."""
        return self._note

    def look(self) -> State:
        """The state, read again if that is long ago."""
        now = self._clock()
        if now >= self._fresh_until:
            self._fleet.refresh(self, now)
        return self._state

    def store_now(self) -> float:
        """The time by the store's clock."""
        return self._clock() + self._note.offset

    def is_fresh(self, now: float) -> bool:
        """Whether what is known may be gone by."""
        return now < self._fresh_until

    def learn(self, note: Note) -> None:
        """This is so."""
        with self._lock:
            if note.read_at < self._note.read_at:
                return
            if note.stored.version != self._note.stored.version:
                try:
                    self._state = State.from_text(note.stored.text)
                except (ValueError, KeyError, TypeError):
                    # Of another release: it is as if there were none.
                    self._state = State()
            self._note = note
            self._is_plain = (
                self._state.position is Position.CLOSED
                and self._state.forced is None
                and not self._state.limit
            )
            self._fresh_until = note.read_at + FRESH_S
            state = self._state
            is_open = state.position is Position.OPEN and state.forced is None
            self._refused_until = state.retry_at - note.offset if is_open else 0.0
            if self._state.generation != self._generation:
                self._new_report()

    def take_report(self) -> Report | None:
        """What has not been told yet, and is of interest: somewhere a call failed."""
        with self._lock:
            if not self._is_limited and (
                not self._parts
                or not (self._has_failure or self._state.parts or self._state.limit)
            ):
                return None
            report = Report(
                generation=self._generation,
                parts=tuple(Part(number, *it) for number, it in self._parts.items()),
                streak=self._streak,
                is_all_failed=self._is_all_failed,
                retry_after_s=self._retry_after_s,
                is_limited=self._is_limited,
            )
            self._new_report()
            return report

    def after_fork(self) -> None:
        """The child's own lock; what the parent has seen is the parent's to tell."""
        self._lock = Lock()
        self._new_report()

    def _new_report(self) -> None:
        self._generation = self._state.generation
        self._parts = {}
        self._streak = 0
        self._is_all_failed = True
        self._has_failure = False
        self._is_limited = False
        self._retry_after_s = None

    def _new_part(self, number: int) -> list[int]:
        while len(self._parts) > policy.PARTS:
            self._parts.pop(min(self._parts))
        part = self._parts[number] = [0, 0]
        return part

    def __repr__(self) -> str:
        return f"<circuit {self.name}: {self._state.position}>"


def only_look(state: State, now: float) -> tuple[State, None]:
    """A `Change` that changes nothing: what is so is read."""
    return state, None


def check_name(name: Any) -> None:
    """
    Make sure that *name* may be a circuit's.

    Raises:
        ConfigurationError: It may not.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise ConfigurationError(
            f"a circuit's name must be 1 to {MAX_NAME} characters, got {name!r}"
        )
