"""One line when a worker starts, and one when it stops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from celery_resilience.events import observe
from celery_resilience.outcome import Outcome
from celery_resilience.telemetry.log_format import tell

worker_logger = logging.getLogger("celery_resilience.worker")


class Counts(Protocol):
    """What a worker counted."""

    @property
    def received(self) -> int: ...

    @property
    def counts(self) -> Mapping[Outcome, int]: ...


class Says(Protocol):
    """What is told of a worker: a sentence, and the same as facts."""

    def words(self) -> str: ...

    def facts(self) -> Mapping[str, Any]: ...


class WorkerLog:
    """
    One line when the worker starts, and one when it stops.

    Args:
        log_format: "json", "logfmt", or None for a sentence.
        deliveries: What the worker counted.
        start: What to say at the start.
        end: How the worker ended.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        log_format: str | None,
        deliveries: Counts,
        *,
        start: Says,
        end: Says,
        clock: Callable[[], float],
    ) -> None:
        self._format = log_format
        self._deliveries = deliveries
        self._start = start
        self._end = end
        self._clock = clock
        self._started_at = clock()
        self._is_started = False

    def attach(self) -> None:
        """Hear of the worker's end, in place of an earlier one."""
        global _stop
        if _stop is not None:
            _stop()
        _stop = observe("lifecycle.stopped", self.stopped)

    def started(self, warnings: Iterable[str]) -> None:
        """Say what is kept where; and once, what is weaker than it should be."""
        if self._is_started:
            return  # the consumer has reconnected
        self._is_started = True
        if worker_logger.level == logging.NOTSET:
            # `celery worker` logs warnings only, unless it is told otherwise.
            worker_logger.setLevel(logging.INFO)
        facts = {"event": "worker_started", **self._start.facts()}
        tell(worker_logger, logging.INFO, facts, self._start.words(), self._format)
        for warning in warnings:
            tell(
                worker_logger,
                logging.WARNING,
                {"event": "worker_warning", "warning": warning},
                warning,
                self._format,
            )

    def stopped(self, **_: Any) -> None:
        """Say what became of the deliveries, and how the worker ended."""
        counts = self._deliveries.counts
        uptime_s = self._clock() - self._started_at
        received = self._deliveries.received
        outcomes = {outcome: counts.get(outcome, 0) for outcome in Outcome}
        facts = {
            "event": "worker_stopped",
            **self._end.facts(),
            "uptime_s": round(uptime_s, 3),
            "received": received,
            **{str(outcome): count for outcome, count in outcomes.items()},
        }
        told = "".join(f", {n} {outcome}" for outcome, n in outcomes.items() if n)
        sentence = (
            f"stopped after {uptime_s:.0f} s: {received} deliveries{told}; "
            f"{self._end.words()}"
        )
        tell(worker_logger, logging.INFO, facts, sentence, self._format)


_stop: Callable[[], None] | None = None
