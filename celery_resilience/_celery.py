"""The only user of undocumented Celery and billiard names; `_kombu` has kombu's.

Each function names the release in which its door was read. The start-up
self-check (`check_doors`) proves that they are there in the release at hand.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import billiard
import billiard.common
from billiard import pool as billiard_pools
from billiard.common import TERM_SIGNAL, human_status
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.pool import DEATH, EX_RECYCLE
from billiard.pool import Pool as BilliardPool
from billiard.pool import Worker as BilliardWorker
from celery import _state, signals, states
from celery.app.task import Context, Task
from celery.backends.base import DisabledBackend
from celery.concurrency import asynpool
from celery.concurrency import base as pools
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import WorkerLostError, WorkerShutdown, WorkerTerminate
from celery.fixups.django import DjangoFixup, DjangoWorkerFixup
from celery.platforms import EX_FAILURE, EX_OK
from celery.utils import log as celery_log
from celery.utils import timer2
from celery.utils.log import in_sighandler
from celery.utils.serialization import UnpickleableExceptionWrapper
from celery.worker import request as requests
from celery.worker import state
from celery.worker.consumer import consumer as consumers
from kombu.utils.encoding import safe_repr

from celery_resilience._kombu import kombu_is_as_read

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


def is_being_terminated() -> bool:
    """
    Child: billiard's handler of a terminate signal has run in this process.

    A SystemExit seen from then on is its own, not the task's
    (billiard 4.2 to 4.3, ``common.py:60``).
    """
    return bool(billiard.common._should_have_exited[0])


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


def interrupts_bodies(pool: Any) -> bool:
    """Whether the tasks of a pool can be cut off from outside: prefork and solo."""
    return isinstance(pool, PreforkPool | SoloPool)


def runs_in_main_thread(pool: Any) -> bool:
    """Whether the pool has no process or thread of its own: solo."""
    return isinstance(pool, SoloPool)


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


def children_of(pool: Any) -> list[int]:
    """The pids of a prefork pool's children; [] for another pool."""
    processes = getattr(getattr(pool, "_pool", None), "_pool", None)
    if not isinstance(pool, PreforkPool) or processes is None:
        return []
    return [process.pid for process in list(processes) if process.pid]


def is_forking(pool: Any) -> bool:
    """Whether the pool's children are copies of this process."""
    return isinstance(pool, PreforkPool) and billiard.get_start_method() == "fork"


def mean_own_kills(pool: Any, mean: Callable[[int], None]) -> None:
    """
    Tell by *mean* which child the main process is about to end by SIGTERM.

    A child cannot see who has sent a signal. billiard 4.3 sends that one to a child
    that is revoked or cut off (``pool.py:1642``), has said that it ends
    (``pool.py:912``), or is shrunk, over its limit, or in the way of a cold stop, which
    go by its `terminate` (``process.py:152``).
    """
    billiard_pool = pool._pool
    make, terminate_job = billiard_pool.WorkerProcess, billiard_pool.terminate_job
    handlers = billiard_pool._result_handler.state_handlers
    on_death = handlers[DEATH]

    def meant(process: Any) -> Any:
        process.terminate = partial(mean_and_terminate, weakref.ref(process))
        return process

    def mean_and_terminate(to_process: Callable[[], Any]) -> None:
        process = to_process()
        if process is not None:
            if process.pid:
                mean(process.pid)
            type(process).terminate(process)

    def mean_and_end(pid: int, sig: int | None = None) -> None:
        if pid and sig in (None, TERM_SIGNAL):
            mean(pid)
        terminate_job(pid, sig)

    def mean_and_help_to_end(pid: int, exitcode: int) -> None:
        mean(pid)
        on_death(pid, exitcode)

    for process in list(billiard_pool._pool):
        meant(process)
    billiard_pool.WorkerProcess = lambda worker: meant(make(worker))
    billiard_pool.terminate_job = pool.terminate_job = mean_and_end
    handlers[DEATH] = mean_and_help_to_end


def on_child_loop(call: Callable[[], None]) -> None:
    """
    Child: call once its signal handlers are set, before its first job.

    billiard 4.3 sets them after Celery's `worker_process_init` (``pool.py:489``), and
    then says that the child is up (``pool.py:279``).
    """
    worker = billiard.current_process()._target
    if not isinstance(worker, billiard_pools.Worker):
        return
    started = worker.on_loop_start

    def call_and_start(pid: int) -> None:
        call()
        started(pid=pid)

    worker.on_loop_start = call_and_start


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


def died_before(pid: int | None) -> WorkerLostError | None:
    """
    The death of a child of which the pool does not know yet, or None.

    The event loop's pool looks once, when the child's descriptors are closed. A
    child that cannot be waited for at that moment is seen five seconds later
    (``concurrency/asynpool.py:576``, Celery 5.7), behind its time limit.
    """
    if pid is None or not hasattr(os, "waitid"):
        return None
    try:
        # Left to be waited for by the pool.
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (ChildProcessError, OverflowError):
        return None  # no child: a thread's own process, or a greenlet's number
    if status is None:
        return None
    code = status.si_status
    how = human_status(code if status.si_code == os.CLD_EXITED else -code)
    return WorkerLostError(f"Worker exited prematurely: {how}.")


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


def hear_what_is_accepted(
    pool: Any, *, within_s: float, clock: Callable[[], float]
) -> None:
    """
    Let the event loop's pool hear which written jobs its children have accepted.

    A flush forgets those that it has not heard of (``concurrency/asynpool.py:1085``,
    Celery 5.7): the child runs them all the same, a second time beside what the broker
    delivers again, and a pool that is joined waits 30 s for a child whose results
    nobody reads (``billiard/pool.py:452``).
    """
    pool = pool._pool if is_event_loop_prefork(pool) else None
    if pool is None:
        return
    handler, until = pool._result_handler, clock() + within_s
    processes = pool._fileno_to_outq
    while clock() < until and any(
        job._write_to is not None and not (job._accepted or job.ready())
        for job in list(pool._cache.values())
    ):
        for fd, process in list(processes.items()):
            with contextlib.suppress(OSError):  # a child that has ended
                if process.outq._reader.poll(0.01):
                    handler._flush_outqueue(
                        fd, lambda fd: None, processes, handler.on_state_change
                    )


def is_untouched(request: Any, pool: Any) -> bool:
    """
    Whether no child or thread can run a request, once the pool is flushed.

    What was written to a child is perhaps run by it, though it has not accepted it.
    The event loop's pool also holds what it has not begun to write, and forgets that
    when it is flushed (``concurrency/asynpool.py:1094``, Celery 5.7).
    """
    if request.time_start is not None:
        return False
    if request._apply_result is None:
        return True
    job = request._apply_result() if is_event_loop_prefork(pool) else None
    return job is not None and job._write_to is None and job._scheduled_for is None


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


def is_greenlet_pool(pool: Any) -> bool:
    """Whether a pool's class, or its name, is one that gives each task a greenlet."""
    name = pool if isinstance(pool, str) else pool.__module__
    return any(kind in name for kind in ("gevent", "eventlet"))


def is_event_loop_prefork(pool: Any) -> bool:
    """The pool whose main process never blocks, on Redis and AMQP by default."""
    return isinstance(getattr(pool, "_pool", None), AsynPool)


def hear_before_giving_back(pool: Any) -> None:
    """
    Let the event loop's pool hear a dead child out before it gives its job to another.

    billiard reads what the children that it has found dead had still to say, and then
    looks at each job whose child is dead by now (``pool.py:1340``, billiard 4.3). One
    that died in between is not read: that it had started its job is not known, and the
    job runs again, in the same delivery and uncounted as a crash
    (``concurrency/asynpool.py:1402``, Celery 5.7). A job that has started after all is
    left as it is; the pool's next look finds the child dead and its job lost.
    """
    pool = pool._pool if is_event_loop_prefork(pool) else None
    if pool is None or "on_job_process_down" in vars(pool):
        return
    give_back = pool.on_job_process_down

    def hear_and_give_back(job: Any, pid_gone: int) -> None:
        child = job._write_to
        if not (job._accepted or child is None or child.dead or child._is_alive()):
            pool.process_flush_queues(child)
            if job._accepted:
                return
        give_back(job, pid_gone)

    pool.on_job_process_down = hear_and_give_back


#: Seconds after which the pool looks again for a child that is about to have ended,
#: and how often.
LOOK_AGAIN_S = 0.02
LOOK_AGAIN_TIMES = 250


def look_again_for_ended_children(pool: Any, hub: Any) -> None:
    """
    Let the event loop's pool replace an ended child at once, not in five seconds.

    It looks for ended children when one's descriptors are closed, which the kernel does
    before the child can be waited for, and then only with its timer of five seconds
    (``concurrency/asynpool.py:576``, Celery 5.7; celery#9588). Nothing is looked for
    any more by its descriptor then: so is the child known that was missed.
    """
    pool = pool._pool if is_event_loop_prefork(pool) else None
    if pool is None or hub is None or "maintain_pool" in vars(pool):
        return
    maintain = pool.maintain_pool
    tries: dict[int, int] = {}

    def maintain_and_look_again() -> None:
        maintain()
        missed = [
            child.pid
            for child in pool._pool
            if getattr(child, "_sentinel_poll", 0) is None
        ]
        for pid in [pid for pid in tries if pid not in missed]:
            del tries[pid]
        for pid in missed:
            tries[pid] = tries.get(pid, 0) + 1
        if any(tries[pid] <= LOOK_AGAIN_TIMES for pid in missed):
            hub.call_later(LOOK_AGAIN_S, maintain_and_look_again)

    pool.maintain_pool = maintain_and_look_again


# --- a prefork child's memory ----------------------------------------------------------

#: Seconds that a child which ends waits for the main process to have read its results.
RESULTS_READ_WITHIN_S = 1.0


class PoolChild:
    """
    This process, as a child of a prefork pool.

    Attributes:
        place: Its place in the pool, which its successor takes.
    """

    def __init__(self, worker: Any, place: int) -> None:
        self._worker = worker
        self.place = place

    def end_before_next_job(self, should_end: Callable[[int], bool]) -> None:
        """
        End this child, as one that has had its number of tasks, when *should_end* says so.

        Asked, with the number of jobs that it has done, before each look for another
        one. The last result has been written then, and a job that lies in the pipe is
        given to another child (``pool.py:337``, billiard 4.3;
        ``concurrency/asynpool.py:825``, Celery 5.7).
        """
        worker = self._worker
        wait_for_job = worker.wait_for_job
        jobs = 0

        def end_or_wait_for_job(*args: Any, **kwargs: Any) -> Any:
            nonlocal jobs
            if should_end(jobs):
                _until_results_are_read(worker.on_ready_counter, jobs)
                # billiard's, which notes the code.
                sys.exit(EX_RECYCLE)
            job = wait_for_job(*args, **kwargs)
            if job:
                jobs += 1
            return job

        worker.wait_for_job = end_or_wait_for_job


def _until_results_are_read(counter: Any, jobs: int) -> None:
    """What billiard waits for in steps of a tenth of a second (``pool.py:451``)."""
    until = time.monotonic() + RESULTS_READ_WITHIN_S
    while counter is not None and counter.value < jobs and time.monotonic() < until:
        time.sleep(0.001)


def pool_child() -> PoolChild | None:
    """This process as a prefork child; None where it is none (billiard 4.2 to 4.3)."""
    process = billiard.current_process()
    worker = getattr(process, "_target", None)
    if not isinstance(worker, BilliardWorker) or not hasattr(worker, "wait_for_job"):
        return None
    return PoolChild(worker, getattr(process, "index", 0))


def is_prefork(pool: Any) -> bool:
    """Whether a worker's pool has children."""
    return isinstance(getattr(pool, "_pool", None), BilliardPool)


def end_child(pool: Any, pid: int) -> None:
    """
    Kill a child; the pool takes its job for terminated (``pool.py:1642``, billiard 4.3).
    """
    pool.terminate_job(pid, signal.SIGKILL)


def unblocked_timer(consumer: Any) -> Any:
    """
    A timer that fires while tasks run and while the pool is joined.

    The asynchronous prefork pool keeps the event loop's timers going for both
    (``concurrency/prefork.py:150``, Celery 5.7); with any other pool the main
    thread may be busy with a task or a join, so that the timer has a thread.
    """
    if is_event_loop_prefork(consumer.pool):
        return consumer.timer
    timer = getattr(consumer, "_resilience_timer", None)
    if timer is None:
        timer = consumer._resilience_timer = timer2.Timer(max_interval=1.0)
    return timer


# --- the self-check ------------------------------------------------------------------


def _has_parameters(function: Callable[..., Any], *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


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


def _child_is_as_read() -> bool:
    """The loop of a child asks its own attribute for the next job."""
    return "wait_for_job" in BilliardWorker.workloop.__code__.co_names and (
        _has_parameters(BilliardWorker.__init__, "on_ready_counter")
    )


def _exits_are_as_read() -> bool:
    """A child's end is looked for once, by an attribute of the pool's."""
    return (
        "maintain_pool" in AsynPool._event_process_exit.__code__.co_names
        and "_sentinel_poll" in AsynPool._untrack_child_process.__code__.co_names
    )


class _ProbeApp:
    use_fast_trace_task = False


#: Doors without which a failed task would not be kept: the worker refuses to start.
CAPTURE_DOORS: Mapping[str, Callable[[], bool]] = {
    "Request.on_failure(exc_info, send_failed_event, return_ok)": lambda: (
        _has_parameters(
            requests.Request.on_failure, "exc_info", "send_failed_event", "return_ok"
        )
    ),
    "Request.on_timeout(soft, timeout)": lambda: _has_parameters(
        requests.Request.on_timeout, "soft", "timeout"
    ),
    "Request.acknowledge() and reject(requeue)": lambda: (
        callable(requests.Request.acknowledge)
        and _has_parameters(requests.Request.reject, "requeue")
    ),
    "create_request_cls() subclasses the task's Request": _request_class_is_subclassed,
    "Task.Request": lambda: isinstance(Task.Request, str),
    "Consumer.create_task_handler()": lambda: callable(
        consumers.Consumer.create_task_handler
    ),
    "Consumer.on_unknown_task(body, message, exc)": lambda: _has_parameters(
        consumers.Consumer.on_unknown_task, "body", "message", "exc"
    ),
    "Consumer.on_invalid_task(body, message, exc)": lambda: _has_parameters(
        consumers.Consumer.on_invalid_task, "body", "message", "exc"
    ),
    "Consumer.on_decode_error(message, exc)": lambda: _has_parameters(
        consumers.Consumer.on_decode_error, "message", "exc"
    ),
}

#: Doors without which one promise is weaker: the worker says so and starts.
OTHER_DOORS: Mapping[str, Callable[[], bool]] = {
    "billiard.common._should_have_exited": lambda: isinstance(
        billiard.common._should_have_exited, list
    ),
    "_state._get_active_apps()": lambda: callable(_state._get_active_apps),
    "Context._protected": lambda: Context._protected == 0,
    "apply_target(callback)": lambda: _has_parameters(pools.apply_target, "callback"),
    "Request._announce_revoked()": lambda: _has_parameters(
        requests.Request._announce_revoked, "reason", "expired"
    ),
    "Request._announce_cancelled()": lambda: callable(
        requests.Request._announce_cancelled
    ),
    "Consumer.on_connection_error_after_connected(exc)": lambda: _has_parameters(
        consumers.Consumer.on_connection_error_after_connected, "exc"
    ),
    "AsynPool.on_job_process_down(job, pid_gone)": lambda: (
        _has_parameters(AsynPool.on_job_process_down, "job", "pid_gone")
        and _has_parameters(AsynPool.process_flush_queues, "proc")
    ),
    "Pool.terminate_job(pid, sig) and WorkerProcess(worker)": lambda: (
        _has_parameters(billiard_pools.Pool.terminate_job, "pid", "sig")
        and _has_parameters(billiard_pools.Pool.WorkerProcess, "worker")
    ),
    "billiard's Worker.on_loop_start(pid)": lambda: _has_parameters(
        billiard_pools.Worker.on_loop_start, "pid"
    ),
    "ResultHandler._flush_outqueue(fd, remove, process_index, on_state_change)": (
        lambda: _has_parameters(
            asynpool.ResultHandler._flush_outqueue,
            *("fd", "remove", "process_index", "on_state_change"),
        )
    ),
    "Consumer.cancel_active_requests()": lambda: callable(
        consumers.Consumer.cancel_active_requests
    ),
    "billiard Worker.wait_for_job and on_ready_counter": _child_is_as_read,
    "AsynPool.maintain_pool() and Process._sentinel_poll": _exits_are_as_read,
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
