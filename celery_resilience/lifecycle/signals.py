"""The signals of a worker's end, in the main process and in its children."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from celery_resilience import _pools
from celery_resilience.draining import SharedFlags

#: Seconds that a child waits, once it is sent a SIGTERM which the main process does
#: not mean for it alone, for word that the whole worker was sent one.
WAIT_S = 3.0
LOOK_S = 0.01


def shield_child(flags: SharedFlags) -> None:
    """
    Child: let a SIGTERM for the whole process group leave the running task alone.

    What the main process means for this child ends it, as ever. Another one is the
    worker's where that drains; else it is meant for this child by somebody else.
    """
    _pools.on_child_loop(lambda: _shield(flags))


def _shield(flags: SharedFlags) -> None:
    end: Any = signal.getsignal(signal.SIGTERM)
    if not callable(end):
        return  # REMAP_SIGTERM: ignored already
    signal.signal(signal.SIGTERM, shielded(flags, end, clock=time.monotonic))


def shielded(
    flags: SharedFlags,
    end: Callable[[int, Any], None],
    *,
    clock: Callable[[], float],
    wait: Callable[[float], None] = time.sleep,
) -> Callable[[int, Any], None]:
    """
    A handler of SIGTERM for a child.

    Args:
        flags: What the main process tells.
        end: What ends the child.
        clock: Monotonic seconds.
        wait: Waits so many seconds.
    """
    pid = os.getpid()

    def on_term(signum: int, frame: Any) -> None:
        until = clock() + WAIT_S
        # A process that a task has forked is none of ours.
        while os.getpid() == pid and not flags.is_meant(pid) and clock() < until:
            if flags.is_draining:
                return
            wait(LOOK_S)
        end(signum, frame)

    return on_term


class Interrupter:
    """
    Calls *interrupt* in the main thread, where Celery cuts tasks off.

    By way of SIGQUIT, which is Celery's own for that: its handler is kept, and has
    all those that are not ours.
    """

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self._interrupt = interrupt
        self._is_ours = False
        self._previous: Any = None

    @staticmethod
    def is_possible() -> bool:
        """In the main thread of a system that has this signal."""
        return (
            hasattr(signal, "SIGQUIT")
            and threading.current_thread() is threading.main_thread()
        )

    def install(self) -> None:
        """Main thread: hear the signal, behind whoever has heard it."""
        self._previous = signal.getsignal(signal.SIGQUIT)
        signal.signal(signal.SIGQUIT, self._on_quit)

    def send(self) -> None:
        """Any thread: interrupt now."""
        self._is_ours = True
        os.kill(os.getpid(), signal.SIGQUIT)

    def _on_quit(self, signum: int, frame: Any) -> None:
        if self._is_ours:
            self._is_ours = False
            self._interrupt()
        elif callable(self._previous):
            self._previous(signum, frame)


def kill(pids: list[int]) -> int:
    """Kill those of our children that have not ended; returns how many."""
    count = 0
    for pid in pids:
        if _pools.died_before(pid) is None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            count += 1
    return count
