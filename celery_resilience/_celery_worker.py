"""Undocumented names of Celery's that only a worker needs; as in `_celery`.

What they are of takes longer to import than all that a process needs which sends.
The start-up self-check (`missing_doors`) proves that all doors, also those of
`_celery`, `_pools` and `_kombu`, are there in the release at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

import billiard.common
from billiard import pool as billiard_pools
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import _state, signals, states
from celery.app import log as app_log
from celery.app import trace
from celery.app.task import Context, Task
from celery.concurrency import asynpool
from celery.concurrency import base as pools
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.fixups.django import DjangoFixup, DjangoWorkerFixup
from celery.platforms import EX_FAILURE, EX_OK
from celery.utils import log as celery_log
from celery.utils.log import in_sighandler
from celery.utils.serialization import UnpickleableExceptionWrapper
from celery.worker import request as requests
from celery.worker import state
from kombu.utils.encoding import safe_repr

from celery_resilience._kombu import kombu_is_as_read
from celery_resilience._pools import (
    child_is_as_read,
    exits_are_as_read,
    has_parameters,
    is_event_loop_prefork,
)

# --- what a run ended with ----------------------------------------------------------


def exception_of(exc_info: ExceptionInfo) -> BaseException:
    """The exception in what a pool hands over (billiard 4.3, ``einfo.py``)."""
    exc: Any = exc_info.exception
    found: BaseException = exc.exc if isinstance(exc, ExceptionWithTraceback) else exc
    return found


def info_of(exc: BaseException) -> ExceptionInfo:
    """An ExceptionInfo of *exc*, with the traceback that it has."""
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()


def with_exception(exc_info: ExceptionInfo, exc: BaseException) -> ExceptionInfo:
    """*exc_info* with another exception and the same traceback."""
    changed = copy.copy(exc_info)
    changed.exception = exc
    changed.type = type(exc)
    return changed


def wrapped_type(exc: BaseException) -> str | None:
    """The true type's name when *exc* stands for one that cannot be pickled."""
    if isinstance(exc, UnpickleableExceptionWrapper):
        return f"{exc.exc_module}.{exc.exc_cls_name}"
    return None


#: BaseExceptions that steer the worker itself.
WORKER_EXITS = (WorkerShutdown, WorkerTerminate)


def is_worker_stopping() -> bool:
    """Main process: a signal has asked this worker to stop, warm or cold."""
    # Not by `in`: the exit code of a warm stop is 0, which equals False.
    flags: tuple[Any, ...] = (state.should_stop, state.should_terminate)
    return any(flag is not None and flag is not False for flag in flags)


def is_interrupted_by_a_signal(pool: Any) -> bool:
    """
    Whether the handler of a signal runs here, above the body of a task.

    Where the main thread runs the tasks: solo (``concurrency/solo.py``, Celery 5.7).
    """
    return isinstance(pool, SoloPool) and is_in_a_signals_handler()


def is_in_a_signals_handler() -> bool:
    """Whether one of Celery's handlers runs (``utils/log.py:63``, Celery 5.7)."""
    return bool(getattr(celery_log, "_in_sighandler", False))


def worker_terminates() -> BaseException:
    """What ends a worker, and the body that its main thread runs, in a cold stop."""
    return WorkerTerminate(EX_FAILURE)


# --- a worker's end -----------------------------------------------------------------


def ask_to_stop() -> None:
    """Main process: end warm, as after SIGTERM (``worker/state.py``, Celery 5.7)."""
    if not is_worker_stopping():
        state.should_stop = EX_OK


def running_tasks() -> int:
    """How many tasks run, of every kind."""
    return len(state.active_requests)


def ended_tasks() -> int:
    """Tasks of every kind that were accepted by the pool and run no more."""
    return int(state.all_total_count[0]) - len(state.active_requests)


def accepted_tasks() -> int:
    """Tasks of every kind that were accepted by the pool, since the start."""
    return int(state.all_total_count[0])


def held_tasks() -> int:
    """Messages that this worker holds: running, waiting, or with an ETA."""
    return len(state.requests)


def unaccepted_requests() -> set[Any]:
    """
    The requests that no process or thread of the pool has accepted.

    Raises:
        RuntimeError: Another thread has changed them meanwhile.
    """
    return set(state.reserved_requests) - set(state.active_requests)


def cut_off_running(consumer: Any) -> None:
    """
    Cut off what runs, as a cold stop does (``apps/worker.py:476``, Celery 5.7).

    In the main thread, where a signal's handler may do so within the body of a task
    on solo; that one is ended with the worker.
    """
    try:
        with in_sighandler():
            consumer.cancel_active_requests()
    except NotImplementedError:
        if not isinstance(consumer.pool, SoloPool):
            raise
        raise worker_terminates() from None


def cut_off_from_outside(request: Any) -> None:
    """Settle a request whose body goes on until this process ends."""
    request._announce_cancelled(emit_retry=not request.task.acks_late)


# --- its log ------------------------------------------------------------------------

#: How a line begins that tells of a retry, and one of a task that was ignored; each has
#: its facts in ``extra["data"]`` (``app/trace.py:129``, Celery 5.7).
LOG_RETRY, LOG_IGNORED = trace.LOG_RETRY, trace.LOG_IGNORED


@cache
def quoting_lines() -> Mapping[str, int]:
    """
    Lines that quote a message, and how many of their first arguments do not.

    As `_consumer_class`, in a worker only (``worker/consumer/consumer.py:748``,
    ``concurrency/base.py:149``, Celery 5.7).
    """
    from celery.worker.consumer import consumer

    return {
        consumer.UNKNOWN_FORMAT: 0,
        consumer.UNKNOWN_TASK_ERROR: 1,
        consumer.INVALID_TASK_ERROR: 1,
        consumer.MESSAGE_DECODE_ERROR: 3,
        "TaskPool: Apply %s (args:%s kwargs:%s)": 1,
    }


def is_own_formatter(formatter: Any) -> bool:
    """Whether a handler writes as Celery does where nobody has said how."""
    return type(formatter) in (celery_log.ColorFormatter, app_log.TaskFormatter)


# --- between two tasks --------------------------------------------------------------


def keep_django_connections(app: Any, keeps_now: Callable[[], bool]) -> None:
    """
    Let Celery's fixup for Django leave connections alone while *keeps_now*.

    It closes every connection before and after each task (``fixups/django.py:187``,
    Celery 5.7), or, with CELERY_DB_REUSE_MAX, looks at none of so many.
    """
    for fixup in getattr(app, "_fixups", ()):
        if not isinstance(fixup, DjangoFixup):
            continue
        worker_fixup: Any = fixup.worker_fixup
        if "close_database" in vars(worker_fixup):
            continue
        close = worker_fixup.close_database

        def close_unless_kept(close: Callable[..., Any] = close, **words: Any) -> None:
            if not keeps_now():
                close(**words)

        worker_fixup.close_database = close_unless_kept


# --- settling a request -------------------------------------------------------------


def task_ready(request: Any, *, successful: bool = False) -> None:
    """Take *request* out of the worker's tables of running requests."""
    state.task_ready(request, successful=successful)


def fail_in_main(request: Any, exc: BaseException, exc_info: ExceptionInfo) -> None:
    """
    Tell Celery of a failure that no child has told it of: once, with context.

    The result backend (with errbacks and chord), the task_failure signal and
    the task-failed event, as ``worker/request.py:781`` does in Celery 5.7; the
    caller acknowledges.
    """
    task = request.task
    context = request._context
    task.backend.mark_as_failure(
        request.id, exc, request=context, store_result=request.store_errors
    )
    task.request_stack.push(context)
    try:
        signals.task_failure.send(
            sender=task,
            task_id=request.id,
            exception=exc,
            args=request.args,
            kwargs=request.kwargs,
            traceback=exc_info.traceback,
            einfo=exc_info,
        )
    finally:
        task.request_stack.pop()
    request.send_event(
        "task-failed", exception=safe_repr(exc), traceback=exc_info.traceback
    )


def call_failure_hooks(request: Any, exc: Exception, exc_info: ExceptionInfo) -> None:
    """Task.on_failure and after_return, as Celery 5.7 calls them at a hard limit."""
    task = request.task
    task.on_failure(exc, request.id, request.args, request.kwargs, exc_info)
    task.after_return(
        states.FAILURE, exc, request.id, request.args, request.kwargs, exc_info
    )


def success_was_stored(request: Any) -> bool:
    """
    Whether this run stored SUCCESS before it was cut off.

    Celery 5.7 asks the backend, with at most three tries
    (``worker/request.py:844``); earlier releases do not, and neither do we there.
    A success from before the run is another one's, of the same task id. Most
    backends keep the first success of an id, and then none of this run is known.
    """
    asked = getattr(request, "_success_was_stored", None)
    meta = asked() if asked is not None else None
    if not meta or request.time_start is None:
        return False
    done_at = _wall_time(meta.get("date_done"))
    if done_at is None:
        return True
    # A database may have cut the fraction off.
    started_at = request.time_start
    return done_at >= (int(started_at) if done_at.is_integer() else started_at)


def _wall_time(date: Any) -> float | None:
    """Seconds of a backend's date, which is a text or a datetime, in UTC if unsaid."""
    try:
        date = datetime.fromisoformat(date) if isinstance(date, str) else date
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        return float(date.timestamp())
    except (AttributeError, TypeError, ValueError):
        return None


def retries_on_worker_lost(request: Any) -> bool:
    """Whether Celery 5.7's own `retry_on_worker_lost` still has a retry left."""
    task = request.task
    if not getattr(task, "retry_on_worker_lost", None):
        return False
    limit = task.max_retries
    return limit is None or request._context.retries < limit


# --- what the consumer holds --------------------------------------------------------


def running_requests() -> set[Any]:
    """The requests that a pool has accepted, without those that were cancelled."""
    return {
        request
        for request in list(state.active_requests)
        if not request._already_cancelled
    }


def has_yet_to_run(request: Any) -> bool:
    """Whether a request that a pool was given is neither settled nor cancelled."""
    return not (request.acknowledged or request._already_cancelled)


def requests_that_will_run(consumer: Any) -> set[Any]:
    """
    The requests that the pool does not give up any more.

    A pool that cannot be flushed (threads, gevent, solo) runs what it was given,
    though Celery 5.7 forgets it when the connection is lost (``consumer.py:593``).
    """
    requests = running_requests()
    if not is_event_loop_prefork(consumer.pool):
        requests |= set(state.reserved_requests)
    return requests


# --- the self-check -----------------------------------------------------------------


def _request_class_is_subclassed() -> bool:
    """The generated Request is a plain subclass with the two methods of its own."""

    class Probe(requests.Request):
        pass

    class Pool:
        def apply_async(self) -> None: ...

    class Stub:
        time_limit = soft_time_limit = None
        acks_late = True

    made = requests.create_request_cls(Probe, Stub(), Pool(), "", None, app=_ProbeApp())
    return issubclass(made, Probe) and {"on_success", "execute_using_pool"} <= set(
        vars(made)
    )


def _consumer_class() -> Any:
    """
    Celery's; imported in a worker only.

    Its module takes `build_tracer` as it is then, and who replaces that (sentry-sdk, in
    `init`) may do so after celery-resilience was imported.
    """
    from celery.worker.consumer.consumer import Consumer

    return Consumer


class _ProbeApp:
    use_fast_trace_task = False


#: Doors without which a failed task would not be kept: the worker refuses to start.
CAPTURE_DOORS: Mapping[str, Callable[[], bool]] = {
    "Request.on_failure(exc_info, send_failed_event, return_ok)": lambda: (
        has_parameters(
            requests.Request.on_failure, "exc_info", "send_failed_event", "return_ok"
        )
    ),
    "Request.on_timeout(soft, timeout)": lambda: has_parameters(
        requests.Request.on_timeout, "soft", "timeout"
    ),
    "Request.acknowledge() and reject(requeue)": lambda: (
        callable(requests.Request.acknowledge)
        and has_parameters(requests.Request.reject, "requeue")
    ),
    "create_request_cls() subclasses the task's Request": _request_class_is_subclassed,
    "Task.Request": lambda: isinstance(Task.Request, str),
    "Consumer.create_task_handler()": lambda: callable(
        _consumer_class().create_task_handler
    ),
    "Consumer.on_unknown_task(body, message, exc)": lambda: has_parameters(
        _consumer_class().on_unknown_task, "body", "message", "exc"
    ),
    "Consumer.on_invalid_task(body, message, exc)": lambda: has_parameters(
        _consumer_class().on_invalid_task, "body", "message", "exc"
    ),
    "Consumer.on_decode_error(message, exc)": lambda: has_parameters(
        _consumer_class().on_decode_error, "message", "exc"
    ),
}


#: Doors without which one promise is weaker: the worker says so and starts.
OTHER_DOORS: Mapping[str, Callable[[], bool]] = {
    "billiard.common._should_have_exited": lambda: isinstance(
        billiard.common._should_have_exited, list
    ),
    "_state._get_active_apps()": lambda: callable(_state._get_active_apps),
    "Context._protected": lambda: Context._protected == 0,
    "apply_target(callback)": lambda: has_parameters(pools.apply_target, "callback"),
    "Request._announce_revoked()": lambda: has_parameters(
        requests.Request._announce_revoked, "reason", "expired"
    ),
    "Request._announce_cancelled()": lambda: callable(
        requests.Request._announce_cancelled
    ),
    "Consumer.on_connection_error_after_connected(exc)": lambda: has_parameters(
        _consumer_class().on_connection_error_after_connected, "exc"
    ),
    "AsynPool.on_job_process_down(job, pid_gone)": lambda: (
        has_parameters(AsynPool.on_job_process_down, "job", "pid_gone")
        and has_parameters(AsynPool.process_flush_queues, "proc")
    ),
    "Pool.terminate_job(pid, sig) and WorkerProcess(worker)": lambda: (
        has_parameters(billiard_pools.Pool.terminate_job, "pid", "sig")
        and has_parameters(billiard_pools.Pool.WorkerProcess, "worker")
    ),
    "billiard's Worker.on_loop_start(pid)": lambda: has_parameters(
        billiard_pools.Worker.on_loop_start, "pid"
    ),
    "ResultHandler._flush_outqueue(fd, remove, process_index, on_state_change)": (
        lambda: has_parameters(
            asynpool.ResultHandler._flush_outqueue,
            *("fd", "remove", "process_index", "on_state_change"),
        )
    ),
    "Consumer.cancel_active_requests()": lambda: callable(
        _consumer_class().cancel_active_requests
    ),
    "billiard Worker.wait_for_job and on_ready_counter": child_is_as_read,
    "AsynPool.maintain_pool() and Process._sentinel_poll": exits_are_as_read,
    "DjangoWorkerFixup.close_database()": lambda: (
        callable(DjangoWorkerFixup.close_database)
        and callable(DjangoWorkerFixup.on_task_prerun)
        and isinstance(DjangoFixup.worker_fixup, property)
    ),
    "kombu's virtual.QoS and Channel": kombu_is_as_read,
}


def missing_doors(doors: Mapping[str, Callable[[], bool]]) -> list[str]:
    """The doors that the installed Celery does not have."""
    missing = []
    for name, is_there in doors.items():
        try:
            if not is_there():
                missing.append(name)
        except Exception as exc:
            missing.append(f"{name} ({type(exc).__name__}: {exc})")
    return missing
