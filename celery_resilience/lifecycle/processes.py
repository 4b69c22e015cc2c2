"""What the system says of a process, without asking the process."""

from __future__ import annotations

from pathlib import Path

#: States in which a process answers nobody: stopped, traced, ended.
DEAF = frozenset("TtZXx")

PROC = Path("/proc")


def can_answer(pid: int) -> bool:
    """
    Whether a process is there and not stopped; True where the system does not say.

    Source: proc(5), the third field of ``/proc/pid/stat``.
    """
    try:
        stat = (PROC / str(pid) / "stat").read_bytes()
    except FileNotFoundError:
        return not (PROC / "self" / "stat").exists()
    except OSError:
        return True
    # The name in parentheses may hold anything, parentheses too.
    state = stat.rpartition(b")")[2].split()[:1]
    return not state or state[0].decode() not in DEAF
