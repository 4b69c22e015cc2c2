"""Reads a process's own memory from Linux's /proc.

Own memory is what is resident and anonymous: neither files nor memory shared on
purpose. Sizes are in KiB.

Source: proc(5), `statm` and `clear_refs`; getrusage(2).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

if sys.platform != "win32":
    import resource

PROC = Path("/proc")

#: A peak that is this much above what a process has, just after the kernel was told
#: to forget it, is another program's: exec keeps it in a spawned child.
FOREIGN_PEAK_KIB = 8_192


class Usage(NamedTuple):
    """
    What a process has.

    Attributes:
        own_kib: Resident and anonymous.
        resident_kib: Resident, with files and what is shared.
        data_kib: What the kernel counts against RLIMIT_DATA, or a little more.
    """

    own_kib: int
    resident_kib: int
    data_kib: int


class ReadsMemory(Protocol):
    """A process's eye on its own memory."""

    def read(self) -> Usage: ...

    def forget_peak(self) -> None:
        """From now on, the peak is a new one."""
        ...

    def peak_kib(self) -> int | None:
        """The highest resident size since `forget_peak`; None: nobody knows."""
        ...

    def close(self) -> None: ...


class ProcMemory:
    """
    The memory of the process that makes it; a fork must make its own.

    Raises:
        OSError: There is no /proc.
    """

    def __init__(self) -> None:
        self._page_kib = os.sysconf("SC_PAGE_SIZE") // 1024
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._clear = self._open_clear_refs()
        if self._clear is not None:
            self.forget_peak()
            is_foreign = self._peak() > self.read().resident_kib + FOREIGN_PEAK_KIB
            if is_foreign:
                os.close(self._clear)
                self._clear = None

    @staticmethod
    def _open_clear_refs() -> int | None:
        try:
            return os.open("/proc/self/clear_refs", os.O_WRONLY)
        except OSError:  # after `celery --uid`
            return None

    def read(self) -> Usage:
        """About a microsecond."""
        _, resident, shared, _, _, data, _ = os.pread(self._statm, 128, 0).split()
        page = self._page_kib
        resident_kib = int(resident) * page
        return Usage(resident_kib - int(shared) * page, resident_kib, int(data) * page)

    def forget_peak(self) -> None:
        """Half a microsecond; nothing where the kernel does not allow it."""
        if self._clear is not None:
            os.write(self._clear, b"5")

    def peak_kib(self) -> int | None:
        """A microsecond."""
        return None if self._clear is None else self._peak()

    @staticmethod
    def _peak() -> int:
        if sys.platform == "win32":
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._statm)
        if self._clear is not None:
            os.close(self._clear)


def own_kib_of(pid: int) -> int | None:
    """Another process's own memory, in about ten microseconds; None: it has ended."""
    try:
        fields = (PROC / str(pid) / "statm").read_bytes().split()
        return (int(fields[1]) - int(fields[2])) * (os.sysconf("SC_PAGE_SIZE") // 1024)
    except (OSError, IndexError, ValueError):
        return None


def rss_mib_of(pid: int) -> float | None:
    """Another process's resident memory; None: it has ended."""
    try:
        pages = int((PROC / str(pid) / "statm").read_bytes().split()[1])
        # One that has ended, and was not waited for, has none.
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1_048_576, 1) or None
    except (OSError, IndexError, ValueError):
        return None
