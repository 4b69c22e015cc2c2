"""A soft time limit, or one of memory, does not cut our own code off."""

from __future__ import annotations

import signal

#: The signal of a soft time limit, where there is one (``billiard/pool.py:228``).
_SOFT_LIMIT = {signal.SIGUSR1} if hasattr(signal, "SIGUSR1") else set()

#: The signal by which a run above its memory limit is told to clean up. SIGUSR1 is the
#: soft time limit's, and SIGUSR2 that of Celery's debugger.
MEMORY_SIGNAL: int | None = None
if hasattr(signal, "SIGRTMIN"):
    MEMORY_SIGNAL = int(signal.SIGRTMIN) + 7
    _SOFT_LIMIT = {*_SOFT_LIMIT, MEMORY_SIGNAL}  # type: ignore[arg-type]


class soft_limit_deferred:
    """Hold the signals of soft limits back while our own code runs."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        if _SOFT_LIMIT:
            self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _SOFT_LIMIT)

    def __exit__(self, *_: object) -> None:
        if _SOFT_LIMIT:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
