"""One drain, from the first signal to the last byte, and the thread that keeps time.

Clocks and what is done are arguments; Celery is met in `bootstep.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import TIMEOUT_MAX, Event, RLock
from typing import Any, Protocol

from celery_resilience.lifecycle.policy import ExitCode, exit_code, meaning

logger = logging.getLogger("celery_resilience.worker")


@dataclass(frozen=True, slots=True)
class Grace:
    """
    What is left after the deadline.

    Attributes:
        kill_after_s: Seconds until children that have not ended are killed.
        give_up_after_s: Seconds until the worker itself is given up.
        gone_after_s: Seconds from the last settlement until the worker is stopped.
    """

    kill_after_s: float = 3.0
    give_up_after_s: float = 10.0
    gone_after_s: float = 5.0


class Acts(Protocol):
    """What the end of a drain does to a worker."""

    def running(self) -> int:
        """How many tasks run."""
        ...

    def interrupt(self) -> bool:
        """
        Cut off what runs: put back what can be, keep the rest as failed.

        Returns:
            True where the tasks go on all the same, until this process ends.
        """
        ...

    def kill_children(self) -> int:
        """Kill the children that have not ended; returns how many."""
        ...

    def exit_now(self, code: int) -> None:
        """End this process without another word."""
        ...


@dataclass(slots=True)
class Asked:
    """
    Why a worker drains.

    Attributes:
        why: A few words, such as "SIGTERM".
        code: The exit code if nothing is cut off.
        was_asked: False where an error of the worker's own has ended it.
    """

    why: str
    code: int = ExitCode.DRAINED
    was_asked: bool = True


class Drain:
    """
    The end of one worker.

    Args:
        timeout_s: Seconds from the first signal until what still runs is cut off;
            None: until idle.
        on_begin: Called once, at the first signal, perhaps inside its handler.
        clock: Monotonic seconds.

    Attributes:
        put_back: Runs that were cut off and are delivered again.
        lost: Runs that were cut off for good.
        has_begun: Set at the first signal.
        has_settled: Set once every delivery is settled.
        has_ended: Set once the worker is stopped, whatever its process does then.
        code: The exit code, once it is known.
    """

    def __init__(
        self,
        *,
        timeout_s: float | None,
        on_begin: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.timeout_s = timeout_s
        self._on_begin = on_begin
        self._clock = clock
        self._lock = RLock()
        self._began_at = 0.0
        self.asked: Asked | None = None
        self.has_begun = Event()
        self.has_settled = Event()
        self.has_ended = Event()
        self.is_overdue = False
        self.put_back = 0
        self.lost = 0
        self.code: int | None = None

    def begin(self, asked: Asked) -> bool:
        """The worker ends; the first reason counts. True for that one."""
        # No lock: a signal's handler may interrupt another call of this.
        if self.__dict__.setdefault("_first", asked) is not asked:
            return False
        self.asked = asked
        self._began_at = self._clock()
        self._on_begin()
        self.has_begun.set()
        return True

    def cut_off(self, *, is_put_back: bool) -> None:
        """A run was cut off."""
        with self._lock:
            if is_put_back:
                self.put_back += 1
            else:
                self.lost += 1

    def settled(self, celery_code: int | None) -> int:
        """Every delivery is settled: the exit code."""
        asked = self.asked or Asked("an error", was_asked=False)
        self.code = exit_code(
            celery=celery_code,
            was_asked=asked.was_asked,
            wanted=asked.code,
            put_back=self.put_back,
            lost=self.lost,
        )
        self.has_settled.set()
        return self.code

    def words(self) -> str:
        """How the worker ended, for the last line of the log."""
        code = self.code or 0
        why = self.asked.why if self.asked else "an error"
        cut = (
            f"; put back: {self.put_back}, cut off for good: {self.lost}"
            if self.put_back or self.lost
            else ""
        )
        return f"{meaning(code)} ({why}{cut}); exit code {code}"

    def facts(self) -> dict[str, Any]:
        """The same by name, for a log that is searched."""
        return {
            "why": self.asked.why if self.asked else "an error",
            "exit_code": self.code or 0,
            "put_back": self.put_back,
            "cut_off": self.lost,
        }

    def left_s(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        if self.timeout_s is None or self.timeout_s > TIMEOUT_MAX:
            return None
        return max(0.0, self.timeout_s - (self._clock() - self._began_at))


class Timekeeper:
    """
    Ends a drain that does not end by itself; its `run` is a thread's.

    Args:
        drain: The drain.
        acts: What it does.
        grace: What is left after the deadline.
    """

    def __init__(self, drain: Drain, acts: Acts, grace: Grace | None = None) -> None:
        self._drain = drain
        self._acts = acts
        self._grace = grace or Grace()

    def run(self) -> None:
        """Wait for the drain to begin, and see to its end."""
        drain = self._drain
        drain.has_begun.wait()
        self._say_begun()
        if drain.has_settled.wait(drain.left_s()):
            self._see_gone()
            return
        drain.is_overdue = True
        logger.warning(
            "the drain has lasted %g s (drain_timeout_s): %d tasks are cut off",
            drain.timeout_s,
            self._acts.running(),
        )
        try:
            if self._acts.interrupt():
                self._acts.exit_now(drain.code or 0)
        except Exception:
            logger.exception("what runs could not be cut off")
        if drain.has_settled.wait(self._grace.kill_after_s):
            self._see_gone()
            return
        killed = self._acts.kill_children()
        left_s = self._grace.give_up_after_s - self._grace.kill_after_s
        if killed:
            logger.warning("%d children did not end, and are killed", killed)
        if drain.has_settled.wait(left_s):
            self._see_gone()
            return
        logger.critical(
            "the worker does not end; exit code %d: what it held unacknowledged is "
            "delivered again",
            ExitCode.STUCK,
        )
        self._acts.exit_now(ExitCode.STUCK)

    def _see_gone(self) -> None:
        """The rest takes no time, unless a connection's end does."""
        drain = self._drain
        if drain.timeout_s is not None and not drain.has_ended.wait(
            self._grace.gone_after_s
        ):
            self._acts.exit_now(drain.code or 0)

    def _say_begun(self) -> None:
        drain = self._drain
        left = drain.left_s()
        limit = "until they end" if left is None else f"at most {left:.0f} s"
        logger.info(
            "stopping (%s): takes no new tasks, and gives the %d that run %s",
            drain.asked.why if drain.asked else "an error",
            self._acts.running(),
            limit,
        )
