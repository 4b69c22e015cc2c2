"""A settlement, and the failure in it, from what a request knows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import Reject, Retry, TimeLimitExceeded, WorkerLostError

from celery_resilience import _celery_worker
from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.failure import (
    MAX_MESSAGE_CHARS,
    Failure,
    cut_traceback,
    describe,
    failure_of,
    fingerprint_of,
    type_name,
)
from celery_resilience.message import HEADER, SENT_AT, id_text, is_time
from celery_resilience.outcome import Ended, Outcome, Settlement
from celery_resilience.redaction import (
    ShownArguments,
    cut,
    mask,
    safe_text,
    show_arguments,
)
from celery_resilience.trace_ids import traceparent_of

#: Of what a body says when it skips or snoozes.
MAX_REASON_CHARS = 500


def settlement_of(
    request: Any,
    outcome: Outcome,
    reason: str | None,
    failure: Failure | None = None,
    facts: Mapping[str, Any] | None = None,
    *,
    is_silent: bool = False,
) -> Settlement:
    """
    How a delivery ended, with its arguments where it failed.

    Args:
        request: The delivery's `ResilientRequest`.
        outcome, reason, failure: What was decided.
        facts: What the child sent.
        is_silent: See `Settlement`.
    """
    shown = ShownArguments("", "")
    embedded: Mapping[str, Any] = {}
    if failure is not None:
        shown, embedded = _shown_arguments(request), _embedded(request.message)
        failure = Failure(
            failure.exception,
            mask(failure.message, shown.secrets),
            failure.fingerprint,
            mask(failure.traceback, shown.secrets),
        )
    started, chain = request.time_start, embedded.get("chain")
    return Settlement(
        outcome=outcome,
        reason=reason,
        task=request._type,
        task_id=id_text(request.id),
        queue=request.deliveries.queue_of(request.message),
        worker=request.deliveries.worker,
        attempt=(request._request_dict.get("retries") or 0) + 1,
        root_id=id_text(request._root_id) or None,
        parent_id=id_text(request._parent_id) or None,
        pid=request.worker_pid,
        run_s=None if started is None else max(0.0, time.time() - started),
        wait_s=None if started is None else _wait_s(request, started),
        failure=failure,
        args=shown.args,
        kwargs=shown.kwargs,
        arguments=shown.named,
        in_chord=bool(embedded.get("chord")),
        chain_length=len(chain) if isinstance(chain, list | tuple) else 0,
        marks=request.marks,
        facts=facts or {},
        is_silent=is_silent,
        traceparent=traceparent_of(request.message.headers),
    )


def ended_of(request: Any, outcome: Outcome) -> Ended:
    """What is counted of a delivery, from its `ResilientRequest`."""
    started = request.time_start
    return Ended(
        request._type,
        request.deliveries.queue_of(request.message),
        outcome,
        (request._request_dict.get("retries") or 0) + 1,
        None if started is None else max(0.0, time.time() - started),
        None if started is None else _wait_s(request, started),
    )


def _wait_s(request: Any, started: float) -> float | None:
    """
    Seconds for which a task waited that might run already.

    None of what was delivered before, or is replayed: it would wait for its first run.
    """
    marks = request.message.headers.get(HEADER)
    marks = marks if isinstance(marks, dict) else {}
    if request._delivery_info["redelivered"] or "replay" in marks:
        return None
    eta: Any = request._eta
    sent_at: Any = marks.get(SENT_AT)
    if eta is not None:
        return max(0.0, float(started - eta.timestamp()))
    if is_time(sent_at):
        return max(0.0, float(started - sent_at))
    return None


def failure_of_run(
    request: Any, exc: BaseException, exc_info: ExceptionInfo, facts: dict[str, Any]
) -> Failure:
    """
    What went wrong in a run.

    Args:
        request: The delivery's `ResilientRequest`.
        exc: What the pool handed over, which may stand for another exception.
        exc_info: The same with its traceback.
        facts: What the child sent, which knows the true one.
    """
    traceback = cut_traceback(exc_info.traceback or "")
    if "fingerprint" in facts and not isinstance(exc, TimeLimitExceeded):
        return failure_of(facts, traceback)
    kind = type_name(type(exc))
    if isinstance(exc, WorkerLostError):
        death = died_of(exc)
        message = f"{death} {request.deliveries.crashes.describe()}"
        cause = fingerprint_of("worker_lost", request._type, death)
    elif isinstance(exc, TimeLimitExceeded):
        message = died_of(exc)
        cause = fingerprint_of("hard_time_limit", request._type)
    elif isinstance(exc, MemoryLimitExceeded):
        message = safe_text(exc, MAX_MESSAGE_CHARS)
        cause = fingerprint_of("memory_limit", request._type)
    elif isinstance(exc, Reject):
        why: Any = exc.args[0]
        kind = type_name(type(why) if isinstance(why, Exception) else Reject)
        message = safe_text(why, MAX_MESSAGE_CHARS)
        cause = fingerprint_of("rejected", request._type, kind)
    else:
        described = describe(exc)
        described["exception"] = (
            _celery_worker.wrapped_type(exc) or described["exception"]
        )
        return failure_of(described, traceback)
    return Failure(kind, message, cause, traceback)


def died_of(exc: BaseException) -> str:
    """What ended a run with its process, as the pool tells it."""
    if isinstance(exc, TimeLimitExceeded):
        return f"the run passed its hard time limit of {exc.args[0]} s"
    return str(exc).partition(" Job:")[0]  # which is the pool's own number


def reason_of_retry(
    request: Any, exc: Retry
) -> tuple[str | None, None, Mapping[str, Any]]:
    """The type of what a run is retried for, no failure, and what is told of it."""
    why: Any = exc.exc
    if not isinstance(why, BaseException):
        return None, None, {"delay_s": exc.when}
    secrets = _shown_arguments(request).secrets
    error = mask(safe_text(why, MAX_MESSAGE_CHARS), secrets)
    kind = _celery_worker.wrapped_type(why) or type_name(type(why))
    return kind, None, {"delay_s": exc.when, "error": error}


def shown_reason(request: Any, reason: Any) -> str:
    """The words of a body, cut, and without what its arguments hide."""
    if not reason:
        return ""
    secrets = _shown_arguments(request).secrets
    # Masked first: half a secret would be shown.
    return cut(mask(safe_text(reason, MAX_MESSAGE_CHARS), secrets), MAX_REASON_CHARS)


def plain_failure(exception: str, message: str, task: str) -> Failure:
    """A failure of a message that never ran."""
    return Failure(exception, message, fingerprint_of(exception, task))


def _embedded(message: Any) -> Mapping[str, Any]:
    """Links, chain and chord of the call (protocol 2: ``app/amqp.py``)."""
    payload = message.payload
    if isinstance(payload, list | tuple) and len(payload) == 3:
        payload = payload[2]
    return payload if isinstance(payload, Mapping) else {}


def _shown_arguments(request: Any) -> ShownArguments:
    return show_arguments(
        request._args,
        request._kwargs,
        parameters=request.task.parameter_names,
        hidden=request.task.hidden_names,
    )
