"""What telemetry a worker's processes could not send, counted over all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event

from celery_resilience.events import emit
from celery_resilience.forks import thread_gate
from celery_resilience.telemetry.shared_counts import SharedCounts
from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.telemetry")

#: What is counted, in the words of the metrics.
SIGNALS = ("spans", "events")

#: Seconds between two looks at what was counted, and between two lines about it.
LOOK_S = 5.0
SAY_AGAIN_S = 60.0


class Drops:
    """
    Counts of what was dropped; made before the pool forks, so that children share it.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._counts = SharedCounts(SIGNALS)
        self._clock = clock
        self._unsaid = dict.fromkeys(SIGNALS, 0)
        self._say_at = 0.0
        self._has_ended = Event()

    def add(self, signal: str, count: int = 1) -> None:
        """Any process: so many were dropped."""
        self._counts.add(signal, count)

    def tell(self) -> None:
        """Main process: tell what was dropped since the last time."""
        for signal, new in self._counts.new().items():
            self._unsaid[signal] += new
            emit("telemetry.dropped", signal=signal, count=new)
        if any(self._unsaid.values()) and self._clock() >= self._say_at:
            self._say_at = self._clock() + SAY_AGAIN_S
            words = ", ".join(f"{n} {name}" for name, n in self._unsaid.items() if n)
            self._unsaid = dict.fromkeys(SIGNALS, 0)
            logger.warning("telemetry could not be sent, and is lost: %s", words)

    def watch(self) -> None:
        """Main process: look every few seconds, in a thread, until `close`."""

        def run() -> None:
            while not self._has_ended.wait(LOOK_S):
                with thread_gate.inside():
                    self.tell()

        start_deaf(run, "telemetry-drops")

    def close(self) -> None:
        """The worker ends."""
        self._has_ended.set()
        self.tell()
