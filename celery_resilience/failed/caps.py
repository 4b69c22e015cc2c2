"""How much of failed tasks a store keeps, and the move of what is over to an archive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from celery_resilience.failed.archive import Archive
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.record import State
from celery_resilience.failed.store import FailedTaskStore, Kept, Usage

logger = logging.getLogger("celery_resilience.failed")

DAY_S = 86_400
MIB = 2**20

#: What is left of a cap after a move, so that not each failure makes another one.
LEFT = 0.9

#: In the order in which they go; what is being replayed stays.
GOING = (State.RESOLVED, State.DISCARDED, State.UNRESOLVED)

#: Failed tasks, and bytes of them, in one file of the archive.
FILE_COUNT = 1_000
FILE_BYTES = 16 * MIB

#: Shares of a cap that are collected, and seconds that pass, between two looks.
LOOK_AFTER = 0.05
LOOK_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Caps:
    """
    What the store keeps of each failed queue; None is no limit.

    Attributes:
        keep_s: Seconds since the last failure.
        max_count: Failed tasks.
        max_bytes: Bytes in the store.
    """

    keep_s: float | None = None
    max_count: int | None = None
    max_bytes: int | None = None

    def excess(self, used: Usage) -> Usage:
        """How much must go of *used*; nothing while no cap is passed."""
        return Usage(
            _excess(used.count, self.max_count), _excess(used.size, self.max_bytes)
        )


def _excess(used: int, cap: int | None) -> int:
    return 0 if cap is None or used <= cap else used - int(cap * LEFT)


class Trimmer:
    """
    Keeps a store below its caps.

    Args:
        store: The store.
        caps: What it keeps.
        archive: Takes what goes; only what it has is forgotten.
        clock: Wall time, in seconds.
    """

    def __init__(
        self,
        store: FailedTaskStore,
        caps: Caps,
        archive: Archive,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._caps = caps
        self._archive = archive
        self._clock = clock
        self._new = Usage()
        self._has_looked = False
        self._looked_at = clock()

    def after(self, new: Usage) -> None:
        """
        Look at the store, now and then, after *new* was collected.

        Raises:
            StoreUnavailable: It did not answer.
        """
        self._new = Usage(self._new.count + new.count, self._new.size + new.size)
        if self._is_time():
            self._new, self._looked_at = Usage(), self._clock()
            self._has_looked = True
            self.trim()

    def _is_time(self) -> bool:
        # Who has only read, as most commands do, looks at nothing.
        return (
            (not self._has_looked and self._new.count > 0)
            or abs(self._clock() - self._looked_at) > LOOK_AFTER_S
            or self._new.count > LOOK_AFTER * (self._caps.max_count or float("inf"))
            or self._new.size > LOOK_AFTER * (self._caps.max_bytes or float("inf"))
        )

    def trim(self) -> int:
        """
        Move what is too old or too much to the archive; returns how many.

        Raises:
            StoreUnavailable: It did not answer.
        """
        moved = 0
        try:
            for queue, used in self._store.usage().items():
                aged = self._trim_by_age(queue)
                if aged:
                    used = self._store.usage().get(queue, Usage())
                moved += aged + self._trim_by_size(queue, used)
        except OSError as exc:
            logger.error("cannot archive failed tasks, so that all are kept: %s", exc)
        return moved

    def _trim_by_age(self, queue: str) -> int:
        if self._caps.keep_s is None:
            return 0
        wanted = Filter(failed_queue=queue, until=self._clock() - self._caps.keep_s)
        return sum(
            self._move(tasks, "resilience_failed_keep_days", queue)
            for tasks in self._oldest(wanted)
        )

    def _trim_by_size(self, queue: str, used: Usage) -> int:
        left = self._caps.excess(used)
        cap = "resilience_failed_max" if left.count > 0 else "resilience_failed_max_mib"
        moved = 0
        batches = self._oldest(Filter(failed_queue=queue))
        while left.count > 0 or left.size > 0:
            going: list[Kept] = []
            for kept in next(batches, ()):
                if left.count <= 0 and left.size <= 0:
                    break
                left = Usage(left.count - 1, left.size - kept.size)
                going.append(kept)
            if not going:
                break
            moved += self._move(going, cap, queue)
        return moved

    def _oldest(self, wanted: Filter) -> Iterator[list[Kept]]:
        """What may go, as much at once as a file takes, oldest first."""
        for state in GOING:
            summaries = self._store.list(
                replace(wanted, state=state), oldest_first=True
            )
            tasks: list[Kept] = []
            size = 0
            for kept in self._store.kept(summary.id for summary in summaries):
                tasks.append(kept)
                size += kept.size
                if len(tasks) == FILE_COUNT or size > FILE_BYTES:
                    yield tasks
                    tasks, size = [], 0
            if tasks:
                yield tasks

    def _move(self, tasks: list[Kept], cap: str, queue: str) -> int:
        path = self._archive.put(tasks)
        removed = self._store.remove(tasks)
        unresolved = sum(
            kept.record.state is State.UNRESOLVED and kept.record.id in removed
            for kept in tasks
        )
        logger.warning(
            "moved %d failed tasks of %s, %d of them unresolved, to %s (%s); "
            "`failed import` brings them back",
            len(removed),
            queue,
            unresolved,
            path,
            cap,
        )
        return len(removed)
