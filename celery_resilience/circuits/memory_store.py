"""Circuits of one process: while the store is away, and for apps without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

from celery_resilience.circuits.store import Answer, Stored


class MemoryCircuitStore:
    """
    `CircuitStore` in this process.

    Args:
        clock: Wall time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._tickets: dict[str, tuple[int, int]] = {}
        self._slots: dict[str, dict[str, float]] = {}
        self._circuits: dict[str, tuple[float, Stored]] = {}

    def after_fork(self) -> None:
        """The child's own lock: another thread of its parent may have held it."""
        self._lock = Lock()

    def read(self, names: Sequence[str]) -> Answer:
        """The circuits of these names."""
        with self._lock:
            now = self._clock()
            found = {name: self._get(name, now) for name in names}
        return Answer(now, {name: it for name, it in found.items() if it.version})

    def swap(self, name: str, seen: str, new: Stored, *, keep_s: float) -> Answer:
        """Replace a circuit if it still is of the version *seen*."""
        with self._lock:
            now = self._clock()
            it = self._get(name, now)
            if it.version == seen:
                self._circuits[name] = now + keep_s, new
                it = new
        return Answer(now, {name: it} if it.version else {})

    def tickets(self, name: str, generation: int, count: int, *, keep_s: float) -> int:
        """Take tickets; those of an older generation are forgotten."""
        with self._lock:
            of, first = self._tickets.get(name, (generation, 0))
            if of != generation:
                first = 0
            self._tickets[name] = generation, first + count
        return first

    def take_slot(self, name: str, token: str, *, limit: int, lease_s: float) -> bool:
        """Take one of *limit* slots for a task that runs."""
        with self._lock:
            now = self._clock()
            slots = self._slots.get(name, {})
            slots = {it: until for it, until in slots.items() if now < until}
            has_one = len(slots) < limit
            if has_one:
                slots[token] = now + lease_s
            self._slots[name] = slots
        return has_one

    def give_slot(self, name: str, token: str) -> None:
        """Give a slot back."""
        with self._lock:
            self._slots.get(name, {}).pop(token, None)

    def names(self) -> Sequence[str]:
        """The circuits that are not forgotten."""
        with self._lock:
            now = self._clock()
            return [name for name in self._circuits if self._get(name, now).version]

    def _get(self, name: str, now: float) -> Stored:
        until, it = self._circuits.get(name, (0.0, Stored()))
        return it if now < until else Stored()
