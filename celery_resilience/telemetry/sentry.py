"""Adds what only we know to Sentry's events, and tells of the deaths of processes.

Works beside sentry-sdk's own Celery integration, which the app turns on; nothing here
calls `init`. An app that has not imported sentry-sdk pays nothing.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from uuid import uuid4

from celery_resilience.events import observe
from celery_resilience.message import id_text, marks_of
from celery_resilience.outcome import Reason, Settlement
from celery_resilience.reasons import reason_of
from celery_resilience.redaction import show_arguments
from celery_resilience.telemetry.sentry_event import (
    Redactor,
    Told,
    clear_breadcrumbs,
    death_event,
    is_told_already,
    signal_in,
    tell,
)

logger = logging.getLogger("celery_resilience.telemetry")

#: Seconds that the main process's last events may take to be sent.
FLUSH_WITHIN_S = 2.0

#: Children whose death was told, of which more are forgotten.
MAX_DEAD = 1_000

#: Reasons for which a run's process has ended, or was ended.
DEATHS = frozenset({Reason.WORKER_LOST, Reason.HARD_TIME_LIMIT, Reason.MEMORY_LIMIT})

#: What we ask of sentry-sdk, which has all of it from 2.0 on.
NEEDED = (
    *("capture_event", "flush", "get_client", "get_global_scope"),
    *("get_isolation_scope", "isolation_scope", "last_event_id"),
)

#: Where a request remembers what its events are told.
_RUN = "_resilience_sentry"


#: Why an event is not sent though nothing has failed.
MEANT = frozenset({"before_send", "event_processor", "sample_rate", "ignored"})

#: Marks a transport whose losses are counted.
_COUNTED = "_celery_resilience_counted"


class TellsMore(Protocol):
    """The child's end of the channel to the main process."""

    def add(self, task_id: str, facts: dict[str, Any]) -> None: ...


class SentryEvents:
    """
    What a worker's processes tell Sentry; a room around the bodies.

    Args:
        sdk: The module `sentry_sdk`.
        facts: Takes the id of an event to the main process.
        commands: How to show and replay the failed task of a run, by its task's name, its
            id, the marks of its message, the exception's type and the reason; {} where
            it is not kept.
        is_running_in: Whether a child, by its pid, runs a resilient task just now.
    """

    words = "Sentry's events"

    def __init__(
        self,
        sdk: Any,
        *,
        facts: TellsMore,
        commands: Callable[[str, str, Mapping[str, Any], str, str], Mapping[str, str]],
        is_running_in: Callable[[int], bool] = lambda pid: False,
    ) -> None:
        self.sdk = sdk
        self.commands = commands
        self._facts = facts
        self._is_running_in = is_running_in
        self._dead: OrderedDict[int, None] = OrderedDict()
        self._has_flushed = False
        self._has_told = False
        self._stops: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Hear of failures from now on, in place of an earlier worker's."""
        global _attached
        if _attached is not None:
            _attached.detach()
        else:
            self.sdk.get_global_scope().add_event_processor(_look_at)
        _attached = self
        self._stops = [
            observe("run.failed", self.run_failed),
            observe("delivery.failing_silently", self.failing),
            observe("delivery.requeued", self.requeued),
            observe("lifecycle.stopped", self.flush),
            observe("lifecycle.exiting", self.flush),
        ]

    def detach(self) -> None:
        """Hear no more."""
        for stop in self._stops:
            stop()

    # --- in the process that runs a task ------------------------------------------------

    def before(self, task: Any, request: Any) -> None:
        """The body starts: its events hide what its arguments hide."""
        try:
            self._watch(task, request)
        except Exception:
            # The run goes on, and a library may do so for each.
            if not self._has_told:
                self._has_told = True
                logger.exception("Sentry's events of a run lack what only we know")

    def _watch(self, task: Any, request: Any) -> None:
        scope = self.sdk.get_isolation_scope()
        # Of this run alone, where Sentry's own integration has made one; else it would
        # collect our processors for ever.
        if getattr(scope, "_name", None) == "celery":
            run = vars(request)[_RUN] = _Run(self, task, request)
            scope.add_event_processor(run)

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """Sentry sees the exception after us."""

    def run_failed(
        self, task: Any, request: Any, exc: BaseException, facts: dict[str, Any]
    ) -> None:
        """A run fails, and Sentry captures its exception next."""
        if _RUN not in vars(request):
            self.before(task, request)
        run: _Run | None = vars(request).get(_RUN)
        if run is not None:
            run.fails(exc, facts)

    def captured(self, request: Any) -> None:
        """Celery hears of the failure, and Sentry has captured it, or dropped it."""
        run: _Run | None = vars(request).get(_RUN)
        if (
            run is not None
            and run.event_id is not None
            and run.event_id == self.sdk.last_event_id()
        ):
            self._facts.add(id_text(request.id), {"sentry_event_id": run.event_id})

    # --- in the main process ----------------------------------------------------------------

    def failing(self, settlement: Settlement, more: dict[str, Any]) -> None:
        """A run failed whose process told nobody: one event, with its task."""
        self._died(settlement)
        failure = settlement.failure
        if failure is None or not self.sdk.get_client().is_active():
            return
        told = Told(
            task=settlement.task,
            task_id=settlement.task_id,
            attempt=settlement.attempt,
            reason=str(settlement.reason),
            fingerprint=failure.fingerprint,
            queue=settlement.queue,
            idempotency_key=settlement.idempotency_key,
            signal=signal_in(failure.message),
            commands=self.commands(
                settlement.task,
                settlement.task_id,
                settlement.marks,
                failure.exception,
                str(settlement.reason),
            ),
        )
        trace_id = more.get("trace_id") or settlement.trace_id
        trace = {
            "trace_id": trace_id or uuid4().hex,
            "span_id": more.get("span_id") or uuid4().hex[:16],
        }
        event = death_event(settlement, told, trace)
        with self.sdk.isolation_scope() as scope:
            # Those of the main process are of whatever it did last.
            scope.clear_breadcrumbs()
            event_id = self.sdk.capture_event(event)
        if event_id is not None:
            more["sentry_event_id"] = event_id

    def requeued(self, settlement: Settlement) -> None:
        """A run that ended with its process runs again: nothing is told."""
        self._died(settlement)

    def _died(self, settlement: Settlement) -> None:
        if settlement.reason in DEATHS and settlement.pid is not None:
            self._dead[settlement.pid] = None
            while len(self._dead) > MAX_DEAD:
                self._dead.popitem(last=False)

    def is_ours(self, pid: int) -> bool:
        """Whether the death of a child is told with its task, or of none that failed."""
        if pid in self._dead:
            # The system may give the number to another child.
            del self._dead[pid]
            return True
        return self._is_running_in(pid)

    def flush(self, **_: Any) -> None:
        """The worker ends: send what waits, in a bounded time."""
        if not self._has_flushed and self.sdk.get_client().is_active():
            self._has_flushed = True
            self.sdk.flush(timeout=FLUSH_WITHIN_S)


_attached: SentryEvents | None = None


def _look_at(event: dict[str, Any], hint: dict[str, Any]) -> dict[str, Any] | None:
    """Of every event of the process: None for one that others tell better."""
    events = _attached
    if events is None or event.get("type") == "transaction":
        return event
    clear_breadcrumbs(event)
    return None if is_told_already(event, events.is_ours) else event


class _Run:
    """What the events of one run are told, and must not tell."""

    __slots__ = ("_events", "_exc", "_facts", "_request", "_task", "event_id")

    def __init__(self, events: SentryEvents, task: Any, request: Any) -> None:
        self._events = events
        self._task = task
        self._request = request
        self._exc: BaseException | None = None
        self._facts: Mapping[str, Any] = {}
        self.event_id: str | None = None

    def fails(self, exc: BaseException, facts: Mapping[str, Any]) -> None:
        """The run ends in *exc*."""
        self._exc, self._facts = exc, facts

    def __call__(
        self, event: dict[str, Any], hint: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Sentry's event processor."""
        task, request = self._task, self._request
        job: Any = (event.get("extra") or {}).get("celery-job")
        has_arguments = isinstance(job, dict) and "args" in job
        is_transaction = event.get("type") == "transaction"
        if is_transaction and not has_arguments:
            return event
        shown = show_arguments(
            request.args,
            request.kwargs,
            parameters=task.parameter_names,
            hidden=task.hidden_names,
        )
        if has_arguments:
            # With `send_default_pii`.
            job["args"], job["kwargs"] = shown.args, shown.kwargs
        if is_transaction:
            return event
        clear_breadcrumbs(event)
        Redactor(shown.secrets, task.hidden_names).clean(event)
        if self._is_the_failure(hint):
            tell(event, self._told(marks_of(vars(request))))
            self.event_id = event.get("event_id")
        return event

    def _is_the_failure(self, hint: Mapping[str, Any]) -> bool:
        exc = (hint.get("exc_info") or (None, None))[1]
        # A SystemExit goes on as the cause of an Exception.
        return self._exc is not None and (
            exc is self._exc or getattr(exc, "__cause__", None) is self._exc
        )

    def _told(self, marks: Mapping[str, Any]) -> Told:
        task, request, facts = self._task, self._request, self._facts
        assert self._exc is not None
        task_id = id_text(request.id)
        info = request.delivery_info or {}
        reason = str(reason_of(self._exc, facts.get("reason", Reason.EXCEPTION)))
        return Told(
            task=task.name,
            task_id=task_id,
            attempt=request.retries + 1,
            reason=reason,
            fingerprint=facts["fingerprint"],
            queue=info.get("routing_key"),
            idempotency_key=facts.get("idempotency_key"),
            commands=self._events.commands(
                task.name, task_id, marks, facts["exception"], reason
            ),
        )


def count_lost_events(sdk: Any, lost: Callable[[int], None]) -> None:
    """
    Call *lost* with the number of events that the SDK could not send.

    It counts them for Sentry itself, which it cannot reach (``transport.py:282``,
    sentry-sdk 2.75); the wrap is on the client's own transport.
    """
    transport = getattr(sdk.get_client(), "transport", None)
    record = getattr(transport, "record_lost_event", None)
    if transport is None or record is None or getattr(transport, _COUNTED, False):
        return

    def record_and_count(
        reason: str, data_category: Any = None, item: Any = None, **words: Any
    ) -> None:
        kind = data_category or getattr(item, "data_category", None)
        if reason not in MEANT and kind == "error":
            lost(1)
        record(reason, data_category, item, **words)

    setattr(transport, _COUNTED, True)
    transport.record_lost_event = record_and_count


def sdk_in_use() -> Any | None:
    """The module, if the app has imported one that has what we need; else None."""
    sdk = sys.modules.get("sentry_sdk")
    if sdk is None:
        return None
    missing = [name for name in NEEDED if not hasattr(sdk, name)]
    if missing:
        logger.warning(
            "Sentry is told nothing by celery-resilience: this sentry-sdk, which must be "
            "2.0 or later, lacks %s",
            ", ".join(missing),
        )
        return None
    return sdk
