"""The watch over memory runs beside the consumer, and is armed again with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from celery import bootsteps

from celery_resilience import _pools
from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.events import emit
from celery_resilience.memory.policy import KIB_PER_MIB, Sustained
from celery_resilience.memory.recycling import give_back
from celery_resilience.memory.task import MemoryAround
from celery_resilience.memory.watch import IDLE_LOOK_S, Hands, MemoryWatch
from celery_resilience.soft_limit import MEMORY_SIGNAL

logger = logging.getLogger("celery_resilience.memory")

#: What a worker says to its supervisor when it ends because it grew.
EXIT_OVER_LIMIT = 12


@dataclass(slots=True)
class MemorySetup:
    """
    Memory in one worker.

    Attributes:
        around: The room around the bodies.
        watch: The main process's.
        recycle_kib: What a process may gain; None: any amount.
        because: Told why the run of a child has failed that is about to end.
    """

    around: MemoryAround
    watch: MemoryWatch
    recycle_kib: int | None
    because: Callable[[int, MemoryLimitExceeded], None]


class MemoryStep(bootsteps.StartStopStep):
    """
    Looks at the children again and again.

    Attributes:
        setup: What it looks with.
    """

    label = "Resilience: memory"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    setup: ClassVar[MemorySetup]

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        self._entry: Any = None
        self._timer: Any = None
        self._pool: Any = None
        self._sustained: Sustained | None = None
        self._is_over = False
        self._has_said = False
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        """Look from now on; the pool may be another one than before."""
        self._cancel()
        self._pool = consumer.pool
        self._timer = _pools.unblocked_timer(consumer)
        consumer.resilience_memory = self.setup
        if _pools.is_prefork(self._pool):
            _pools.look_again_for_ended_children(self._pool, consumer.hub)
            self._arm(self._look_at_children, IDLE_LOOK_S)
            return
        if self.setup.watch.has_limits and not self._has_said:
            self._has_said = True
            logger.warning(
                "memory_limit_mib is for the prefork pool: here a run may take all "
                "memory that there is"
            )
        if self.setup.recycle_kib is not None:
            if self._sustained is None:
                self._sustained = Sustained(self.setup.recycle_kib)
                self.setup.around.enter_main(self._sustained)
            self._arm(self._look_at_this_process, IDLE_LOOK_S)

    def _arm(self, look: Any, after_s: float) -> None:
        def again() -> None:
            next_s = IDLE_LOOK_S
            try:
                next_s = look()
            except Exception:
                logger.exception("could not look at memory")
            finally:
                if self._entry is not None:
                    self._entry = self._timer.call_after(next_s, again)

        self._entry = self._timer.call_after(after_s, again)

    def _look_at_children(self) -> float:
        return self.setup.watch.look(Hands(signal=signal_child, end=self._end))

    def _end(self, pid: int, why: MemoryLimitExceeded) -> None:
        self.setup.because(pid, why)
        _pools.end_child(self._pool, pid)

    def _look_at_this_process(self) -> float:
        around, sustained = self.setup.around, self._sustained
        if around.reader is None or sustained is None or self._is_over:
            return IDLE_LOOK_S
        limit_kib = self.setup.recycle_kib or 0
        growth_kib = around.reader.read().own_kib - around.start_kib
        if sustained.is_sustained(growth_kib, around.clock()):
            give_back()
            growth_kib = around.reader.read().own_kib - around.start_kib
            self._is_over = sustained.is_sustained(growth_kib, around.clock())
        if self._is_over:
            growth_mib, limit_mib = growth_kib / KIB_PER_MIB, limit_kib / KIB_PER_MIB
            logger.warning(
                "this worker has gained %.0f MiB, above %.0f MiB, and its pool has no "
                "child to recycle: it finishes what runs, and exits with code %d",
                growth_mib,
                limit_mib,
                EXIT_OVER_LIMIT,
            )
            emit("memory.worker_over_limit", growth_mib=growth_mib, limit_mib=limit_mib)
        return IDLE_LOOK_S

    def stop(self, consumer: Any) -> None:
        """Nothing yet: tasks still run."""

    def shutdown(self, consumer: Any) -> None:
        """The worker ends."""
        self._cancel()

    def _cancel(self) -> None:
        if self._entry is not None:
            entry, self._entry = self._entry, None
            self._timer.cancel(entry)


def signal_child(pid: int) -> None:
    """Let the run of a child fail, and clean up."""
    if MEMORY_SIGNAL is not None:
        try:
            os.kill(pid, MEMORY_SIGNAL)
        except ProcessLookupError:
            logger.info("child %d has ended meanwhile", pid)


def memory_step(setup: MemorySetup) -> type[Any]:
    """A step for one app's worker."""
    return type("MemoryStep", (MemoryStep,), {"setup": setup})
