"""A delivery of a resilient task in the worker's main process.

Built on Celery's Request, or on the app's own, as `Task.Request`. It decides
how the delivery ended, stores what must be stored, and only then lets Celery
acknowledge.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

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

from celery_resilience import _celery
from celery_resilience.delivery.failure import (
    MAX_MESSAGE_CHARS,
    Failure,
    cut_traceback,
    describe,
    failure_of,
    fingerprint_of,
    type_name,
)
from celery_resilience.delivery.malformed import malformed_call
from celery_resilience.delivery.message import HEADER, OriginalMessage, marks_of
from celery_resilience.delivery.outbox import Outgoing
from celery_resilience.delivery.outcome import EVENTS, Outcome, Reason, Settlement
from celery_resilience.delivery.send_again import send_again
from celery_resilience.delivery.settle import Deliveries
from celery_resilience.errors import (
    DropDelivery,
    SendAgain,
    Snooze,
    TaskRanOutOfMemory,
    TooManyCrashes,
)
from celery_resilience.events import emit, observed
from celery_resilience.redaction import (
    ShownArguments,
    mask,
    safe_text,
    show_arguments,
)

logger = logging.getLogger("celery_resilience.delivery")


if TYPE_CHECKING:
    CeleryRequest: TypeAlias = Any
else:
    CeleryRequest = object  # the real one is given to `build_request_class`


class ResilientRequest(CeleryRequest):  # type: ignore[misc]
    """
    The part of a Request class that is ours; see `build_request_class`.

    Attributes:
        deliveries: The table of the worker's deliveries.
        runs_alone: The message is suspected of killing its worker.
    """

    deliveries: ClassVar[Deliveries]
    runs_alone: bool

    #: How the delivery ended; the first answer counts.
    settled_as: Outcome | None = None

    #: The ack or reject that waits for the outbox.
    _is_held = False
    _withheld: tuple[str, bool] | None = None

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
        exc = _celery.exception_of(exc_info)
        if isinstance(exc, Terminated):
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Snooze):
            snoozes = self.marks.get("snoozes", 0) + 1
            self._send_again(
                Outcome.SNOOZED, exc.reason, exc.countdown_s, {"snoozes": snoozes}
            )
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, SendAgain):
            self._send_again(Outcome.REQUEUED, exc.reason, exc.delay_s, exc.marks)
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Retry):
            self._settle(Outcome.RETRIED)
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(exc, Ignore):
            reason = exc.reason if isinstance(exc, DropDelivery) else "ignored"
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
            self._hard_limit(exc, _celery.info_of(exc))

    def acknowledge(self) -> None:
        """Acknowledge the message, once what must be stored is stored."""
        if self._is_held:
            self._withheld = ("acknowledge", False)
        elif not self.acknowledged:
            self.message.settled_as = "acknowledge"
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """Reject the message, once what must be stored is stored."""
        if self.settled_as is None and not self.acknowledged:
            # Celery itself gave the message up: an ETA out of range
            # (worker/strategy.py:186, Celery 5.7).
            if requeue:
                self._settle(Outcome.REQUEUED, "rejected")
            else:
                failure = _plain_failure("InvalidTaskError", "the ETA is out of range")
                self._settle(Outcome.FAILED, Reason.MALFORMED, failure)
        if self._is_held:
            self._withheld = ("reject", requeue)
        elif not self.acknowledged:
            self.message.settled_as = "requeue" if requeue else "reject"
            super().reject(requeue)

    def _announce_revoked(
        self, reason: str, terminated: bool, signum: Any, expired: bool
    ) -> None:
        word = Reason.EXPIRED if expired else Reason.REVOKED
        self._settle(Outcome.REVOKED, word, _plain_failure(word, f"{reason}: {self}"))
        super()._announce_revoked(reason, terminated, signum, expired)

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        """A cold stop, or a lost connection, has cut the run off."""
        if self.task.acks_late:
            self._settle(Outcome.REQUEUED, Reason.INTERRUPTED)
            super()._announce_cancelled(*args, **kwargs)
            return
        # Celery says RETRY here, and sends nothing (worker/request.py:435).
        self._already_cancelled = True
        exc = WorkerLostError("cut off by the worker's cold stop")
        self._fail(Reason.INTERRUPTED, exc, _celery.info_of(exc))

    # --- the ways in which a run ends ----------------------------------------------

    def succeeded(self) -> None:
        """The body returned."""
        facts = self._take_facts()
        if facts.get("skipped") is not None:
            self._settle(Outcome.SKIPPED, facts["skipped"], facts=facts)
        else:
            self._settle(Outcome.SUCCEEDED, facts=facts)

    def dropped(self) -> None:
        """The message went back to the broker before the run started."""
        self._settle(Outcome.REQUEUED, Reason.INTERRUPTED)

    def _rejected(self, exc: Any, exc_info: ExceptionInfo) -> None:
        if exc.requeue:
            self._settle(Outcome.REQUEUED, "rejected")
            super().on_failure(exc_info)
            return
        self._settle(Outcome.FAILED, Reason.REJECTED, self._failure(exc, exc_info, {}))
        _celery.task_ready(self)
        _celery.fail_in_main(self, exc, exc_info)
        self.reject(requeue=False)

    def _worker_lost(self, exc: WorkerLostError, exc_info: ExceptionInfo) -> None:
        late = self.task.acks_late
        if _celery.success_was_stored(self):
            self._settle(Outcome.SUCCEEDED)
            _celery.task_ready(self, successful=True)
            if late:
                self.acknowledge()
            self.send_event("task-succeeded", result="", runtime=None)
        elif self.deliveries.is_stopping and late:
            # Unacknowledged: the broker delivers it again, and no crash is counted.
            self._settle(Outcome.REQUEUED, Reason.INTERRUPTED)
            _celery.task_ready(self)
        elif self.deliveries.is_stopping:
            self._fail(Reason.INTERRUPTED, exc, exc_info)
        elif _celery.retries_on_worker_lost(self) and self._retry_worker_lost(
            exc, exc_info
        ):
            self._settle(Outcome.RETRIED, Reason.WORKER_LOST)
            _celery.task_ready(self)
        elif late and self.task.reject_on_worker_lost is not False:
            self._crashed(Reason.WORKER_LOST, exc, exc_info)
        else:
            self._fail(Reason.WORKER_LOST, exc, exc_info)

    def _hard_limit(self, exc: TimeLimitExceeded, exc_info: ExceptionInfo) -> None:
        if self.task.acks_late and not _celery.is_acknowledged_on(
            self.task, time_limit=True
        ):
            self._crashed(Reason.HARD_TIME_LIMIT, exc, exc_info)
        else:
            self._fail(Reason.HARD_TIME_LIMIT, exc, exc_info)

    def _crashed(
        self, reason: Reason, exc: BaseException, exc_info: ExceptionInfo
    ) -> None:
        """A started run of a late-acked task ended with its process."""
        verdict = self.deliveries.crashes.judge(self.marks, self.task.max_crashes)
        if verdict.delay_s is None:
            self._fail(reason, exc, exc_info)
            return
        logger.warning(
            "%s[%s] ended with its process (run %d): %s; it runs again in %.0f s",
            self.name,
            self.id,
            verdict.runs,
            exc,
            verdict.delay_s,
        )
        self._send_again(Outcome.REQUEUED, reason, verdict.delay_s, verdict.marks)
        _celery.task_ready(self)
        self.acknowledge()

    def _fail_reported(
        self, exc: BaseException, exc_info: ExceptionInfo, send_failed_event: bool
    ) -> None:
        """The child has stored the failure; keep it, then let Celery go on."""
        facts = self._take_facts()
        reason = facts.get("reason", Reason.EXCEPTION)
        if isinstance(exc, TooManyCrashes):
            reason = Reason.WORKER_LOST
        self._settle(Outcome.FAILED, reason, self._failure(exc, exc_info, facts), facts)
        if isinstance(exc, MemoryError):
            exc_info = _celery.with_exception(exc_info, TaskRanOutOfMemory(str(exc)))
        super().on_failure(exc_info, send_failed_event, return_ok=True)

    def _fail(
        self, reason: Reason, exc: BaseException, exc_info: ExceptionInfo
    ) -> None:
        """No child has stored the failure: keep it, and tell Celery ourselves."""
        facts = self._take_facts()
        self._settle(Outcome.FAILED, reason, self._failure(exc, exc_info, facts), facts)
        _celery.task_ready(self)
        told = exc if isinstance(exc, Exception) else TaskRanOutOfMemory(str(exc))
        if isinstance(exc, MemoryError):
            told = TaskRanOutOfMemory(str(exc))
        try:
            _celery.fail_in_main(self, told, exc_info)
            if reason is Reason.HARD_TIME_LIMIT:
                _celery.call_failure_hooks(self, told, exc_info)
        except Exception:
            # A result backend that is away, or a hook that raises, must not
            # leave the message unacknowledged: the failure is kept already.
            logger.exception("after the failure of %s[%s]", self.name, self.id)
        if self.task.acks_late:
            is_limit = reason is Reason.HARD_TIME_LIMIT
            if _celery.is_acknowledged_on(self.task, time_limit=is_limit) or is_limit:
                self.acknowledge()
            else:
                self.reject(requeue=False)

    # --- settling ----------------------------------------------------------------------

    @property
    def marks(self) -> dict[str, Any]:
        """What we had written on the message."""
        return marks_of(self.message.headers)

    def _settle(
        self,
        outcome: Outcome,
        reason: str | None = None,
        failure: Failure | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Decide, once, how the delivery ended; store what that asks for."""
        if not self._claim(outcome):
            return
        deliveries = self.deliveries
        event = EVENTS[outcome]
        if failure is not None or self._has_past or observed(event):
            settlement = self._settlement(outcome, reason, failure, facts or {})
            if failure is not None or self._has_past:
                original = deliveries.original(self.message)
                self._store(deliveries.keeps.message_for(settlement, original))
            emit(event, settlement=settlement)

    def _send_again(
        self,
        outcome: Outcome,
        reason: str | None,
        delay_s: float,
        marks: Mapping[str, Any],
    ) -> None:
        if not self._claim(outcome):
            return
        original = self.deliveries.original(self.message)
        copy = send_again(original, delay_s=delay_s, marks=marks)
        self._store(copy, keep=False)
        if observed(EVENTS[outcome]):
            settlement = self._settlement(outcome, reason, None, {})
            emit(EVENTS[outcome], settlement=settlement)

    def _claim(self, outcome: Outcome) -> bool:
        """Whether this is the first answer; two threads may have one each."""
        mine = (outcome,)
        if self.__dict__.setdefault("_answer", mine) is not mine:
            return False
        self.settled_as = outcome
        self.deliveries.gate.left(self)
        self.deliveries.closed(self, outcome)
        return True

    @property
    def _has_past(self) -> bool:
        """The message was replayed, sent again or delivered before."""
        return bool(
            self._delivery_info["redelivered"] or self.message.headers.get(HEADER)
        )

    def _store(self, message: OriginalMessage | None, *, keep: bool = True) -> None:
        if message is None:
            return
        outgoing = Outgoing(
            message=message,
            then=self._stored,
            keep=keep,
            acknowledged=self.acknowledged,
            what=f"{self.name}[{self.id}]",
        )
        self._is_held = True
        self.deliveries.held.add(self)
        self.deliveries.outbox.put(outgoing)

    def _stored(self) -> None:
        self._is_held = False
        self.deliveries.held.discard(self)
        withheld, self._withheld = self._withheld, None
        if withheld is not None:
            if withheld[0] == "acknowledge":
                self.acknowledge()
            else:
                self.reject(withheld[1])

    def _settlement(
        self,
        outcome: Outcome,
        reason: str | None,
        failure: Failure | None,
        facts: Mapping[str, Any],
    ) -> Settlement:
        shown = (
            self._shown_arguments() if failure is not None else ShownArguments("", "")
        )
        if failure is not None and shown.secrets:
            failure = Failure(
                failure.exception,
                mask(failure.message, shown.secrets),
                failure.fingerprint,
                mask(failure.traceback, shown.secrets),
            )
        started = self.time_start
        embedded = self._embedded() if failure is not None else {}
        return Settlement(
            outcome=outcome,
            reason=reason,
            task=self._type,
            task_id=self.id,
            queue=self.deliveries.queue_of(self.message),
            worker=self.deliveries.worker,
            attempt=(self._request_dict.get("retries") or 0) + 1,
            root_id=self._root_id,
            parent_id=self._parent_id,
            pid=self.worker_pid,
            run_s=None if started is None else max(0.0, time.time() - started),
            failure=failure,
            args=shown.args,
            kwargs=shown.kwargs,
            arguments=shown.named,
            in_chord=bool(embedded.get("chord")),
            chain_length=len(embedded.get("chain") or ()),
            marks=self.marks,
            facts=facts,
        )

    def _embedded(self) -> Mapping[str, Any]:
        """Links, chain and chord of the call (protocol 2: ``app/amqp.py``)."""
        payload = self.message.payload
        if isinstance(payload, list | tuple) and len(payload) == 3:
            return payload[2] or {}
        return payload if isinstance(payload, Mapping) else {}

    def _shown_arguments(self) -> ShownArguments:
        return show_arguments(
            self._args,
            self._kwargs,
            parameters=self.task.parameter_names,
            hidden=self.task.hidden_names,
        )

    def _take_facts(self) -> dict[str, Any]:
        return self.deliveries.facts.take(self.worker_pid, self.id)

    def _failure(
        self, exc: BaseException, exc_info: ExceptionInfo, facts: dict[str, Any]
    ) -> Failure:
        traceback = cut_traceback(exc_info.traceback or "")
        if "fingerprint" in facts:
            return failure_of(facts, traceback)
        if isinstance(exc, WorkerLostError):
            message = f"{_signal_in(exc)} {self.deliveries.crashes.describe()}"
            return Failure(
                exception=type_name(type(exc)),
                message=message,
                fingerprint=fingerprint_of("worker_lost", self._type, _signal_in(exc)),
                traceback=traceback,
            )
        if isinstance(exc, TimeLimitExceeded):
            message = f"the run passed its hard time limit of {exc.args[0]} s"
            return Failure(
                exception=type_name(type(exc)),
                message=message,
                fingerprint=fingerprint_of("hard_time_limit", self._type),
                traceback=traceback,
            )
        if isinstance(exc, Reject):
            why: Any = exc.args[0]
            kind = type(why) if isinstance(why, Exception) else Reject
            return Failure(
                exception=type_name(kind),
                message=safe_text(why, MAX_MESSAGE_CHARS),
                fingerprint=fingerprint_of("rejected", self._type, type_name(kind)),
                traceback=traceback,
            )
        described = describe(exc)
        described["exception"] = _celery.wrapped_type(exc) or described["exception"]
        return failure_of(described, traceback)


def build_request_class(base: type[Any], deliveries: Deliveries) -> type[Any]:
    """
    A Request class that settles each delivery once, on top of *base*.

    Args:
        base: Celery's Request class, or the app's own.
        deliveries: The table of the worker's deliveries.
    """
    if issubclass(base, ResilientRequest):
        base = base.__mro__[base.__mro__.index(ResilientRequest) + 1]
    return type(
        "ResilientRequest", (ResilientRequest, base), {"deliveries": deliveries}
    )


def _settling(on_success: Callable[..., None]) -> Callable[..., None]:
    def settle_and_go_on(self: Any, result: Any, **kwargs: Any) -> None:
        if isinstance(result, ExceptionInfo):
            # threads, gevent and solo hand over a BaseException in place of the
            # three values (concurrency/base.py:41, Celery 5.7).
            lost = _celery.exception_of(result)
            exc = lost.__context__ or lost
            self.on_failure(_celery.with_exception(result, exc))
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


def _plain_failure(exception: str, message: str) -> Failure:
    return Failure(exception, message, fingerprint_of(exception, message[:40]))


def _signal_in(exc: BaseException) -> str:
    """The signal or exit code in a WorkerLostError's text, without its job number."""
    return str(exc).partition(" Job:")[0]
