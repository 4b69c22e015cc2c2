"""Why a child of the pool has ended. Policy only."""

from __future__ import annotations

import signal
from collections.abc import Callable

from celery_resilience.events import observe
from celery_resilience.outcome import Reason, Settlement

#: Children of which it is remembered why they are ended.
MAX_REMEMBERED = 1_000


def exit_reason(
    code: int, *, is_recycled: bool, is_meant: bool, because: str | None
) -> tuple[str, str]:
    """
    The reason and the signal of a child's end.

    Args:
        code: Its exit code; negative for a signal.
        is_recycled: It has had its number of tasks, or of bytes.
        is_meant: The main process has ended it, or is ending itself.
        because: What the main process has ended it for.

    Returns:
        recycled, time_limit, memory, stopped, signal or exit; and the signal's name,
        or "".
    """
    name = ""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"SIG{-code}"
    if because is not None:
        return because, name
    if is_recycled:
        return "recycled", ""
    if is_meant:
        return "stopped", name
    return ("signal", name) if code < 0 else ("exit", "")


class WhyEnded:
    """Remembers which children the main process ends, and for what."""

    def __init__(self) -> None:
        self._because: dict[int, str] = {}

    def attach(self) -> list[Callable[[], None]]:
        """Hear of limits; returns what ends it."""
        return [
            observe("delivery.failed", self._settled),
            observe("delivery.requeued", self._settled),
            observe("memory.ended", self._memory),
        ]

    def pop(self, pid: int) -> str | None:
        """What a child was ended for, once."""
        return self._because.pop(pid, None)

    def _settled(self, settlement: Settlement) -> None:
        if settlement.reason == Reason.HARD_TIME_LIMIT and settlement.pid:
            self._remember(settlement.pid, "time_limit")

    def _memory(self, pid: int, **_: object) -> None:
        self._remember(pid, "memory")

    def _remember(self, pid: int, why: str) -> None:
        self._because[pid] = why
        while len(self._because) > MAX_REMEMBERED:
            self._because.pop(next(iter(self._because)))
