"""Counts that a worker's processes share, whichever of their threads counts."""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping
from threading import Lock
from typing import Generic, TypeVar

#: Processes that can count at once; two whose pids are equal modulo this number share a
#: place, and may lose each other's count if they count in the same microsecond.
PLACES = 256

_CELL = struct.Struct("Q")

Name = TypeVar("Name", bound=Hashable)


class SharedCounts(Generic[Name]):
    """
    Counts by a name; made before the pool forks, so that children share the memory.

    What a process has counted stays though it is killed.

    Args:
        names: All there are.
    """

    def __init__(self, names: Iterable[Name]) -> None:
        self._at = {name: at for at, name in enumerate(dict.fromkeys(names))}
        self._row = _CELL.size * len(self._at)
        self._memory = mmap.mmap(-1, self._row * PLACES)
        self._own: dict[int, tuple[deque[tuple[int, int]], Lock]] = {}
        self._seen = self._memory[:]

    def add(self, name: Name, count: int = 1) -> None:
        """
        Count *count* more; of any process, thread and signal's handler.

        Raises:
            KeyError: The name is none of all.
        """
        pid = os.getpid()
        # By the pid: a lock that somebody has while its process forks is nobody's there.
        notes, lock = self._own.setdefault(pid, (deque(), Lock()))
        notes.append((self._at[name] * _CELL.size, count))
        # Not waited for: whoever has the lock writes this, too, or looks again after it.
        while notes and lock.acquire(blocking=False):
            try:
                while notes:
                    at, more = notes.popleft()
                    at += pid % PLACES * self._row
                    known = _CELL.unpack_from(self._memory, at)[0]
                    _CELL.pack_into(self._memory, at, known + more)
            finally:
                lock.release()

    def new(self) -> Mapping[Name, int]:
        """What all processes have counted since the last time; of one thread at a time."""
        memory, seen = self._memory[:], self._seen
        self._seen = memory
        found: Counter[Name] = Counter()
        for start in range(0, len(memory), self._row):
            row = slice(start, start + self._row)
            if memory[row] != seen[row]:
                now, before = map(_CELL.iter_unpack, (memory[row], seen[row]))
                for name, (count,), (known,) in zip(self._at, now, before, strict=True):
                    if count > known:
                        found[name] += count - known
        return found
