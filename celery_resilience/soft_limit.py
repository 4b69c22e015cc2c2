"""A soft time limit does not cut our own code off."""

from __future__ import annotations

import signal

#: The signal of a soft time limit, where there is one (``billiard/pool.py:228``).
_SOFT_LIMIT = {signal.SIGUSR1} if hasattr(signal, "SIGUSR1") else set()


class soft_limit_deferred:
    """Hold a soft time limit's signal back while our own code runs."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        if _SOFT_LIMIT:
            self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _SOFT_LIMIT)

    def __exit__(self, *_: object) -> None:
        if _SOFT_LIMIT:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
