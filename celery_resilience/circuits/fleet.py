"""What one process asks the store of circuits, and tells it.

Calls ask only where a probe may run; a thread reads what is used, and tells what was
seen, several at once.
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from threading import Event, Lock, Thread

from celery_resilience.chance import between, chance
from celery_resilience.circuits import pausing, policy
from celery_resilience.circuits.circuit import (
    FRESH_S,
    Change,
    Circuit,
    Result,
    check_name,
    only_look,
)
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.page import Note, Page
from celery_resilience.circuits.policy import Report, State
from celery_resilience.circuits.probing import Prober
from celery_resilience.circuits.standby import Standby
from celery_resilience.circuits.store import CircuitStore, Stored
from celery_resilience.circuits.telling import tell_change
from celery_resilience.deadline import answer_within
from celery_resilience.errors import ResilienceError, StoreUnavailable, TooBusy
from celery_resilience.forks import thread_gate
from celery_resilience.threads import start_deaf

#: Seconds between two reads of what is used.
POLL_S = 0.25

#: Seconds between two tellings.
TELL_S = 0.1

#: Seconds that a call waits for the store: once, then it does without.
WAIT_S = 0.1

#: The same for the first call of a process, which makes the connection.
FIRST_WAIT_S = 2.0

#: Seconds after its last call for which a circuit is read.
USED_S = 10.0

#: Tickets that a process takes at once.
TICKETS = 10

#: How often is tried what another process was quicker with.
TRIES = 50
QUICK_TRIES = 3


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
        self._standby = Standby(store, clock)
        self._prober = Prober()
        self._get_options = options
        self._get_is_off = is_off
        self._page: Page | None = None
        self._is_page_ours = False
        self._circuits: dict[str, Circuit] = {}
        self._has_asked = False
        self._tickets: dict[str, tuple[int, int, int]] = {}
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

    @cached_property
    def _probing(self) -> list[str]:
        return [name for name, options in self._options.items() if options.probe]

    def queues(self) -> dict[str, list[str]]:
        """The queues that are paused, with their circuits."""
        return pausing.paused_queues(self._options)

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
        store = self._standby.shared()
        if store is not None:
            paused = [self.get(name) for name in self._pausing]
            self._read(store, paused)
            for circuit in paused:
                pausing.decide(store, circuit, self.clock())

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
            if circuit.is_shared and not self._standby.is_away:
                note = page.read(circuit.name)
                if note is not None and now < note.read_at + FRESH_S:
                    circuit.learn(note)
                    if circuit.is_fresh(now):
                        return
        self.ask(circuit, only_look)
        self.wake()

    def ask(self, circuit: Circuit, change: Change[Result]) -> Result:
        """
        Change a circuit for the fleet, or for this process while the store is away.

        Args:
            change: Gets the state and the store's time; returns the new state, and what
                this returns.
        """
        if self._standby.is_away:
            return self._do(circuit, change, self._standby.current())
        try:
            wait_s = WAIT_S if self._has_asked else FIRST_WAIT_S
            store = self._standby.shared()
            return answer_within(wait_s, lambda: self._do(circuit, change, store))
        except TooBusy:
            raise
        except Exception as exc:
            self._has_asked = True
            return self._do(circuit, change, self._went_away(exc))

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
        store = self._standby.current()
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
        One of the slots for tasks that run at once: of this process, while the store is
        away.

        Returns:
            What is given back; None: all are taken.
        """
        token, lease_s = secrets.token_hex(8), circuit.options.probe_lease_s
        lock, is_taken, is_given_up = Lock(), False, False

        def take(store: CircuitStore) -> bool:
            nonlocal is_taken
            taken = store.take_slot(circuit.name, token, limit=limit, lease_s=lease_s)
            with lock:
                is_taken, is_late = taken, is_given_up
            if taken and is_late:
                # Nobody runs in it: kept, it would be missing for the whole lease.
                store.give_slot(circuit.name, token)
            return taken

        store = self._standby.shared() or self._standby.local()
        if store is None:
            return token
        try:
            answer_within(WAIT_S, partial(take, store))
        except Exception:
            # The next question finds out whether it is away, or was slow once.
            with lock:
                is_given_up = not is_taken
        return token if is_taken else None

    def give_slot(self, circuit: Circuit, token: str) -> None:
        """Give a slot back; never raises, as it lapses."""
        store = self._standby.shared()
        if store is None:
            local = self._standby.local()
            if local is not None:
                local.give_slot(circuit.name, token)
            return
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
        return self._do(circuit, change, self._standby.current())

    def _do(
        self, circuit: Circuit, change: Change[Result], store: CircuitStore | None
    ) -> Result:
        if store is None:
            raise StoreUnavailable("the app has no store")
        if change is only_look or not circuit.note.read_at:
            self._read(store, [circuit])
        for tried in range(TRIES):
            if tried >= QUICK_TRIES:
                time.sleep(between(0, 0.001 * tried))
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
                tell_change(circuit, before, after)
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
        if self._is_page_ours and not self._standby.is_away:
            assert self._page is not None
            self._page.write(circuit.name, circuit.note)

    def _went_away(self, exc: Exception) -> CircuitStore:
        """The store of this process that is asked from now on; never raises."""
        local = self._standby.away(exc, list(self._circuits.values()))
        self.wake()
        return local

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
                with thread_gate.inside():
                    is_busy = self._work()
            except Exception as exc:
                is_busy = True
                self._went_away(exc)
            time.sleep(TELL_S)

    def _work(self) -> bool:
        """Tell what was seen, and read what is used; whether there will be more."""
        now = self.clock()
        self._standby.look(list(self._circuits))
        if self._is_page_ours:
            assert self._page is not None
            self._page.beat(now)
            for name, used_at in self._page.used():
                circuit = self.get(name)
                circuit.used_at = max(circuit.used_at, used_at)
            for name in (*self._pausing, *self._probing):
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
        store = self._standby.current()
        if to_read and store is not None:
            self._read(store, to_read)
        if self._is_page_ours:
            for name in self._pausing:
                pausing.decide(self._standby.shared(), self.get(name), self.clock())
            for name in self._probing:
                self._prober.look(self.get(name))
        return self._is_page_ours or self._standby.is_away or self._is_used(now)

    def _tell(self, circuit: Circuit, report: Report) -> None:
        def change(state: State, now: float) -> tuple[State, None]:
            after = policy.count(
                state, circuit.options, report, now=now, chance=chance()
            )
            return after, None

        try:
            try:
                self._do(circuit, change, self._standby.current())
            except TooBusy:
                raise
            except ResilienceError as exc:
                self._do(circuit, change, self._went_away(exc))
        except TooBusy:
            return  # of what so many see, one may be missing

    def _is_used(self, now: float) -> bool:
        return any(now < c.used_at + USED_S for c in list(self._circuits.values()))

    def after_fork(self) -> None:
        """A child has no thread of its parent's, and reads the page that it shares."""
        self._lock = Lock()
        self._standby.after_fork()
        self._wake = Event()
        self._thread = None
        self._has_asked = False
        self._tickets = {}
        self._is_page_ours = False
        for circuit in self._circuits.values():
            circuit.after_fork()


_all: weakref.WeakSet[Circuits] = weakref.WeakSet()


def _in_child() -> None:
    for circuits in _all:
        circuits.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
