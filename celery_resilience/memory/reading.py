"""How memory is read on this system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from celery_resilience.memory import proc
from celery_resilience.memory.proc import PROC, ProcMemory, ReadsMemory


@dataclass(frozen=True, slots=True)
class Eyes:
    """
    What looks at memory.

    Attributes:
        make_reader: Looks at the process that calls it.
        own_kib_of: Looks at another one; None: it has ended.
        rss_mib_of: What another one has in all; None: it has ended.
    """

    make_reader: Callable[[], ReadsMemory]
    own_kib_of: Callable[[int], int | None]
    rss_mib_of: Callable[[int], float | None]


def find_eyes() -> Eyes:
    """Linux's /proc, or else psutil."""
    if (PROC / "self" / "statm").exists():
        return Eyes(ProcMemory, proc.own_kib_of, proc.rss_mib_of)
    from celery_resilience.memory import psutil_memory

    return Eyes(
        psutil_memory.PsutilMemory, psutil_memory.own_kib_of, psutil_memory.rss_mib_of
    )
