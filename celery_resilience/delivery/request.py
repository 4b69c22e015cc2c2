"""A delivery of a resilient task in the worker's main process.

Built on Celery's Request, or on the app's own, as `Task.Request`. It knows
what each way for a run to end means.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import (
    Ignore,
    InvalidTaskError,
    Reject,
    Retry,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)

from celery_resilience import _celery, _celery_worker, _pools
from celery_resilience.delivery.deliveries import Deliveries
from celery_resilience.delivery.malformed import malformed_call
from celery_resilience.delivery.settlement import (
    died_of,
    failure_of_run,
    plain_failure,
    reason_of_retry,
    shown_reason,
)
from celery_resilience.delivery.settling import SettlingRequest
from celery_resilience.errors import (
    AskAgain,
    BroadcastIsOnce,
    CircuitSnooze,
    MemoryLimitExceeded,
    SendAgain,
    Snooze,
    TaskExited,
    TaskRanOutOfMemory,
)
from celery_resilience.events import emit
from celery_resilience.holder import holder_name
from celery_resilience.message import HEADER, RETRY_WAIT, id_text, marks_of
from celery_resilience.outcome import COUNTED, Outcome, Reason
from celery_resilience.reasons import reason_of
from celery_resilience.redaction import safe_text
from celery_resilience.run_view import COUNTED_FACT, PAID_FACT

logger = logging.getLogger("celery_resilience.delivery")


class ResilientRequest(SettlingRequest):
    """
    The part of a Request class that is ours; see `build_request_class`.

    Attributes:
        runs_alone: The message is suspected of killing its worker.
    """

    runs_alone: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Celery subclasses a task's Request and overrides these two without
        # calling super (worker/request.py:989, Celery 5.7).
        if "on_success" in vars(cls) and "execute_using_pool" in vars(cls):
            cls.on_success = _settling(cls.on_success)
            cls.execute_using_pool = _admitted(cls.execute_using_pool)

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        defect = malformed_call(self._args, self._kwargs, message)
        if defect:
            raise InvalidTaskError(defect)
        marks = message.headers.get(HEADER)
        self.runs_alone = bool(marks and marks_of(message.headers).get("alone"))
        self.deliveries.opened(self)

    # --- what Celery calls -------------------------------------------------------

    def on_failure(
        self,
        exc_info: ExceptionInfo,
        send_failed_event: bool = True,
        return_ok: bool = False,
    ) -> None:
        """The pool reports that the run did not end in success."""
        if self.settled_as is not None:
            return
        exc = _celery_worker.exception_of(exc_info)
        facts: dict[str, Any] = {}
        if isinstance(exc, Ignore | Reject | Retry):
            # Not for a later run of the same task id in this child.
            facts = self._take_facts()
        ended_for = None
        if isinstance(exc, Terminated | WorkerLostError):
            ended_for = self.deliveries.ended_children.get(self.worker_pid)
        if ended_for is not None:
            self._ended_for_memory(ended_for)
        elif isinstance(exc, Terminated):
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Snooze | SendAgain) and not self._can_come_again:
            once = BroadcastIsOnce(f"{exc.reason}: {BroadcastIsOnce.__doc__}")
            self._fail(Reason.EXCEPTION, once, _celery_worker.info_of(once))
        elif isinstance(exc, Snooze):
            # Those of a circuit are counted by their age, and not with the others.
            is_own = not isinstance(exc, CircuitSnooze)
            snoozes = self.marks.get("snoozes", 0) + is_own
            marks: dict[str, Any] = {
                "snoozes": snoozes,
                "redeliveries": None,
                "waits_since": None,
                **({RETRY_WAIT: None} if PAID_FACT in facts else {}),
            }
            marks.update(getattr(exc, "marks", {}))
            reason = shown_reason(self, exc.reason) if is_own else exc.reason
            self._send_again(Outcome.SNOOZED, reason, exc.countdown_s, marks)
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, SendAgain):
            snoozed = isinstance(exc, AskAgain)
            outcome = Outcome.SNOOZED if snoozed else Outcome.REQUEUED
            self._send_again(outcome, exc.reason, exc.delay_s, exc.marks)
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Retry):
            self._settle(Outcome.RETRIED, *reason_of_retry(self, exc))
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Ignore):
            reason = getattr(exc, "reason", "ignored")
            self._settle(Outcome.SKIPPED, reason)
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Reject):
            self._rejected(exc, exc_info)
        elif isinstance(exc, WorkerLostError):
            self._worker_lost(exc, exc_info)
        elif isinstance(exc, TimeLimitExceeded):
            self._hard_limit(exc, exc_info)
        elif return_ok:
            self._fail_reported(exc, exc_info, send_failed_event)
        else:
            self._fail(Reason.EXCEPTION, exc, exc_info)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """
        A time limit has passed.

        The prefork pool reports a hard limit here after it has reported it to
        `on_failure` (``billiard/pool.py:744``); the gevent pool only here.
        """
        if soft:
            super().on_timeout(soft, timeout)
        elif self.settled_as is None:
            exc = TimeLimitExceeded(timeout)
            self._hard_limit(exc, _celery_worker.info_of(exc))

    def reject(self, requeue: bool = False) -> None:
        """Celery gives the message up, perhaps before it ran."""
        if self.settled_as is None and not self.acknowledged:
            # An ETA out of range (worker/strategy.py:186, Celery 5.7).
            if requeue:
                self._settle(Outcome.REQUEUED, "rejected")
            else:
                failure = plain_failure(
                    "InvalidTaskError", "the ETA is out of range", self._type
                )
                self._settle(Outcome.FAILED, Reason.MALFORMED, failure)
        super().reject(requeue)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """
        A cold stop cuts the run off, or a lost connection does.

        threads and solo cannot end a run: Celery 5.7 raises NotImplementedError. On
        solo that is within the task's body, which the signal has interrupted, and
        which it fails (``apps/worker.py:476``); what ends the worker ends it instead.
        """
        try:
            super().cancel(pool, signal, emit_retry)
        except NotImplementedError:
            if not _celery_worker.is_interrupted_by_a_signal(pool):
                raise
            self._announce_cancelled(emit_retry=emit_retry)
            raise _celery_worker.worker_terminates() from None

    def _announce_revoked(
        self, reason: str, terminated: bool, signum: Any, expired: bool
    ) -> None:
        word = Reason.EXPIRED if expired else Reason.REVOKED
        self._settle(
            Outcome.REVOKED, word, plain_failure(word, f"{reason}: {self}", self._type)
        )
        super()._announce_revoked(reason, terminated, signum, expired)

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        """A cold stop, or a lost connection, has cut the run off."""
        if self.task.acks_late:
            self._settle(Outcome.REQUEUED, Reason.INTERRUPTED)
            super()._announce_cancelled(*args, **kwargs)
            return
        # Celery says RETRY here, and sends nothing (worker/request.py:435).
        self._already_cancelled = True
        if self._has_succeeded():
            return
        exc = WorkerLostError("cut off by the worker's cold stop")
        self._fail(Reason.INTERRUPTED, exc, _celery_worker.info_of(exc))

    # --- the ways in which a run ends ----------------------------------------------

    def succeeded(self) -> None:
        """The body returned."""
        facts = self._take_facts()
        if facts.get("skipped") is not None:
            facts["skipped"] = shown_reason(self, facts["skipped"])
            self._settle(Outcome.SKIPPED, facts["skipped"], facts=facts)
        else:
            self._settle(Outcome.SUCCEEDED, facts=facts)

    def dropped(self) -> None:
        """The message went back to the broker before the run started."""
        self._settle(Outcome.REQUEUED, Reason.INTERRUPTED)

    def _rejected(self, exc: Any, exc_info: ExceptionInfo) -> None:
        if exc.requeue and "redeliveries" in self.marks and not self.acknowledged:
            # Without a store a redelivery is counted on its message, as a run that
            # may have died. This one has not: the count begins anew.
            marks = {"redeliveries": None, "alone": None}
            self._send_again(Outcome.REQUEUED, "rejected", 0.0, marks)
            _celery_worker.task_ready(self)
            self.acknowledge()
            return
        if exc.requeue:
            self._settle(Outcome.REQUEUED, "rejected")
            super().on_failure(exc_info)
            return
        failure = failure_of_run(self, exc, exc_info, {})
        self._settle(Outcome.FAILED, Reason.REJECTED, failure, is_silent=True)
        _celery_worker.task_ready(self)
        self._tell_celery(exc, exc_info)
        self.reject(requeue=False)

    def _worker_lost(self, exc: WorkerLostError, exc_info: ExceptionInfo) -> None:
        late = self.task.acks_late
        if self._has_succeeded():
            return
        if self.deliveries.is_stopping and late:
            # Unacknowledged: the broker delivers it again, and no crash is counted.
            self._settle(Outcome.REQUEUED, Reason.INTERRUPTED)
            _celery_worker.task_ready(self)
        elif self.deliveries.is_stopping:
            self._fail(Reason.INTERRUPTED, exc, exc_info)
        elif _celery_worker.retries_on_worker_lost(self) and self._retry_worker_lost(
            exc, exc_info
        ):
            self._settle(Outcome.RETRIED, Reason.WORKER_LOST)
            _celery_worker.task_ready(self)
        elif late and self.task.reject_on_worker_lost is not False:
            self._crashed(Reason.WORKER_LOST, exc, exc_info)
        else:
            self._fail(Reason.WORKER_LOST, exc, exc_info)

    def _hard_limit(self, exc: TimeLimitExceeded, exc_info: ExceptionInfo) -> None:
        lost = _pools.died_before(self.worker_pid)
        if lost is not None:
            self._worker_lost(lost, _celery_worker.info_of(lost))
        elif self._has_succeeded():
            return
        elif self.task.acks_late and not _celery.is_acknowledged_on(
            self.task, time_limit=True
        ):
            self._crashed(Reason.HARD_TIME_LIMIT, exc, exc_info)
        else:
            self._fail(Reason.HARD_TIME_LIMIT, exc, exc_info)

    def _ended_for_memory(self, why: MemoryLimitExceeded) -> None:
        """The main process has ended the child for what a run of its had taken."""
        if why.task != self.name:
            # That run has just ended, and this one had begun.
            lost = WorkerLostError(f"its child was ended for the run before it: {why}")
            self._worker_lost(lost, _celery_worker.info_of(lost))
        elif not self._has_succeeded():
            self.deliveries.ended_children.pop(self.worker_pid, None)
            self._fail(Reason.MEMORY_LIMIT, why, _celery_worker.info_of(why))

    def _has_succeeded(self) -> bool:
        """Settle a run that was cut off after its success was stored."""
        if not _celery_worker.success_was_stored(self):
            return False
        self.succeeded()
        _celery_worker.task_ready(self, successful=True)
        if self.task.acks_late:
            self.acknowledge()
        self.send_event("task-succeeded", result="", runtime=None)
        return True

    def _crashed(
        self, reason: Reason, exc: BaseException, exc_info: ExceptionInfo
    ) -> None:
        """A started run of a late-acked task ended with its process."""
        verdict = self.deliveries.crashes.judge(
            self.marks,
            self.task.max_crashes,
            self._take_facts().get("runs_before", 0),
        )
        if verdict.delay_s is None or not self._can_come_again:
            self._fail(reason, exc, exc_info)
            return
        marks = dict(verdict.marks)
        if self.task.has_key:
            marks["crashed"] = holder_name(self.worker_pid)
        told = {"error": died_of(exc), "crashes": verdict.runs}
        self._send_again(Outcome.REQUEUED, reason, verdict.delay_s, marks, told)
        _celery_worker.task_ready(self)
        self.acknowledge()

    def _fail_reported(
        self, exc: BaseException, exc_info: ExceptionInfo, send_failed_event: bool
    ) -> None:
        """The child has stored the failure; keep it, then let Celery go on."""
        facts = self._take_facts()
        reason = reason_of(exc, facts.get("reason", Reason.EXCEPTION))
        self._settle(
            Outcome.FAILED, reason, failure_of_run(self, exc, exc_info, facts), facts
        )
        if isinstance(exc, MemoryError):
            exc_info = _celery_worker.with_exception(exc_info, _for_celery(exc))
        super().on_failure(exc_info, send_failed_event, return_ok=True)

    def _fail(
        self, reason: Reason, exc: BaseException, exc_info: ExceptionInfo
    ) -> None:
        """No child has stored the failure: keep it, and tell Celery ourselves."""
        facts = self._take_facts()
        failure = failure_of_run(self, exc, exc_info, facts)
        self._settle(Outcome.FAILED, reason, failure, facts, is_silent=True)
        _celery_worker.task_ready(self)
        has_hooks = reason in (Reason.HARD_TIME_LIMIT, Reason.MEMORY_LIMIT)
        self._tell_celery(_for_celery(exc), exc_info, has_hooks=has_hooks)
        if self.task.acks_late:
            is_limit = reason is Reason.HARD_TIME_LIMIT
            if _celery.is_acknowledged_on(self.task, time_limit=is_limit) or is_limit:
                self.acknowledge()
            else:
                self.reject(requeue=False)

    def _tell_celery(
        self, exc: Exception, exc_info: ExceptionInfo, *, has_hooks: bool = False
    ) -> None:
        try:
            _celery_worker.fail_in_main(self, exc, exc_info)
            if has_hooks:
                _celery_worker.call_failure_hooks(self, exc, exc_info)
        except Exception:
            # A result backend that is away, or a hook that raises, must not
            # leave the message unacknowledged: the failure is kept already.
            logger.exception("after the failure of %s[%s]", self.name, self.id)

    @property
    def _can_come_again(self) -> bool:
        return self.deliveries.can_come_again(self.message)

    def _take_facts(self) -> dict[str, Any]:
        facts = self.deliveries.facts.take(self.worker_pid, id_text(self.id))
        if COUNTED_FACT in facts:
            emit(COUNTED, fact=facts.pop(COUNTED_FACT))
        return facts


def build_request_class(base: type[Any], deliveries: Deliveries) -> type[Any]:
    """
    A Request class that settles each delivery once, on top of *base*.

    Args:
        base: Celery's Request class, or the app's own.
        deliveries: The table of the worker's deliveries.
    """
    if issubclass(base, ResilientRequest):
        base = base.__mro__[base.__mro__.index(SettlingRequest) + 1]
    return type(
        "ResilientRequest", (ResilientRequest, base), {"deliveries": deliveries}
    )


def _for_celery(exc: BaseException) -> Exception:
    """An exception that Celery stores and signals without obeying it."""
    if isinstance(exc, MemoryError):
        return TaskRanOutOfMemory(safe_text(exc))
    if isinstance(exc, Exception):
        return exc
    return TaskExited(f"{type(exc).__name__}: {safe_text(exc)}")


def _settling(on_success: Callable[..., None]) -> Callable[..., None]:
    def settle_and_go_on(self: Any, result: Any, **kwargs: Any) -> None:
        if isinstance(result, ExceptionInfo):
            # threads, gevent and solo hand over a BaseException in place of the
            # three values (concurrency/base.py:41, Celery 5.7).
            lost = _celery_worker.exception_of(result)
            exc = lost.__context__ or lost
            self.on_failure(_celery_worker.with_exception(result, exc))
            return
        if result[0]:
            self.on_failure(result[1], return_ok=True)
            return
        if self.settled_as is None:
            self.succeeded()
        on_success(self, result, **kwargs)

    return settle_and_go_on


def _admitted(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_if_admitted(self: Any, pool: Any, **kwargs: Any) -> Any:
        if self.deliveries.gate.admit(self):
            return execute(self, pool, **kwargs)
        return None

    return execute_if_admitted
