"""The main process's watch over its children's memory, and the container's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.events import emit
from celery_resilience.memory import slots as s
from celery_resilience.memory.container import Container
from celery_resilience.memory.policy import (
    KIB_PER_MIB,
    Act,
    act_on_run,
    container_level,
    next_look_s,
)
from celery_resilience.memory.slots import Slots, TaskMemory
from celery_resilience.memory.task import exceeded

logger = logging.getLogger("celery_resilience.memory")

#: Seconds between two looks where no run has a limit, and at the container.
IDLE_LOOK_S = 1.0

#: Seconds that a child which was ended for the container may take to be gone.
GONE_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Hands:
    """
    What the watch does to children; made for the pool that there is.

    Attributes:
        signal: Lets the run of a child clean up.
        end: Ends a child, and says why its run failed.
    """

    signal: Callable[[int], None]
    end: Callable[[int, MemoryLimitExceeded], None]


@dataclass(slots=True)
class _Seen:
    """A child's slot when the watch last looked at it."""

    run: tuple[int, int] = (0, 0)
    signalled_at: float | None = None
    is_ended: bool = False
    recycled: int = 0


@dataclass(slots=True)
class MemoryWatch:
    """
    Looks at the children of one worker.

    Attributes:
        slots: What they tell.
        own_kib_of: Own memory of a process; None: it has ended.
        has_limits: Some run may have a limit.
        is_enforced: The system refuses allocations above it.
        recycle_kib: What a child may gain; None: any amount.
        container: Whose memory is guarded; None: nobody's.
        clock: Monotonic seconds.
    """

    slots: Slots
    own_kib_of: Callable[[int], int | None]
    has_limits: bool
    is_enforced: bool
    recycle_kib: int | None
    container: Container | None
    clock: Callable[[], float] = time.monotonic
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _container_at: float = 0.0
    _container_said: int = 0
    _freeing: tuple[int, float] | None = None

    def look(self, hands: Hands) -> float:
        """
        Look at each child; never raises an Exception.

        Returns:
            Seconds until the next look.
        """
        fullest = 0.0
        for place, slot in self.slots.places():
            seen = self._seen.setdefault(place, _Seen())
            self._tell_recycled(slot, seen)
            if slot[s.LIMIT]:
                fullest = max(fullest, self._look_at_run(slot, seen, hands))
        now = self.clock()
        if self.container is not None and now - self._container_at >= IDLE_LOOK_S:
            self._container_at = now
            self._look_at_container(self.container, hands, now)
        if not self.has_limits:
            return IDLE_LOOK_S
        return next_look_s(fullest, is_enforced=self.is_enforced)

    def _tell_recycled(self, slot: memoryview[int], seen: _Seen) -> None:
        while seen.recycled < slot[s.RECYCLED]:
            seen.recycled += 1
            emit(
                "memory.recycled",
                task=self.slots.tasks[slot[s.RECYCLED_TASK]],
                rss_mib=slot[s.RECYCLED_AT] / KIB_PER_MIB,
                growth_mib=slot[s.RECYCLED_GREW] / KIB_PER_MIB,
                limit_mib=(self.recycle_kib or 0) / KIB_PER_MIB,
            )

    def _look_at_run(self, slot: memoryview[int], seen: _Seen, hands: Hands) -> float:
        pid, run, limit_kib = slot[s.PID], slot[s.RUNS], slot[s.LIMIT]
        start_kib, task, hears = slot[s.OWN], slot[s.RUNNING], slot[s.HEARS]
        own_kib = self.own_kib_of(pid)
        if own_kib is None or not limit_kib or not task:
            return 0.0
        if seen.run != (pid, run):
            seen.run, seen.signalled_at, seen.is_ended = (pid, run), None, False
        used_kib, now = own_kib - start_kib, self.clock()
        act = act_on_run(
            used_kib,
            limit_kib,
            signalled_for_s=seen.signalled_at and now - seen.signalled_at,
            hears=bool(hears),
        )
        if seen.is_ended or (slot[s.PID], slot[s.RUNS], slot[s.LIMIT]) != (
            *(pid, run),
            limit_kib,
        ):
            return 0.0
        name = self.slots.tasks[task - 1]
        if act is Act.SIGNAL:
            seen.signalled_at = now
            hands.signal(pid)
            self._tell("memory.signalled", name, pid, used_kib, limit_kib)
        elif act is Act.KILL:
            seen.is_ended = True
            why = exceeded(
                name, limit_kib, used_kib=used_kib, how=f"its child {pid} was ended"
            )
            hands.end(pid, why)
            self._tell("memory.ended", name, pid, used_kib, limit_kib)
        return used_kib / limit_kib

    @staticmethod
    def _tell(event: str, task: str, pid: int, used_kib: int, limit_kib: int) -> None:
        used_mib, limit_mib = used_kib / KIB_PER_MIB, limit_kib / KIB_PER_MIB
        logger.warning(
            "%s in child %d has %.0f MiB more than at its start, with a limit of "
            "%.0f MiB: it is %s",
            task,
            pid,
            used_mib,
            limit_mib,
            event.rpartition(".")[2],
        )
        emit(event, task=task, pid=pid, used_mib=used_mib, limit_mib=limit_mib)

    def _look_at_container(
        self, container: Container, hands: Hands, now: float
    ) -> None:
        used_kib, limit_kib = container.used_kib(), container.limit_now_kib()
        if used_kib is None:
            return
        level = container_level(used_kib, limit_kib)
        if level > self._container_said:
            logger.warning(
                "this container has used %.0f of its %.0f MiB of memory",
                used_kib / KIB_PER_MIB,
                limit_kib / KIB_PER_MIB,
            )
            emit(
                "memory.container_filled",
                used_mib=used_kib / KIB_PER_MIB,
                limit_mib=limit_kib / KIB_PER_MIB,
            )
        self._container_said = level
        if level == 3:
            self._free_the_container(used_kib, limit_kib, hands, now)

    def _free_the_container(
        self, used_kib: int, limit_kib: int, hands: Hands, now: float
    ) -> None:
        """The largest run goes, before the kernel takes all."""
        if self._freeing is not None:
            pid, since = self._freeing
            if self.own_kib_of(pid) is not None and now - since < GONE_WITHIN_S:
                return
        running = [slot for slot in self.slots.used() if slot[s.RUNNING]]
        # One that is dead has a slot until its successor takes it.
        looked_at = [(self.own_kib_of(slot[s.PID]), slot) for slot in running]
        sizes = [(own_kib, slot) for own_kib, slot in looked_at if own_kib]
        if not sizes:
            return
        own_kib, slot = max(sizes, key=lambda size: size[0])
        pid, row = slot[s.PID], slot[s.RUNNING]
        if not row:
            return  # it has just ended
        self._freeing = (pid, now)
        name = self.slots.tasks[row - 1]
        used_mib, limit_mib = used_kib / KIB_PER_MIB, limit_kib / KIB_PER_MIB
        own_mib = own_kib / KIB_PER_MIB
        text = (
            f"the container had used {used_mib:.0f} of its {limit_mib:.0f} MiB, and "
            f"the run's child {pid} was the largest, with {own_mib:.0f} MiB: "
            "it was ended"
        )
        hands.end(
            pid,
            MemoryLimitExceeded(
                text, task=name, used_mib=round(own_mib, 1), limit_mib=limit_mib
            ),
        )
        logger.warning("%s: %s", name, text)
        emit("memory.ended", task=name, pid=pid, used_mib=own_mib, limit_mib=limit_mib)

    def report(self) -> dict[str, Any]:
        """What `celery inspect resilience_memory` answers, in MiB."""
        children = [
            {
                "pid": slot[s.PID],
                "runs": slot[s.RUNS],
                "own_mib": _mib(self.own_kib_of(slot[s.PID]) or slot[s.OWN]),
                "growth_mib": _mib(slot[s.OWN] - slot[s.START]),
                "last_task": self.slots.tasks[slot[s.LAST_TASK]],
                "last_growth_mib": _mib(slot[s.LAST_GROWTH]),
                "last_peak_mib": _mib_or_none(slot[s.LAST_PEAK]),
                "running": (
                    self.slots.tasks[slot[s.RUNNING] - 1] if slot[s.RUNNING] else None
                ),
                "recycled": slot[s.RECYCLED],
            }
            for slot in self.slots.used()
        ]
        container = self.container
        return {
            "recycle_mib": None if self.recycle_kib is None else _mib(self.recycle_kib),
            "recycled": sum(child["recycled"] for child in children),
            "children": children,
            "tasks": [_row(task) for task in self.slots.by_task()],
            "container": None
            if container is None
            else {
                "limit_mib": _mib(container.limit_now_kib()),
                "used_mib": _mib_or_none(container.used_kib()),
            },
        }


def _row(task: TaskMemory) -> dict[str, Any]:
    return {
        "task": task.task,
        "runs": task.runs,
        "growth_mib": _mib(task.growth_kib),
        "most_mib": _mib(task.most_kib),
        "peak_mib": _mib_or_none(task.peak_kib),
    }


def _mib(kib: int) -> float:
    return round(kib / KIB_PER_MIB, 2)


def _mib_or_none(kib: int | None) -> float | None:
    return None if kib is None or kib < 0 else _mib(kib)
