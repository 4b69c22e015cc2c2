"""What children tell of their memory, in memory that they share with the main process.

One slot for each child by its place in the pool, and in it one row for each task;
all of them are 64-bit numbers, which one process writes and another reads. A
child that takes a dead one's place goes on with its counts.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Children of one worker that can tell; what is never written takes no memory.
MAX_CHILDREN = 512

#: Tasks that are told apart; the others share the first row.
MAX_TASKS = 1_000
OTHER_TASKS = "(other tasks)"

# The head, of all children.
HIGHEST, FRESH_OVER, BRAKED = 0, 1, 2
HEAD = 4

# A slot.
(
    PID,
    RUNS,  # of this child, started
    RUNNING,  # the row of the task that runs, plus 1; 0: none
    START,  # own memory at the child's start
    OWN,  # own memory after its last run, and so at the start of the present one
    LIMIT,  # of the run; 0: none
    HEARS,  # 1: a signal makes the run fail
    RECYCLED,  # children of this place that were recycled
    RECYCLED_AT,  # own memory of the last of them
    RECYCLED_GREW,  # what it had gained
    RECYCLED_TASK,  # the row of the task that gained most in it
    LAST_TASK,
    LAST_PEAK,  # -1: nobody knows
    LAST_GROWTH,
) = range(14)
SLOT = 16

# A row of a slot.
ENDED, GREW, GREW_MOST, PEAK = range(4)
ROW = 4


@dataclass(frozen=True, slots=True)
class TaskMemory:
    """
    What the runs of a task have done to their children's memory.

    Attributes:
        growth_kib: What all of them have left behind together.
        most_kib: What the worst of them has left behind.
        peak_kib: The highest above its start; None: nobody knows.
    """

    task: str
    runs: int
    growth_kib: int
    most_kib: int
    peak_kib: int | None


class Slots:
    """
    The shared memory of one worker.

    Args:
        tasks: Names of the tasks that are told apart.
        opened: The file of another process's slots; None: make new ones.
    """

    def __init__(self, tasks: Sequence[str], opened: int | None = None) -> None:
        self.tasks = [OTHER_TASKS, *tasks[:MAX_TASKS]]
        self._rows = {name: row for row, name in enumerate(self.tasks)}
        self._stride = SLOT + ROW * len(self.tasks)
        size = 8 * (HEAD + self._stride * MAX_CHILDREN)
        self.descriptor = _shared_file(size) if opened is None else opened
        if self.descriptor is None:
            self._memory = mmap.mmap(-1, size)
        else:
            self._memory = mmap.mmap(self.descriptor, size)
        self.cells = memoryview(self._memory).cast("q")

    @classmethod
    def of_process(cls, tasks: Sequence[str], pid: int, descriptor: int) -> Slots:
        """
        The slots of a main process of which this one has copied nothing.

        Raises:
            OSError: They cannot be had.
        """
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
        return cls(tasks, opened)

    def row(self, task: str) -> int:
        """The row of a task."""
        return self._rows.get(task, 0)

    def slot(self, place: int) -> memoryview[int] | None:
        """The slot of the child at *place*, or None."""
        if not 0 <= place < MAX_CHILDREN:
            return None
        start = HEAD + self._stride * place
        return self.cells[start : start + self._stride]

    def opened(self, place: int) -> memoryview[int] | None:
        """Child: its slot, with its counts of this child at zero."""
        slot = self.slot(place)
        if slot is not None:
            for cell in (PID, RUNS, RUNNING, LIMIT, HEARS, LAST_GROWTH):
                slot[cell] = 0
            slot[PID] = os.getpid()
            self.cells[HIGHEST] = max(self.cells[HIGHEST], place + 1)
        return slot

    def places(self) -> Iterator[tuple[int, memoryview[int]]]:
        """The slots that a child has, by its place; not one that is being opened."""
        for place in range(self.cells[HIGHEST]):
            slot = self.slot(place)
            if slot is not None and slot[PID]:
                yield place, slot

    def used(self) -> Iterator[memoryview[int]]:
        """The slots of `places`."""
        for _, slot in self.places():
            yield slot

    def by_task(self) -> list[TaskMemory]:
        """The tasks that have run, those that grew most first."""
        found = []
        slots = [*self.used()]
        for row, name in enumerate(self.tasks):
            at = SLOT + ROW * row
            runs = sum(slot[at + ENDED] for slot in slots)
            if not runs:
                continue
            peak = max(slot[at + PEAK] for slot in slots)
            found.append(
                TaskMemory(
                    task=name,
                    runs=runs,
                    growth_kib=sum(slot[at + GREW] for slot in slots),
                    most_kib=max(slot[at + GREW_MOST] for slot in slots),
                    peak_kib=peak if peak > 0 else None,
                )
            )
        return sorted(found, key=lambda task: -task.growth_kib)


def _shared_file(size: int) -> int | None:
    """A file in memory that a spawned child can open, where there are such files."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("celery-resilience-memory")
    os.ftruncate(descriptor, size)
    return descriptor
