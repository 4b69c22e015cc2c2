"""The only user of undocumented names of Celery's; see `_pools` and `_kombu` for others.

Each function names the release in which its door was read. The start-up
self-check (`check_doors`) proves that they are there in the release at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import billiard
import billiard.common
from billiard import pool as billiard_pools
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import _state, signals, states
from celery.app import log as app_log
from celery.app import trace
from celery.app.task import Context, Task
from celery.backends.base import DisabledBackend
from celery.canvas import Signature
from celery.concurrency import asynpool
from celery.concurrency import base as pools
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.fixups.django import DjangoFixup, DjangoWorkerFixup
from celery.platforms import EX_FAILURE, EX_OK
from celery.result import denied_join_result
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
from celery_resilience.errors import ConfigurationError, HeldFromAutoretry
from celery_resilience.message import OriginalMessage
from celery_resilience.serialization import serialized

# --- what a run ended with -----------------------------------------------------


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


# --- apps --------------------------------------------------------------------------


def is_made_for_asking(app: Any) -> bool:
    """Whether Celery has made *app* for who asked before there was any."""
    return bool(app.main == "default" and not app.set_as_current)


def only_app() -> Any | None:
    """
    The app of this process, where there is just one.

    The current app is one of each thread (``_state.py:64``, Celery 5.7).
    """
    try:
        found = [
            app for app in [*_state._get_active_apps()] if not is_made_for_asking(app)
        ]
    except (AttributeError, RuntimeError):
        # Not there any more; or another thread has made one.
        return None
    return found[0] if len(found) == 1 else None


# --- a worker's end --------------------------------------------------------------


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


# --- its log ---------------------------------------------------------------------------


def running() -> tuple[Any, Any] | None:
    """
    The task that runs in this thread, and its request; None where none does.

    The innermost one that was sent or applied: what is called as a function is a part of
    its caller (``_state.py:136``, ``app/task.py:545``, Celery 5.7).
    """
    task: Any = _state.get_current_task()
    if task is None:
        return None
    request: Any = task.request_stack.top
    if request is not None and request.id is not None:
        return task, request
    for task in reversed(_state._task_stack.stack):
        for request in reversed(task.request_stack.stack):
            if request.id is not None:
                return task, request
    return None


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


# --- around a task body ------------------------------------------------------------


def has_a_call(task: type[Any], *, after: type[Any]) -> bool:
    """Whether a base class of *task* behind *after* has a `__call__` of the app's own."""
    mro = task.__mro__
    bases = mro[mro.index(after) + 1 :]
    return next(base for base in bases if "__call__" in vars(base)) is not Task


def is_a_delivery(request: Any) -> bool:
    """
    Whether a worker's tracer is about to run the body of *request*.

    Not where a task is called directly, or by `apply()`, or by itself.
    """
    return not (request.called_directly or request._protected or request.is_eager)


def is_in_body(request: Any) -> bool:
    """Whether a worker runs the body of *request*, and no call of the task in it."""
    return (
        request is not None
        and bool(request._protected)
        and not (request.called_directly or request.is_eager)
    )


def signature_of(signature: Any, task_id: Any) -> Any:
    """
    The signature whose message will have *task_id*, or None.

    A chain's member, or a chord's body, once it is frozen (Celery 5.7, ``canvas.py``).
    """
    parts = [*(getattr(signature, "tasks", None) or ())]
    body = getattr(signature, "body", None)
    if not parts and body is None:
        return signature if signature.options.get("task_id") == task_id else None
    for part in (*parts, *(() if body is None else (body,))):
        found = signature_of(part, task_id)
        if found is not None:
            return found
    return None


def enter_body(request: Any) -> None:
    """
    Let a call of the same task within its body be a direct one.

    What Celery's own `__call__` does in a worker before it calls `run`
    (``app/trace.py:877``, Celery 5.7).
    """
    request._protected = 1


def let_decide_before_autoretry(
    task: Any, is_decided: Callable[[BaseException], bool]
) -> None:
    """
    Carry past `autoretry_for` what *is_decided* says so of, once for each task.

    What `autoretry_for` wraps is an attribute of the task, which it looks up at each
    call (``app/autoretry.py:33``, Celery 5.7).
    """
    body = vars(task).get("_orig_run")
    if body is None or hasattr(body, "decides_first"):
        return

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return body(*args, **kwargs)
        except Exception as exc:
            if is_in_body(task.request_stack.top) and is_decided(exc):
                raise HeldFromAutoretry(exc) from None
            raise

    run.decides_first = True
    task._orig_run = run


def sent_arguments(
    task: Any, args: Any, kwargs: Any, serializer: str | None
) -> tuple[Any, Any]:
    """
    The arguments of a call as `apply_async` hands them to the serializer.

    Without pydantic's models, which Celery 5.7 dumps there (``app/task.py:730``);
    earlier releases do not take them.
    """
    dump = getattr(task, "_dump_pydantic_arguments", None)
    if dump is None or serializer == "pickle":
        return args, kwargs
    dumped: tuple[Any, Any] = dump(args, kwargs)
    return dumped


class _Recorder:
    """In the place of a producer: notes the first message that is published by it."""

    def __init__(self) -> None:
        self.published: tuple[Any, dict[str, Any]] | None = None
        self.connection = SimpleNamespace(_reraise_as_library_errors=nullcontext)

    def publish(self, body: Any, **options: Any) -> None:
        """Note it; what follows is the event that it was sent."""
        if self.published is None:
            self.published = (body, options)


def message_of(signature: Any, task_id: str) -> OriginalMessage:
    """
    The message that a signature would be sent as; it is not sent.

    What `amqp.send_task_message` hands to its producer (``app/amqp.py:610``,
    Celery 5.7).

    Raises:
        ConfigurationError: It is no signature of one task; or `apply_async` did not come
            to send one.
    """
    if not isinstance(signature, Signature) or signature.task.startswith("celery."):
        raise ConfigurationError(
            "what keeps a failed item must be the signature of one task, such as "
            f"enrich.s(7), got {signature!r}"
        )
    recorder = _Recorder()
    producer: Any = recorder
    if not signature.app.conf.task_always_eager:
        # No backend prepares for a result that nobody waits for.
        with denied_join_result():
            signature.apply_async(task_id=task_id, producer=producer)
    if recorder.published is None:
        raise ConfigurationError(
            f"the task {signature.task} was not sent as a message: is it eager, or its "
            "apply_async another?"
        )
    body, options = recorder.published
    content_type, encoding, data = serialized(body, options.pop("serializer"))
    declared = options.pop("declare", None) or ()
    queue = next((q.name for q in declared), options["routing_key"])
    headers = options.pop("headers")
    exchange = options.pop("exchange") or ""
    routing_key = options.pop("routing_key")
    return OriginalMessage(
        body=data,
        headers=headers,
        properties={
            name: value
            for name, value in options.items()
            if value is not None and name in _MESSAGE_PROPERTIES
        },
        content_type=content_type,
        content_encoding=encoding,
        exchange=getattr(exchange, "name", exchange),
        routing_key=routing_key or "",
        queue=queue,
    )


#: Of the options of a publish, those that arrive with the message.
_MESSAGE_PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")


def stores_result(task: Any, request: Any) -> bool:
    """Whether the result backend stores what this run returns."""
    ignores = request.ignore_result
    if ignores is None:
        ignores = task.ignore_result
    return not ignores and not isinstance(task.backend, DisabledBackend)


def let_canvas_go(request: Any) -> None:
    """
    Send nothing of what follows *request* in its canvas: that has been done.

    The tracer reads these after the body (``app/trace.py``, Celery 5.7).
    """
    request.callbacks = request.chain = request.chord = None


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


# --- settling a request ----------------------------------------------------------


def is_acknowledged_on(task: Task[Any, Any], *, time_limit: bool) -> bool:
    """
    Whether a late-acked task is acknowledged when it failed.

    Celery 5.7 has one option each for failures and time limits; before it,
    one for both, and an option of the later name means nothing.
    """
    name = "acks_on_timeout" if time_limit else "acks_on_failure"
    flag = getattr(task, name) if hasattr(Task, name) else None
    if flag is None:
        flag = task.acks_on_failure_or_timeout
    return True if flag is None else bool(flag)


def time_limit_of(task: Task[Any, Any], *, soft: bool = False) -> float | None:
    """
    Seconds until a run of *task* is ended in a prefork pool; None: never.

    A task takes the app's limit as its own since Celery 5.7. Before it, the pool
    has the app's limit, for tasks without their own.
    """
    name = "soft_time_limit" if soft else "time_limit"
    own: float | None = getattr(task, name)
    app: float | None = task.app.conf[f"task_{name}"]
    return app if own is None else own


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


# --- what the consumer holds ---------------------------------------------------------


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


# --- the self-check ------------------------------------------------------------------


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
