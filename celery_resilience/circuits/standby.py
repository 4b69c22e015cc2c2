"""Whether the fleet's store is asked, or one of this process's own while that is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from threading import Lock

from celery_resilience.circuits.circuit import Circuit
from celery_resilience.circuits.memory_store import MemoryCircuitStore
from celery_resilience.circuits.store import CircuitStore
from celery_resilience.events import emit

logger = logging.getLogger("celery_resilience.circuits")

#: Seconds between two looks whether the store is back.
LOOK_S = 1.0

#: Seconds within which it is said once that the store is away.
SAY_S = 60.0


class Standby:
    """
    The store that this process asks.

    Args:
        store: Gives the fleet's; None where the app has none.
        clock: The monotonic clock.
    """

    def __init__(
        self, store: Callable[[], CircuitStore | None], clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self._get_store = store
        #: Not None while the store is away; read once, as another thread changes it.
        self._local: MemoryCircuitStore | None = None
        self._looked_at = 0.0
        self._said_at: float | None = None
        self._lock = Lock()

    @property
    def is_away(self) -> bool:
        """The fleet's store does not answer, or there is none."""
        return self._local is not None

    def current(self) -> CircuitStore | None:
        """The store to ask now."""
        local = self._local
        return self._get_store() if local is None else local

    def shared(self) -> CircuitStore | None:
        """The fleet's store, None while it is away."""
        return None if self._local is not None else self._get_store()

    def local(self) -> CircuitStore | None:
        """This process's own store, None while the fleet's is asked."""
        return self._local

    def away(self, exc: Exception, circuits: Iterable[Circuit]) -> MemoryCircuitStore:
        """
        The fleet's store has not answered: what is known of *circuits* goes on here.

        Returns:
            The store that is asked in its place, also if that one is back by now.
        """
        with self._lock:
            local = self._local
            if local is not None:
                return local
            circuits = list(circuits)
            offset = next(
                (c.note.offset for c in circuits if c.note.read_at),
                time.time() - self.clock(),
            )
            local = MemoryCircuitStore(lambda: self.clock() + offset)
            for circuit in circuits:
                if circuit.note.stored.version:
                    local.swap(circuit.name, "", circuit.note.stored, keep_s=604_800.0)
            self._looked_at = self.clock()
            self._local = local
            is_news = self._said_at is None or self.clock() > self._said_at + SAY_S
            if is_news:
                self._said_at = self.clock()
        level = logging.WARNING if is_news else logging.DEBUG
        said = "circuits are this process's own while the store is away: %s"
        logger.log(level, said, exc)
        emit("circuits.store_away", error=str(exc))
        return local

    def look(self, names: Iterable[str]) -> None:
        """See whether the store is back, if it is time."""
        now = self.clock()
        if self._local is None or now < self._looked_at + LOOK_S:
            return
        self._looked_at = now
        store = self._get_store()
        if store is None:
            return
        try:
            store.read(list(names)[:1])
        except Exception:
            return
        with self._lock:
            self._local = None
        logger.info("the store of circuits is back")
        emit("circuits.store_back")

    def after_fork(self) -> None:
        """The child's own locks."""
        self._lock = Lock()
        local = self._local
        if local is not None:
            local.after_fork()
