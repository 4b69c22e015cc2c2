"""The few bytes that a worker shares with the children that it forks.

Written by the main process, read by all: whether the worker drains, and which
child it means to end.
"""

from __future__ import annotations

import mmap
import struct

#: Pids that can be noted at once; two children whose pids are equal modulo this
#: number share a place, in which the later note counts.
PLACES = 16_384

_PID = struct.Struct("I")


class SharedFlags:
    """Made before the pool forks, so that every child has the same bytes."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PID.size * (PLACES + 1))

    @property
    def is_draining(self) -> bool:
        """The worker takes no new tasks, and ends."""
        return self._memory[0] != 0

    def drain(self) -> None:
        """Say so to every child."""
        self._memory[0] = 1

    def mean(self, pid: int) -> None:
        """The next SIGTERM of the child *pid* is the main process's own."""
        _PID.pack_into(self._memory, _place(pid), pid)

    def is_meant(self, pid: int) -> bool:
        """Whether the main process has said so."""
        return bool(_PID.unpack_from(self._memory, _place(pid))[0] == pid)


def _place(pid: int) -> int:
    return _PID.size * (pid % PLACES + 1)


#: Those of the worker in this process, or of the one that has forked it.
_flags: SharedFlags | None = None


def share() -> SharedFlags:
    """Main process of a worker: make its flags, before the pool forks."""
    global _flags
    _flags = SharedFlags()
    return _flags


def unshare(flags: SharedFlags) -> None:
    """The worker of these has ended, and its process goes on without one."""
    global _flags
    if _flags is flags:
        _flags = None


def shared() -> SharedFlags | None:
    """The flags of the worker; None outside of one, and in a spawned child."""
    return _flags


def is_draining() -> bool:
    """Whether the worker of this process drains."""
    return _flags is not None and _flags.is_draining
