"""Around a task body, in the process that runs it: its limit, its peak, its growth."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.memory import slots as s
from celery_resilience.memory.policy import KIB_PER_MIB, Sustained, share_of
from celery_resilience.memory.proc import ReadsMemory, Usage
from celery_resilience.memory.slots import (
    GREW,
    GREW_MOST,
    LAST_GROWTH,
    LAST_PEAK,
    LAST_TASK,
    OWN,
    PEAK,
    ROW,
    RUNNING,
    RUNS,
    SLOT,
    Slots,
)
from celery_resilience.soft_limit import MEMORY_SIGNAL, waiting_handler

if sys.platform != "win32":
    import resource

logger = logging.getLogger("celery_resilience.memory")


#: Seconds of a run in which no memory to speak of is given back, and between two in
#: which none is taken: what costs more than a run without a body is then not asked.
SHORT_S = 0.001
GAP_S = 0.001

#: The system's mark of the highest is as exact as this.
NEAR_KIB = 256


class RunLimits:
    """
    How much memory a run of each task may take.

    Args:
        default: The worker's, in MiB or as a share; None: no limit.
        whole_kib: What shares are shares of.
        own: The tasks' own, by name.
    """

    def __init__(
        self,
        default: float | str | None,
        whole_kib: int,
        own: Mapping[str, float | str],
    ) -> None:
        self._default_kib = 0 if default is None else share_of(default, whole_kib)
        self._own_kib = {
            name: share_of(amount, whole_kib) for name, amount in own.items()
        }

    def of(self, task: str) -> int:
        """KiB for a run of *task*; 0: no limit."""
        return self._own_kib.get(task, self._default_kib)

    @property
    def are_any(self) -> bool:
        """Whether some task has one."""
        return bool(self._default_kib or any(self._own_kib.values()))


def lifts_data_limit() -> Callable[[], object] | None:
    """
    What gives this process back the memory that a run's limit denies it.

    Where there is none left, an exception's handler cannot even make a number: all
    that it needs is made here.
    """
    if sys.platform == "win32":
        return None
    return partial(
        resource.setrlimit,
        resource.RLIMIT_DATA,
        resource.getrlimit(resource.RLIMIT_DATA),
    )


class MemoryAround:
    """
    The room memory around each body.

    Made in the main process; a prefork child enters it by `enter_child`. The other
    pools' bodies share one process, whose growth only is looked at.

    Args:
        slots: Shared with the main process.
        limits: Of the runs.
        make_reader: An eye on the memory of the process that calls it; None: there
            is no way to look.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        slots: Slots | None,
        limits: RunLimits,
        make_reader: Callable[[], ReadsMemory] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self._limits = limits
        self._make_reader = make_reader
        self.clock = clock
        self.reader: ReadsMemory | None = None
        self.cells: memoryview[int] = memoryview(bytearray(8 * s.SLOT)).cast("q")
        self._is_child = False
        self._limit_kib = 0
        self._hears = False
        self.usage = Usage(0, 0, 0)
        self.start_kib = 0
        self._sustained: Sustained | None = None
        self._always_looks = limits.are_any
        self._told: dict[str, tuple[int, int]] = {}
        self._rows_at_start: list[int] = []
        # The system's mark of the highest, which only rises until it is forgotten, and
        # whether it was above what there was when a run ended.
        self._mark_kib: int | None = None
        self._is_above = False
        self._began_at = 0.0
        self._ended_at = -GAP_S
        self.lift: Callable[[], object] | None = None
        if limits.are_any:
            self.lift = lifts_data_limit()

    # --- where it is ------------------------------------------------------------------

    def enter_child(self, place: int) -> None:
        """This process is a child of a prefork pool, at *place* in it."""
        if self._make_reader is None:
            return
        self.reader = self._make_reader()
        self.usage = self.reader.read()
        self.start_kib = self.usage.own_kib
        slot = None if self.slots is None else self.slots.opened(place)
        if slot is None:
            size = s.SLOT + s.ROW * (1 if self.slots is None else len(self.slots.tasks))
            slot = memoryview(bytearray(8 * size)).cast("q")
        slot[s.START] = slot[s.OWN] = self.start_kib
        self.cells = slot
        self._rows_at_start = slot[s.SLOT :].tolist()
        self._is_child = True

    def enter_main(self, sustained: Sustained) -> None:
        """Bodies run in this process, which cannot be recycled."""
        if self._make_reader is None or self.reader is not None:
            return
        self.reader = self._make_reader()
        self.usage = self.reader.read()
        self.start_kib = self.usage.own_kib
        self._sustained = sustained

    @property
    def growth_kib(self) -> int:
        """What this process has gained since its start."""
        return self.usage.own_kib - self.start_kib

    @property
    def runs(self) -> int:
        """Runs that this child has started."""
        return self.cells[s.RUNS]

    def look_again(self) -> None:
        """This process has given memory back."""
        if self.reader is not None:
            self.usage = self.reader.read()
            self.cells[s.OWN] = self.usage.own_kib

    def forgive(self) -> None:
        """Count what this process has now as what it had at its start."""
        self.start_kib = self.cells[s.START] = self.usage.own_kib

    def grown_by_task(self) -> list[tuple[str, int, int]]:
        """Each task that ran in this child: its runs, and KiB; most first."""
        found = []
        for row, name in enumerate([""] if self.slots is None else self.slots.tasks):
            at = s.ROW * row
            now, start = self.cells[s.SLOT + at :], self._rows_at_start[at:]
            runs, grew_kib = now[s.ENDED] - start[s.ENDED], now[s.GREW] - start[s.GREW]
            if runs:
                found.append((name, runs, grew_kib))
        return sorted(found, key=lambda task: -task[2])

    # --- around a body ----------------------------------------------------------------

    def before(self, task: Any, request: Any) -> None:
        """The body starts."""
        if not self._is_child:
            return
        try:
            self._started(task.name)
        except Exception:
            self._give_up()

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """
        The body has ended.

        Raises:
            MemoryLimitExceeded: In place of the MemoryError to which its limit led.
        """
        if self.reader is None:
            return
        limit_kib, self._limit_kib = self._limit_kib, 0
        if limit_kib and self.lift is not None:
            self.lift()
        if limit_kib and isinstance(exc, MemoryError):
            # Its frames hold what there was too much of.
            traceback.clear_frames(exc.__traceback__)
        try:
            growth_kib, peak_kib = self._ended(limit_kib)
        except Exception:
            self._give_up()
            return
        if limit_kib and isinstance(exc, MemoryError):
            raise exceeded(
                task.name,
                limit_kib,
                used_kib=max(peak_kib, growth_kib),
                how="an allocation above it was refused",
            )

    def _started(self, name: str) -> None:
        cells, reader = self.cells, self.reader
        assert reader is not None
        row, limit_kib = self._told.get(name) or self._tell(name)
        cells[RUNS] += 1
        cells[RUNNING] = row + 1
        self._began_at = now = self.clock()
        if self._is_above or now - self._ended_at >= GAP_S:
            reader.forget_peak()
        if limit_kib:
            self._hear()
            cells[s.LIMIT] = limit_kib
            if self.lift is not None:
                self._deny_above(self.usage.data_kib + limit_kib)
            # Last: from here on a signal raises.
            self._limit_kib = limit_kib

    def _tell(self, name: str) -> tuple[int, int]:
        """The row and the limit of a task, which stay the same."""
        row = 0 if self.slots is None else self.slots.row(name)
        told = self._told[name] = row, self._limits.of(name)
        return told

    def _ended(self, limit_kib: int) -> tuple[int, int]:
        """Growth of the run, and its peak above its start."""
        cells, reader = self.cells, self.reader
        assert reader is not None
        if not self._is_child:
            self.usage = reader.read()
            if self._sustained is not None:
                self._sustained.run_ended(self.growth_kib, self.clock())
            return 0, 0
        row = cells[RUNNING] - 1
        cells[RUNNING] = 0
        if limit_kib:
            cells[s.LIMIT] = 0
        own_before, resident_before, _ = self.usage
        peak = reader.peak_kib()
        self._ended_at = now = self.clock()
        growth_kib = 0
        if (
            peak is None
            or peak != self._mark_kib
            or now - self._began_at >= SHORT_S
            or self._always_looks
        ):
            self.usage = reader.read()
            own_kib, resident_kib, _ = self.usage
            cells[OWN] = own_kib
            growth_kib = own_kib - own_before
            self._mark_kib = peak
            self._is_above = peak is not None and peak > resident_kib + NEAR_KIB
        peak_kib = -1 if peak is None else max(0, peak - resident_before)
        cells[LAST_TASK] = row
        cells[LAST_GROWTH] = growth_kib
        cells[LAST_PEAK] = peak_kib
        at = SLOT + ROW * row
        cells[at] += 1
        if growth_kib:
            cells[at + GREW] += growth_kib
            cells[at + GREW_MOST] = max(cells[at + GREW_MOST], growth_kib)
        cells[at + PEAK] = max(cells[at + PEAK], peak_kib)
        return growth_kib, peak_kib

    @staticmethod
    def _deny_above(data_kib: int) -> None:
        if sys.platform == "win32":
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        ours = data_kib * 1024
        for limit in (soft, hard):
            if limit != resource.RLIM_INFINITY:
                ours = min(ours, limit)
        resource.setrlimit(resource.RLIMIT_DATA, (ours, hard))

    def _hear(self) -> None:
        """Let the main process's signal fail the run, from the first limited one on."""
        if self._hears or MEMORY_SIGNAL is None:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(MEMORY_SIGNAL, waiting_handler(self._signalled))
        self._hears = True
        self.cells[s.HEARS] = 1

    def _signalled(self, signum: int, frame: Any) -> None:
        """
        The main process has seen a run above its limit.

        Raises:
            MemoryLimitExceeded: Within the body, which may clean up.
        """
        limit_kib, reader = self._limit_kib, self.reader
        if not limit_kib or reader is None:
            return  # it has just ended
        used_kib = reader.read().own_kib - self.cells[s.OWN]
        name = "" if self.slots is None else self._name()
        raise exceeded(name, limit_kib, used_kib=used_kib, how="it was signalled")

    def _name(self) -> str:
        assert self.slots is not None
        return self.slots.tasks[self.cells[s.RUNNING] - 1]

    def _give_up(self) -> None:
        """Say once that nobody looks at this process's memory any more."""
        logger.exception("memory of process %d is not measured any more", os.getpid())
        self._is_child, self.reader, self._limit_kib = False, None, 0
        with contextlib.suppress(Exception):
            # The main process ends no child for a run that it believes to go on.
            self.cells[RUNNING] = self.cells[s.LIMIT] = 0
        if self.lift is not None:
            self.lift()


def exceeded(
    task: str, limit_kib: int, *, used_kib: int, how: str
) -> MemoryLimitExceeded:
    """Why a run failed, with the figures."""
    limit_mib, used_mib = limit_kib / KIB_PER_MIB, max(0, used_kib) / KIB_PER_MIB
    return MemoryLimitExceeded(
        f"the run had {used_mib:.0f} MiB more than at its start, with a limit of "
        f"{limit_mib:.0f} MiB: {how}",
        task=task,
        used_mib=round(used_mib, 1),
        limit_mib=round(limit_mib, 1),
    )
