"""One structured record for each failed delivery, and a line for what comes again.

Records carry their facts as attributes, whatever the format of their text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event, RLock
from typing import Any

from celery_resilience.events import observe
from celery_resilience.outcome import EVENTS, Outcome, Reason, Settlement
from celery_resilience.redaction import printable
from celery_resilience.telemetry.log_facts import (
    failure_facts,
    failure_sentence,
    outcome_facts,
    outcome_sentence,
)
from celery_resilience.telemetry.log_format import tell
from celery_resilience.telemetry.log_storm import Storms, Summary
from celery_resilience.threads import start_deaf

failed_logger = logging.getLogger("celery_resilience.failed")
outcome_logger = logging.getLogger("celery_resilience.outcome")

#: Failures of one fingerprint that are told one by one within a window.
STORM_LIMIT = 20
STORM_WINDOW_S = 60.0

#: Outcomes of which a line is told; of the others Celery, or the room that decides, has
#: said enough.
TOLD = (Outcome.RETRIED, Outcome.SKIPPED, Outcome.SNOOZED)

#: Why a run that comes again has ended with its process; others were put back.
CRASHES = (Reason.WORKER_LOST, Reason.HARD_TIME_LIMIT)


class FailureLog:
    """
    Logs each failed delivery once; of a storm, the first ones and their number.

    Args:
        log_format: "json", "logfmt", or None for a sentence.
        clock: Monotonic seconds.
        rss_mib_of: What a process has, by its pid; None: it has ended.
        storm_limit: Failures of one fingerprint that are told one by one in a window.
        storm_window_s: Seconds of a window.
    """

    def __init__(
        self,
        log_format: str | None,
        *,
        clock: Callable[[], float],
        rss_mib_of: Callable[[int], float | None] = lambda _: None,
        storm_limit: int = STORM_LIMIT,
        storm_window_s: float = STORM_WINDOW_S,
    ) -> None:
        self._format = log_format
        self._clock = clock
        self._rss_mib_of = rss_mib_of
        self._storms = Storms(storm_limit, storm_window_s)
        #: A signal's handler may settle a task in the thread that has it.
        self._lock = RLock()
        self._is_watched = False
        self._has_ended = Event()

    def attach(self) -> None:
        """Hear of deliveries from now on, in place of an earlier log."""
        global _stops
        for stop in _stops:
            stop()
        _stops = [
            observe(EVENTS[Outcome.FAILED], self.failed),
            *(observe(EVENTS[outcome], self.ended) for outcome in TOLD),
            observe(EVENTS[Outcome.REQUEUED], self.requeued),
            observe("lifecycle.stopped", self.stopped),
            # With what never ends, it does not stop.
            observe("lifecycle.exiting", self.stopped),
        ]

    def failed(self, settlement: Settlement) -> None:
        """Write one record, or count it for a summary."""
        if not failed_logger.isEnabledFor(logging.ERROR):
            return
        fingerprint = settlement.failure.fingerprint if settlement.failure else ""
        with self._lock:
            now = self._clock()
            due = self._storms.due(now)
            is_told = self._storms.is_told(fingerprint, now)
            if not is_told:
                self._storms.added(fingerprint, _last_of(settlement))
                self._watch()
        self._sum_up(due)
        if is_told:
            pid = settlement.pid
            rss_mib = None if pid is None else self._rss_mib_of(pid)
            facts = failure_facts(settlement, rss_mib)
            sentence = failure_sentence(facts)
            tell(failed_logger, logging.ERROR, facts, sentence, self._format)

    def ended(self, settlement: Settlement) -> None:
        """Write the line of a delivery that was retried, skipped or snoozed."""
        self._tell(logging.INFO, settlement)

    def requeued(self, settlement: Settlement) -> None:
        """Write the line of a run that ended with its process, and comes again."""
        if settlement.reason in CRASHES:
            self._tell(logging.WARNING, settlement)

    def _tell(self, level: int, settlement: Settlement) -> None:
        if outcome_logger.isEnabledFor(level):
            facts = outcome_facts(settlement)
            sentence = outcome_sentence(settlement.outcome, facts)
            tell(outcome_logger, level, facts, sentence, self._format)

    def stopped(self, **_: Any) -> None:
        """The worker ends: sum up what waits for it."""
        self._has_ended.set()
        with self._lock:
            rest = self._storms.rest()
        self._sum_up(rest)

    def _watch(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            start_deaf(self._sum_up_in_time, "failure-log")

    def _sum_up_in_time(self) -> None:
        """A thread's, for as long as there is a storm."""
        while True:
            with self._lock:
                now = self._clock()
                due = self._storms.due(now)
                wait_s = self._storms.due_in_s(now)
                self._is_watched = wait_s is not None
            self._sum_up(due)
            if wait_s is None or self._has_ended.wait(wait_s):
                return

    def _sum_up(self, summaries: list[Summary]) -> None:
        for summary in summaries:
            facts = {
                "event": "failures_summarised",
                "more": summary.more,
                **summary.last,
            }
            sentence = printable(
                f"... and {summary.more} more of group {facts['fingerprint']} "
                f"({facts['task'] or '(no task)'}, {facts['reason']}), "
                f"last id {facts['task_id'] or '(none)'}"
            )
            tell(failed_logger, logging.ERROR, facts, sentence, self._format)


_stops: list[Callable[[], None]] = []


def _last_of(settlement: Settlement) -> dict[str, Any]:
    failure = settlement.failure
    facts = {
        "fingerprint": failure.fingerprint if failure else None,
        "task": settlement.task,
        "reason": str(settlement.reason),
        "exception": failure.exception if failure else None,
        "task_id": settlement.task_id,
        "worker": settlement.worker,
    }
    return {
        name: printable(value) if isinstance(value, str) else value
        for name, value in facts.items()
    }
