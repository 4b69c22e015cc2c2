"""Names the process that holds something, for whoever hears that it has died."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

#: Linux's name of this boot: a pid means nothing in another.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def holder_name(pid: int | None = None) -> str:
    """
    Host, boot and pid of a process, at most 255 characters.

    Args:
        pid: Of a process on this host; None: this one.
    """
    return f"{_host_and_boot()}:{os.getpid() if pid is None else pid}"


@cache
def _host_and_boot() -> str:
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        boot = "-"
    return f"{socket.gethostname()[:200]}:{boot}"
