"""What one process knows of the fleet's circuits, and tells the fleet.

A call of a closed circuit asks nobody: it looks at what was read less than `FRESH_S`
ago, and its outcome waits for the thread that tells the store of several at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from threading import Event, Lock, Thread
from typing import Any, NamedTuple, TypeVar

from celery_resilience.circuits import policy
from celery_resilience.circuits.memory_store import MemoryCircuitStore
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.page import Note, Page
from celery_resilience.circuits.policy import Entry, Part, Position, Report, State
from celery_resilience.circuits.store import MAX_NAME, CircuitStore, Stored
from celery_resilience.deadline import answer_within
from celery_resilience.errors import (
    ConfigurationError,
    ResilienceError,
    StoreUnavailable,
    TooBusy,
)
from celery_resilience.events import emit
from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.circuits")

Result = TypeVar("Result")

#: Seconds that what was read is gone by; and how often it is read while it is used.
FRESH_S = 0.5
POLL_S = 0.25

#: Seconds between two tellings.
TELL_S = 0.1

#: Seconds that a call waits for the store: once, then it does without.
WAIT_S = 0.1

#: The same for the first call of a process, which makes the connection.
FIRST_WAIT_S = 2.0

#: Seconds after its last call for which a circuit is read.
USED_S = 10.0

#: Seconds between two looks whether the store is back.
LOOK_S = 1.0

#: Seconds within which it is said once that the store is away.
SAY_S = 60.0

#: Seconds for which one worker takes the probes of a circuit whose queues are paused.
CANARY_S = 10.0

#: Tickets that a process takes at once.
TICKETS = 10

#: How often is tried what another process was quicker with.
TRIES = 50
QUICK_TRIES = 3

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

    def enter(self, *, can_wait: bool = False) -> Permit | Entry:
        """
        Let a call through, or not.

        Args:
            can_wait: Refused, it comes again: it may be refused for the limit too.

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
            entry = self._ask_to_enter()
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
                is_success=is_success,
                now=now,
                chance=random.random(),
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


class Circuits:
    """
    The circuits of one app in this process.

    Args:
        store: Gives the store, None where the app has none.
        options: Gives what the app says, by the circuits' names; not asked before a
            circuit is used, as an app may be configured late.
        is_off: Gives whether celery-resilience is off: then every call is let through.
        clock: The monotonic clock.
    """

    def __init__(
        self,
        store: Callable[[], CircuitStore | None],
        options: Callable[[], Mapping[str, CircuitOptions]],
        *,
        is_off: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._store = store
        self._get_options = options
        self._get_is_off = is_off
        self._page: Page | None = None
        self._is_page_ours = False
        self._circuits: dict[str, Circuit] = {}
        self._local: MemoryCircuitStore | None = None
        self._is_away = False
        self._has_asked = False
        self._tickets: dict[str, tuple[int, int, int]] = {}
        self._looked_at = 0.0
        self._said_at: float | None = None
        self._thread: Thread | None = None
        self._lock = Lock()
        self._wake = Event()
        _all.add(self)

    def get(self, name: str) -> Circuit:
        """
        The circuit *name*; with the default options where the app says nothing.

        Raises:
            ConfigurationError: The name is none.
        """
        found = self._circuits.get(name)
        if found is not None:
            return found
        check_name(name)
        return self._circuits.setdefault(name, Circuit(self, name))

    @cached_property
    def is_off(self) -> bool:
        """Whether every call is let through, and none counts."""
        return self._get_is_off()

    @cached_property
    def _options(self) -> Mapping[str, CircuitOptions]:
        return self._get_options()

    @cached_property
    def _pausing(self) -> list[str]:
        return [name for name, options in self._options.items() if options.queues]

    def queues(self) -> dict[str, list[str]]:
        """The queues that are paused, with their circuits."""
        found: dict[str, list[str]] = {}
        for name in self._pausing:
            for queue in self._options[name].queues:
                found.setdefault(queue, []).append(name)
        return found

    def options_of(self, name: str) -> CircuitOptions:
        """What the app says about a circuit, or the defaults."""
        return self._options.get(name) or CircuitOptions()

    def share(self) -> None:
        """This is a worker's main process, before it has children."""
        self._page = Page()

    def start_reading(self) -> None:
        """Begin to read for the children."""
        self._is_page_ours = True
        self.wake()

    def decide_at_once(self) -> None:
        """Know what is paused before anything is consumed; never raises."""
        try:
            answer_within(FIRST_WAIT_S, self._look_at_paused)
        except Exception as exc:
            self._went_away(exc)

    def _look_at_paused(self) -> None:
        store = self._store()
        if store is not None:
            self._read(store, [self.get(name) for name in self._pausing])
            for name in self._pausing:
                self._decide(store, self.get(name))

    def wake(self) -> None:
        """There is something to tell."""
        if self._thread is None:
            self._start_thread()
        self._wake.set()

    # --- asking ------------------------------------------------------------------------

    def refresh(self, circuit: Circuit, now: float) -> None:
        """Make what is known of *circuit* fresh, or as good as can be; never raises."""
        if self.is_off:
            return
        circuit.options  # noqa: B018 -- a wrong one is said before anybody is asked
        circuit.used_at = now
        page = self._page
        if page is not None:
            circuit.is_shared = (
                page.use(circuit.name, now) and now < page.beaten_at() + USED_S
            )
            if circuit.is_shared and not self._is_away:
                note = page.read(circuit.name)
                if note is not None and now < note.read_at + FRESH_S:
                    circuit.learn(note)
                    if circuit.is_fresh(now):
                        return
        self.ask(circuit, _only_look)
        self.wake()

    def ask(self, circuit: Circuit, change: Change[Result]) -> Result:
        """
        Change a circuit for the fleet, or for this process while the store is away.

        Args:
            change: Gets the state and the store's time; returns the new state, and what
                this returns.
        """
        if not self._is_away:
            try:
                wait_s = WAIT_S if self._has_asked else FIRST_WAIT_S
                return answer_within(wait_s, lambda: self._do(circuit, change))
            except TooBusy:
                raise
            except Exception as exc:
                self._has_asked = True
                self._went_away(exc)
        return self._do(circuit, change)

    def ticket(self, circuit: Circuit, generation: int) -> int | None:
        """
        A number that no other task of the fleet has, from 0 in each generation.

        Returns:
            None: the store did not answer.
        """
        with self._lock:
            of, number, end = self._tickets.get(circuit.name, (generation, 0, 0))
            if of == generation and number < end:
                self._tickets[circuit.name] = of, number + 1, end
                return number
        store = self._local if self._is_away else self._store()
        if store is None:
            return None

        def take() -> int:
            kept_s = 2 * circuit.options.max_open_s + 3_600.0
            return store.tickets(circuit.name, generation, TICKETS, keep_s=kept_s)

        try:
            number = answer_within(WAIT_S, take)
        except Exception as exc:
            self._went_away(exc)
            return None
        with self._lock:
            self._tickets[circuit.name] = generation, number + 1, number + TICKETS
        return number

    def take_slot(self, circuit: Circuit, limit: int) -> str | None:
        """
        One of the slots for tasks that run at once.

        Returns:
            What is given back; "" where the store did not answer; None: all are taken.
        """
        store = None if self._is_away else self._store()
        if store is None:
            return ""
        token, lease_s = secrets.token_hex(8), circuit.options.probe_lease_s

        def take() -> bool:
            return store.take_slot(circuit.name, token, limit=limit, lease_s=lease_s)

        try:
            return token if answer_within(WAIT_S, take) else None
        except Exception as exc:
            self._went_away(exc)
            return ""

    def give_slot(self, circuit: Circuit, token: str) -> None:
        """Give a slot back; never raises, as it lapses."""
        store = None if self._is_away else self._store()
        if store is not None:
            try:
                answer_within(WAIT_S, lambda: store.give_slot(circuit.name, token))
            except Exception as exc:
                self._went_away(exc)

    def order(self, circuit: Circuit, change: Change[Result]) -> Result:
        """
        Change a circuit for the fleet, or not at all: an operator asks.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        return self._do(circuit, change)

    def _do(self, circuit: Circuit, change: Change[Result]) -> Result:
        store = self._local if self._is_away else self._store()
        if store is None:
            raise StoreUnavailable("the app has no store")
        if change is _only_look or not circuit.note.read_at:
            self._read(store, [circuit])
        for tried in range(TRIES):
            if tried >= QUICK_TRIES:
                time.sleep(random.uniform(0, 0.001 * tried))
            seen, before = circuit.note.stored, circuit.state
            now = circuit.store_now()
            after, result = change(before, now)
            if after == before:
                return result
            new = Stored(secrets.token_hex(8), after.to_text())
            kept_s = policy.keep_s(after, circuit.options, now)
            asked_at = self.clock()
            answer = store.swap(circuit.name, seen.version, new, keep_s=kept_s)
            stored = answer.found.get(circuit.name, Stored())
            self._learn(circuit, stored, asked_at, answer.now)
            if stored.version == new.version:
                self._changed(circuit, before, after)
                return result
        raise TooBusy

    def _read(self, store: CircuitStore, circuits: Iterable[Circuit]) -> None:
        by_name = {circuit.name: circuit for circuit in circuits}
        asked_at = self.clock()
        answer = store.read(list(by_name))
        for name, circuit in by_name.items():
            stored = answer.found.get(name, Stored())
            self._learn(circuit, stored, asked_at, answer.now)

    def _learn(
        self, circuit: Circuit, stored: Stored, asked_at: float, now: float
    ) -> None:
        self._has_asked = True
        # As of the question: the answer may have been on its way for long.
        note = Note(stored, asked_at, now - asked_at)
        circuit.learn(note)
        if self._is_page_ours and not self._is_away:
            assert self._page is not None
            self._page.write(circuit.name, circuit.note)

    def _changed(self, circuit: Circuit, before: State, after: State) -> None:
        if before.forced != after.forced:
            emit(
                "circuits.forced",
                circuit=circuit.name,
                forced=after.forced,
                until=after.forced_until,
            )
            logger.warning(
                "circuit %s is %s", circuit.name, after.forced or "forced no more"
            )
        if before.position is after.position and before.openings == after.openings:
            return
        facts = {"circuit": circuit.name, "generation": after.generation}
        if after.position is Position.OPEN:
            open_s = after.retry_at - after.opened_at
            emit("circuits.opened", **facts, open_s=open_s, openings=after.openings)
            logger.warning("circuit %s opened for %.1f s", circuit.name, open_s)
        elif after.position is Position.HALF_OPEN:
            emit("circuits.half_opened", **facts)
            logger.info("circuit %s is half-open", circuit.name)
        else:
            emit("circuits.closed", **facts)
            logger.warning("circuit %s closed", circuit.name)
        for tell in circuit.on_change:
            try:
                tell(before, after)
            except Exception:
                logger.exception("circuit %s: a listener failed", circuit.name)

    # --- without the store -------------------------------------------------------------

    def _went_away(self, exc: Exception) -> None:
        with self._lock:
            if self._is_away:
                return
            circuits = list(self._circuits.values())
            offset = next(
                (c.note.offset for c in circuits if c.note.read_at),
                time.time() - self.clock(),
            )
            local = MemoryCircuitStore(lambda: self.clock() + offset)
            for circuit in circuits:
                if circuit.note.stored.version:
                    local.swap(circuit.name, "", circuit.note.stored, keep_s=604_800.0)
            self._local = local
            self._looked_at = self.clock()
            self._is_away = True
        is_news = self._said_at is None or self.clock() > self._said_at + SAY_S
        if is_news:
            self._said_at = self.clock()
        level = logging.WARNING if is_news else logging.DEBUG
        said = "circuits are this process's own while the store is away: %s"
        logger.log(level, said, exc)
        emit("circuits.store_away", error=str(exc))
        self.wake()

    def _look_for_store(self) -> None:
        now = self.clock()
        if now < self._looked_at + LOOK_S:
            return
        self._looked_at = now
        store = self._store()
        if store is None:
            return
        try:
            store.read(list(self._circuits)[:1])
        except Exception:
            return
        with self._lock:
            self._is_away = False
            self._local = None
        logger.info("the store of circuits is back")
        emit("circuits.store_back")

    # --- the thread --------------------------------------------------------------------

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = start_deaf(self._run, "circuits")

    def _run(self) -> None:
        is_busy = True
        while True:
            self._wake.wait(POLL_S if is_busy else None)
            self._wake.clear()
            try:
                is_busy = self._work()
            except Exception as exc:
                is_busy = True
                self._went_away(exc)
            time.sleep(TELL_S)

    def _work(self) -> bool:
        """Tell what was seen, and read what is used; whether there will be more."""
        now = self.clock()
        if self._is_away:
            self._look_for_store()
        if self._is_page_ours:
            assert self._page is not None
            self._page.beat(now)
            for name, used_at in self._page.used():
                circuit = self.get(name)
                circuit.used_at = max(circuit.used_at, used_at)
            for name in self._pausing:
                self.get(name).used_at = now
        to_read = []
        for circuit in list(self._circuits.values()):
            report = circuit.take_report()
            if report is not None:
                self._tell(circuit, report)
            elif (
                now < circuit.used_at + USED_S
                and (self._is_page_ours or not circuit.is_shared)
                and (self._is_page_ours or now > circuit.note.read_at + POLL_S / 2)
            ):
                to_read.append(circuit)
        store = self._local if self._is_away else self._store()
        if to_read and store is not None:
            self._read(store, to_read)
        if self._is_page_ours:
            for name in self._pausing:
                if self._is_away or store is None:
                    # Nobody would say when it closes: each child snoozes for itself.
                    self.get(name).is_paused = False
                else:
                    self._decide(store, self.get(name))
        return bool(self._is_page_ours or self._is_away or self._is_used(now))

    def _decide(self, store: CircuitStore, circuit: Circuit) -> None:
        """Whether this worker consumes the queues of a circuit."""
        now, state = self.clock(), circuit.state
        entry = policy.entry_now(state, circuit.store_now())
        if entry is not None:
            circuit.is_paused = not entry.is_allowed
            return
        # It may be tried: by what one worker takes.
        if now >= circuit.canary_until and store.take_slot(
            f"{circuit.name[:56]}~canary",
            secrets.token_hex(8),
            limit=1,
            lease_s=CANARY_S,
        ):
            circuit.canary_until = now + CANARY_S
        circuit.is_paused = now >= circuit.canary_until

    def _tell(self, circuit: Circuit, report: Report) -> None:
        def change(state: State, now: float) -> tuple[State, None]:
            after = policy.count(
                state, circuit.options, report, now=now, chance=random.random()
            )
            return after, None

        try:
            self._do(circuit, change)
        except TooBusy:
            return  # of what so many see, one may be missing
        except ResilienceError as exc:
            if self._is_away:
                raise
            self._went_away(exc)
            self._do(circuit, change)

    def _is_used(self, now: float) -> bool:
        return any(now < c.used_at + USED_S for c in list(self._circuits.values()))

    def after_fork(self) -> None:
        """A child has no thread of its parent's, and reads the page that it shares."""
        self._lock = Lock()
        self._wake = Event()
        self._thread = None
        self._has_asked = False
        self._tickets = {}
        self._is_page_ours = False
        for circuit in self._circuits.values():
            circuit.after_fork()


def _only_look(state: State, now: float) -> tuple[State, None]:
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


_all: weakref.WeakSet[Circuits] = weakref.WeakSet()


def _in_child() -> None:
    for circuits in _all:
        circuits.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
