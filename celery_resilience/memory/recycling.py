"""A child that grew ends between two tasks. In the child."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import time
from collections.abc import Callable

from celery_resilience.memory import slots as s
from celery_resilience.memory.policy import KIB_PER_MIB, Brake, Trims, is_over
from celery_resilience.memory.task import MemoryAround

logger = logging.getLogger("celery_resilience.memory")

#: Tasks that are named with a child that was recycled.
NAMED = 3


def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's, which gives free memory back to the system; None: another libc."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back(trim: Callable[[int], int] | None = None) -> None:
    """Collect garbage, and give free memory back to the system; up to 0.1 s."""
    gc.collect()
    trim = trim or _malloc_trim()
    if trim is not None:
        trim(0)


class Recycler:
    """
    Decides, before a child waits for its next job, whether it ends instead.

    Args:
        around: What measures this child.
        limit_kib: What it may gain between its start and its end.
        clock: Monotonic seconds.
        trim: Gives free memory back to the system.
    """

    def __init__(
        self,
        around: MemoryAround,
        limit_kib: int,
        clock: Callable[[], float] = time.monotonic,
        trim: Callable[[int], int] | None = None,
    ) -> None:
        self._around = around
        self._limit_kib = limit_kib
        self._clock = clock
        self._trim = trim or _malloc_trim()
        self._trims = Trims()
        self._is_forgiven = False

    def should_end(self, jobs: int) -> bool:
        """
        Whether this child is over its limit, and stays there when it is tidied.

        Args:
            jobs: Tasks that it has run, those that are not resilient too.
        """
        around = self._around
        around.look_again()
        if not is_over(around.growth_kib, self._limit_kib):
            return False
        self._tidy()
        if not is_over(around.growth_kib, self._limit_kib) or self._forgives(jobs):
            return False
        self._say(jobs)
        return True

    def _tidy(self) -> None:
        around, now = self._around, self._clock()
        if around.reader is None or not self._trims.may_trim(now):
            return
        before_kib = around.growth_kib
        give_back(self._trim)
        around.look_again()
        self._trims.trimmed(before_kib, around.growth_kib, now)

    def _forgives(self, jobs: int) -> bool:
        """Whether what fresh children gain is counted as what they start with."""
        around, slots = self._around, self._around.slots
        if slots is None:
            return False
        head = slots.cells
        was = Brake(head[s.FRESH_OVER], bool(head[s.BRAKED]))
        brake = was.over(jobs)
        head[s.FRESH_OVER], head[s.BRAKED] = brake.in_a_row, int(brake.is_on)
        if self._is_forgiven or not brake.forgives(jobs):
            return False
        self._is_forgiven = True
        if not was.is_on:
            logger.warning(
                "fresh children gain more than --memory-recycle-mib %.0f in their first "
                "runs (this one %.0f MiB): it is below what a child needs. What a fresh "
                "child gains is counted from now on as what it had at its start",
                self._limit_kib / KIB_PER_MIB,
                around.growth_kib / KIB_PER_MIB,
            )
        around.forgive()
        return True

    def _say(self, jobs: int) -> None:
        around = self._around
        cells, slots = around.cells, around.slots
        grew = around.grown_by_task()
        named = ", ".join(
            f"{task} {grew_kib / KIB_PER_MIB:.1f} MiB in {runs} runs"
            for task, runs, grew_kib in grew[:NAMED]
        )
        logger.warning(
            "child %d is recycled: it has gained %.0f MiB in %d runs, above %.0f MiB; "
            "most by %s",
            os.getpid(),
            around.growth_kib / KIB_PER_MIB,
            jobs,
            self._limit_kib / KIB_PER_MIB,
            named or "nobody knows whom",
        )
        cells[s.RECYCLED_AT] = around.usage.own_kib
        cells[s.RECYCLED_GREW] = around.growth_kib
        cells[s.RECYCLED_TASK] = slots.row(grew[0][0]) if slots and grew else 0
        cells[s.RECYCLED] += 1
