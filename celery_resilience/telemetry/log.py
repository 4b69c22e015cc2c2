"""One structured record for each failed delivery, and a line at start and stop.

Records of logger `celery_resilience.failed` carry their facts as the attribute
`failure`, a dict, whatever the format of their text.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from celery_resilience.events import observe
from celery_resilience.outcome import Outcome, Settlement
from celery_resilience.redaction import cut, printable

failed_logger = logging.getLogger("celery_resilience.failed")
worker_logger = logging.getLogger("celery_resilience.worker")

MAX_LOGGED_MESSAGE_CHARS = 1_000


class FailureLog:
    """
    Logs each failed delivery once.

    Args:
        log_format: "json", "logfmt", or None for a sentence.
    """

    def __init__(self, log_format: str | None) -> None:
        self._format = _FORMATS[log_format]

    def attach(self) -> None:
        """Hear of failed deliveries from now on, in place of an earlier log."""
        global _stop
        if _stop is not None:
            _stop()
        _stop = observe("delivery.failed", self.failed)

    def failed(self, settlement: Settlement) -> None:
        """Write one record."""
        if failed_logger.isEnabledFor(logging.ERROR):
            facts = failure_facts(settlement)
            failed_logger.error("%s", self._format(facts), extra={"failure": facts})


_stop: Callable[[], None] | None = None
_stop_worker_log: Callable[[], None] | None = None


def failure_facts(settlement: Settlement) -> dict[str, Any]:
    """What a log tells of a failed delivery; everything in it is redacted."""
    failure = settlement.failure
    facts = {
        "event": "task_failed",
        "task": settlement.task,
        "task_id": settlement.task_id,
        "root_id": settlement.root_id,
        "parent_id": settlement.parent_id,
        "attempt": settlement.attempt,
        "queue": settlement.queue,
        "reason": str(settlement.reason),
        "exception": failure.exception if failure else None,
        "message": cut(failure.message, MAX_LOGGED_MESSAGE_CHARS) if failure else None,
        "fingerprint": failure.fingerprint if failure else None,
        "runtime_s": None if settlement.run_s is None else round(settlement.run_s, 6),
        "worker": settlement.worker,
        "pid": settlement.pid,
        "args": settlement.args,
        "kwargs": settlement.kwargs,
    }
    return {
        name: printable(value, keep_newlines=True) if isinstance(value, str) else value
        for name, value in facts.items()
    }


def _sentence(facts: Mapping[str, Any]) -> str:
    runtime = facts["runtime_s"]
    took = "" if runtime is None else f" after {runtime:.3f} s"
    return printable(
        f"task failed: {facts['task'] or '(no task)'}[{facts['task_id'] or 'no id'}] "
        f"{facts['reason']}: {facts['exception']}: {facts['message']} "
        f"(attempt {facts['attempt']}, queue {facts['queue']}{took}, "
        f"group {facts['fingerprint']})"
    )


def _logfmt(facts: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={_logfmt_value(value)}"
        for name, value in facts.items()
        if value is not None
    )


def _logfmt_value(value: Any) -> str:
    text = printable(str(value))
    if text and not any(c in text for c in ' ="'):
        return text
    return json.dumps(text, ensure_ascii=False)


_FORMATS: Mapping[str | None, Callable[[Mapping[str, Any]], str]] = {
    None: _sentence,
    "json": json.dumps,
    "logfmt": _logfmt,
}


class Counts(Protocol):
    """What a worker counted."""

    @property
    def received(self) -> int: ...

    @property
    def counts(self) -> Mapping[Outcome, int]: ...


class WorkerLog:
    """
    One line when the worker starts, and one when it stops.

    Args:
        deliveries: What the worker counted.
        start_line: What to say at the start.
        end: How the worker ended, in a few words.
    """

    def __init__(
        self,
        deliveries: Counts,
        start_line: Callable[[], str],
        end: Callable[[], str],
    ) -> None:
        self._deliveries = deliveries
        self._start_line = start_line
        self._end = end
        self._started_at = time.monotonic()
        self._is_started = False

    def attach(self) -> None:
        """Hear of the worker's end, in place of an earlier one."""
        global _stop_worker_log
        if _stop_worker_log is not None:
            _stop_worker_log()
        _stop_worker_log = observe("lifecycle.stopped", self.stopped)

    def started(self, warnings: Iterable[str]) -> None:
        """Say what is kept where; and once, what is weaker than it should be."""
        if self._is_started:
            return  # the consumer has reconnected
        self._is_started = True
        if worker_logger.level == logging.NOTSET:
            # `celery worker` logs warnings only, unless it is told otherwise.
            worker_logger.setLevel(logging.INFO)
        worker_logger.info("%s", self._start_line())
        for warning in warnings:
            worker_logger.warning("%s", warning)

    def stopped(self, **_: Any) -> None:
        """Say what became of the deliveries, and how the worker ended."""
        counts = self._deliveries.counts
        worker_logger.info(
            "stopped after %.0f s: %d deliveries%s; %s",
            time.monotonic() - self._started_at,
            self._deliveries.received,
            "".join(f", {n} {o}" for o in Outcome if (n := counts.get(o, 0))),
            self._end(),
        )
