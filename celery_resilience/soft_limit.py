"""A soft time limit, or one of memory, does not cut our own code off.

In a child that runs tasks the handlers of these signals wait until our code is left,
which costs a fraction of a microsecond. Elsewhere the signals are held back by the
system, in two calls of it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from threading import get_ident
from typing import Any

Handler = Callable[[int, Any], object]

#: The signal of a soft time limit, where there is one (``billiard/pool.py:228``).
SOFT_LIMIT_SIGNAL: int | None = getattr(signal, "SIGUSR1", None)

#: The signal by which a run above its memory limit is told to clean up. SIGUSR1 is the
#: soft time limit's, and SIGUSR2 that of Celery's debugger.
MEMORY_SIGNAL: int | None = None
if hasattr(signal, "SIGRTMIN"):
    MEMORY_SIGNAL = int(signal.SIGRTMIN) + 7

_SIGNALS = {number for number in (SOFT_LIMIT_SIGNAL, MEMORY_SIGNAL) if number}


class _Waiting:
    """
    The signals of one thread, which is its process's main one.

    Attributes:
        inside: How many blocks of `soft_limit_deferred` it is in.
        late: The handlers of the signals that came meanwhile, by their numbers.
    """

    __slots__ = ("inside", "late", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()
        self.inside = 0
        self.late: dict[int, Handler] = {}

    def handler(self, handle: Handler) -> Handler:
        """*handle*, which waits for our own code."""

        def handle_in_time(number: int, frame: Any) -> None:
            if self.inside:
                self.late[number] = handle
            else:
                handle(number, frame)

        return handle_in_time

    def hear(self) -> None:
        """Handle what has waited; what the first raises, the others do not hear."""
        late, self.late = self.late, {}
        for number, handle in late.items():
            handle(number, None)


#: Of this process; None where the system holds the signals back.
_waiting: _Waiting | None = None


def let_handlers_wait() -> None:
    """
    Child, main thread: from now on the handlers wait, and no system call is made.

    Called once billiard has set its own, and before the first job.
    """
    global _waiting
    if SOFT_LIMIT_SIGNAL is None:
        return
    handle: Any = signal.getsignal(SOFT_LIMIT_SIGNAL)
    if callable(handle):
        _waiting = _Waiting()
        signal.signal(SOFT_LIMIT_SIGNAL, _waiting.handler(handle))


def waiting_handler(handle: Handler) -> Handler:
    """A handler of one of these signals, which waits where the others do."""
    return handle if _waiting is None else _waiting.handler(handle)


class soft_limit_deferred:
    """Hold the signals of soft limits back while our own code runs."""

    __slots__ = ("_before", "_waiting")

    _waiting: _Waiting | None

    def __enter__(self) -> None:
        waiting = _waiting
        if waiting is not None and waiting.thread == get_ident():
            self._waiting = waiting
            waiting.inside += 1
            return
        self._waiting = None
        if _SIGNALS:
            self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def __exit__(self, *_: object) -> None:
        waiting = self._waiting
        if waiting is not None:
            waiting.inside -= 1
            if waiting.late and not waiting.inside:
                waiting.hear()
        elif _SIGNALS:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
