"""The main process's side: counts a dead child, and tells what it died of."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from celery_resilience.crashes.policy import AfterCrash, after_crash

#: Where a container's kernel counts the processes that it killed for memory.
CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")


class CrashJudge:
    """
    Bounds the runs that end with their child.

    Args:
        max_crashes: The app's limit, for tasks without their own.
        window_s: Older crashes are forgotten.
        clock: Wall time, in seconds.
    """

    def __init__(
        self, *, max_crashes: int, window_s: float, clock: Callable[[], float]
    ) -> None:
        self._max_crashes = max_crashes
        self._window_s = window_s
        self._clock = clock

    def judge(
        self,
        marks: Mapping[str, Any],
        max_crashes: int | None,
        runs_before: int = 0,
    ) -> AfterCrash:
        """What becomes of a run that ended with its child."""
        return after_crash(
            marks,
            max_crashes=max_crashes or self._max_crashes,
            window_s=self._window_s,
            now=self._clock(),
            runs_before=runs_before,
        )

    def describe(self) -> str:
        """Host and memory, for the record of a lost worker."""
        # ru_maxrss is in KiB on Linux and in bytes on macOS (getrusage(2)).
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit
        said = [f"host {socket.gethostname()}", f"largest child so far {peak} MiB"]
        try:
            page = os.sysconf("SC_PAGE_SIZE")
            free = os.sysconf("SC_AVPHYS_PAGES") * page >> 20
            total = os.sysconf("SC_PHYS_PAGES") * page >> 20
            said.append(f"{free} of {total} MiB free")
        except (OSError, ValueError):
            said.append("free memory unknown")
        kills = oom_kills(CGROUP_EVENTS)
        if kills:
            said.append(f"the kernel killed {kills} processes here for memory")
        return f"({', '.join(said)})"


def oom_kills(events: Path) -> int:
    """The processes that the kernel killed for memory in this container."""
    try:
        lines = events.read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split()[:2] for line in lines if " " in line)
    return int(counts.get("oom_kill", 0))
