"""Tells OpenTelemetry's spans what only we know, and makes those of dead processes.

Works beside the contrib CeleryInstrumentor, which the app turns on; no provider is set
here. An app that has not imported OpenTelemetry pays nothing.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from celery_resilience.events import observe
from celery_resilience.failure import cut_traceback, type_name
from celery_resilience.message import HEADER, marks_of
from celery_resilience.outcome import Reason, Settlement
from celery_resilience.reasons import reason_of
from celery_resilience.redaction import mask, safe_text, show_arguments
from celery_resilience.telemetry import opentelemetry_instrumentor as instrumentor
from celery_resilience.telemetry.binding import bind_trace_id
from celery_resilience.telemetry.flushing import flush_within
from celery_resilience.telemetry.signals import hear_in_place_of_instrumentor

logger = logging.getLogger("celery_resilience.telemetry")

#: Seconds that the last spans of a process may take to be sent.
FLUSH_WITHIN_S = 2.0

#: Reasons for which a run's process has ended, or was ended, and its span with it.
DEATHS = frozenset(
    {
        *(Reason.WORKER_LOST, Reason.HARD_TIME_LIMIT, Reason.MEMORY_LIMIT),
        Reason.INTERRUPTED,
    }
)

#: How the names of our attributes begin.
PREFIX = "celery_resilience."

#: Where a request remembers that its span says how it failed.
_TOLD = "_resilience_span_told"

_NS = 1_000_000_000


class Spans:
    """
    What a worker's processes tell OpenTelemetry; a room around the bodies.

    Args:
        api: The module `opentelemetry.trace`.
        is_ending: Whether an exception ends the process, and is not the task's own.
        clock: Wall time, in seconds.
    """

    words = "OpenTelemetry's spans"

    def __init__(
        self,
        api: Any,
        *,
        is_ending: Callable[[BaseException], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._is_ending = is_ending
        self._clock = clock
        self._has_flushed = False
        self._has_told = False
        self._stops: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Hear of failures from now on, in place of an earlier worker's."""
        global _attached
        if _attached is not None:
            _attached.detach()
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
        """The body starts: link the span of a message that left its trace to it."""
        if HEADER not in vars(request):
            return
        try:
            self._link(request)
        except Exception:
            # The run goes on, and a library may do so for each.
            if not self._has_told:
                self._has_told = True
                logger.exception("a span has no link to where its message came from")

    def _link(self, request: Any) -> None:
        traceparent = marks_of(vars(request)).get("trace")
        if traceparent is None:
            return
        span = self._api.get_current_span()
        context = span.get_span_context()
        if context.is_valid:
            span.add_link(self._context_of(traceparent))
            bind_trace_id(request, f"{context.trace_id:032x}")

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """The body ended: a span says whether it was cut off with its process."""
        if exc is not None and self._is_ending(exc):
            # The main process makes the span that says why.
            self._api.get_current_span().set_attribute(PREFIX + "cut_off", True)

    def run_failed(
        self, task: Any, request: Any, exc: BaseException, facts: dict[str, Any]
    ) -> None:
        """A run fails: its span says why, as an error unless the task `throws` it."""
        # It may have been turned on since the last time.
        hear_in_place_of_instrumentor(self)
        span = self._api.get_current_span()
        context = span.get_span_context()
        if not context.is_valid:
            return
        facts["trace_id"] = f"{context.trace_id:032x}"
        vars(request)[_TOLD] = True
        if not span.is_recording():
            return
        span.set_attributes(
            _attributes(
                reason=reason_of(exc, facts.get("reason", Reason.EXCEPTION)),
                fingerprint=facts["fingerprint"],
                attempt=request.retries + 1,
                key=facts.get("idempotency_key"),
            )
        )
        if isinstance(exc, tuple(task.throws or ())):
            return
        secrets = _secrets_of(task, request)
        kind, message = facts["exception"], mask(facts["message"], secrets)
        text = cut_traceback("".join(traceback.format_exception(exc)))
        self._fail(span, kind, message, mask(text, secrets))

    def failure_heard(self, task: Any, otherwise: Callable[[], None]) -> None:
        """
        Celery hears of a failure; the instrumentor would record it unredacted.

        It takes what a task `throws` for an error, and the wrapper of an exception for
        the exception (contrib 0.66b2).

        Args:
            otherwise: What the instrumentor does.
        """
        if _TOLD not in vars(task.request):
            otherwise()

    def retry_heard(self, task: Any, request: Any, reason: Any) -> None:
        """Celery hears of a retry, whose reason may quote an argument."""
        span = self._api.get_current_span()
        if span.is_recording():
            text = mask(safe_text(reason), _secrets_of(task, request))
            span.set_attribute("celery.retry.reason", text)

    # --- in the main process ----------------------------------------------------------------

    def failing(self, settlement: Settlement, more: dict[str, Any]) -> None:
        """A run failed whose span ended with its process: make it, as an error."""
        failure = settlement.failure
        if failure is None or settlement.reason not in DEATHS:
            return
        span = self._start(settlement)
        if span.is_recording():
            span.set_attribute(PREFIX + "fingerprint", failure.fingerprint)
            self._fail(span, failure.exception, failure.message, "")
        span.end(end_time=self._now())
        context = span.get_span_context()
        if context.is_valid:
            more["trace_id"] = f"{context.trace_id:032x}"
            more["span_id"] = f"{context.span_id:016x}"

    def requeued(self, settlement: Settlement) -> None:
        """A run ended with its process and runs again: make its span, as no error."""
        if settlement.reason in DEATHS and settlement.run_s is not None:
            self._start(settlement).end(end_time=self._now())

    def _start(self, settlement: Settlement) -> Any:
        api = self._api
        parent = links = None
        if settlement.traceparent is not None:
            sender = api.NonRecordingSpan(self._context_of(settlement.traceparent))
            parent = api.set_span_in_context(sender)
        elif "trace" in settlement.marks:
            links = [api.Link(self._context_of(settlement.marks["trace"]))]
        return api.get_tracer("celery_resilience").start_span(
            f"run/{settlement.task}",
            context=parent,
            kind=api.SpanKind.CONSUMER,
            links=links,
            start_time=self._now() - int((settlement.run_s or 0.0) * _NS),
            attributes={
                "messaging.system": "celery",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": settlement.queue,
                "messaging.message.id": settlement.task_id,
                "celery.action": "run",
                "celery.task_name": settlement.task,
                **_attributes(
                    reason=settlement.reason,
                    fingerprint=None,
                    attempt=settlement.attempt,
                    key=settlement.idempotency_key,
                ),
                PREFIX + "outcome": str(settlement.outcome),
                PREFIX + "worker": settlement.worker,
                **(
                    {"process.pid": settlement.pid}
                    if settlement.pid is not None
                    else {}
                ),
            },
        )

    def flush(self, **_: Any) -> None:
        """The process ends: send what waits, in a bounded time."""
        if not self._has_flushed:
            self._has_flushed = True
            flush_spans(self._api)

    # --- both ---------------------------------------------------------------------------

    def _fail(self, span: Any, kind: str, message: str, stacktrace: str) -> None:
        event = {"exception.type": kind, "exception.message": message}
        if stacktrace:
            event["exception.stacktrace"] = stacktrace
        span.set_attribute("error.type", kind)
        span.add_event("exception", event)
        span.set_status(self._api.Status(self._api.StatusCode.ERROR, message))

    def _context_of(self, traceparent: str) -> Any:
        _, trace, span, flags = traceparent.split("-")
        return self._api.SpanContext(
            trace_id=int(trace, 16),
            span_id=int(span, 16),
            is_remote=True,
            trace_flags=self._api.TraceFlags(int(flags, 16)),
        )

    def _now(self) -> int:
        return int(self._clock() * _NS)


_attached: Spans | None = None


def flush_spans(api: Any) -> None:
    """Send the spans of this process that have ended, within `FLUSH_WITHIN_S`."""
    flush = getattr(api.get_tracer_provider(), "force_flush", None)
    # The SDK takes no notice of its timeout (opentelemetry-python#4568).
    if flush is not None and not flush_within(FLUSH_WITHIN_S, flush):
        logger.warning("not all spans were sent within %g s", FLUSH_WITHIN_S)


def publish_failed(task: Any) -> None:
    """End the span of a publish that failed, which the instrumentor leaves current."""
    api = api_in_use()
    if api is None:
        return
    exc = sys.exception()
    kind = type_name(type(exc)) if exc is not None else "_OTHER"
    try:
        for span, close in instrumentor.open_publishes(task):
            if span is api.get_current_span():
                span.set_attribute("error.type", kind)
                span.set_status(api.Status(api.StatusCode.ERROR, kind))
                close()
    except Exception:
        logger.exception("the span of a failed publish stays open")


def api_in_use() -> Any | None:
    """The module `opentelemetry.trace`, if the app has imported it; else None."""
    return sys.modules.get("opentelemetry.trace")


def _attributes(
    *, reason: str | None, fingerprint: str | None, attempt: int, key: str | None
) -> dict[str, Any]:
    found = {"reason": reason, "fingerprint": fingerprint, "idempotency_key": key}
    return {
        PREFIX + "attempt": attempt,
        **{PREFIX + name: str(value) for name, value in found.items() if value},
    }


def _secrets_of(task: Any, request: Any) -> tuple[str, ...]:
    return show_arguments(
        request.args,
        request.kwargs,
        parameters=task.parameter_names,
        hidden=task.hidden_names,
    ).secrets
