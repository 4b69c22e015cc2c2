"""The only user of undocumented names of Celery's pools, and of billiard's.

As in `_celery`, each function names the release in which its door was read.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import billiard
import billiard.common
from billiard import pool as billiard_pools
from billiard.common import TERM_SIGNAL, human_status
from billiard.pool import DEATH, EX_RECYCLE
from billiard.pool import Pool as BilliardPool
from billiard.pool import Worker as BilliardWorker
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import WorkerLostError
from celery.utils import timer2

# --- a child's end ------------------------------------------------------------


def is_being_terminated() -> bool:
    """
    Child: billiard's handler of a terminate signal has run in this process.

    A SystemExit seen from then on is its own, not the task's
    (billiard 4.2 to 4.3, ``common.py:60``).
    """
    return bool(billiard.common._should_have_exited[0])


def interrupts_bodies(pool: Any) -> bool:
    """Whether the tasks of a pool can be cut off from outside: prefork and solo."""
    return isinstance(pool, PreforkPool | SoloPool)


def runs_in_main_thread(pool: Any) -> bool:
    """Whether the pool has no process or thread of its own: solo."""
    return isinstance(pool, SoloPool)


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
    worker = getattr(billiard.current_process(), "_target", None)
    if not isinstance(worker, billiard_pools.Worker):
        return
    started = worker.on_loop_start

    def call_and_start(pid: int) -> None:
        call()
        started(pid=pid)

    worker.on_loop_start = call_and_start


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


def slots_of(pool: Any) -> int:
    """
    How many runs a worker's pool has at once, at most.

    gevent's `num_processes` is how many it has just now (``concurrency/gevent.py:145``,
    Celery 5.5).
    """
    return int(pool.num_processes if is_prefork(pool) else pool.limit)


def end_child(pool: Any, pid: int) -> None:
    """
    Kill a child; the pool takes its job for terminated (``pool.py:1642``, billiard 4.3).
    """
    pool.terminate_job(pid, signal.SIGKILL)


def hear_exits(pool: Any, tell: Callable[[int, int, bool, bool], None]) -> None:
    """
    Tell of each child that has ended: pid, exit code, is it recycled, is it meant.

    The pool takes it from its list once it has waited for it (``pool.py:1275``,
    billiard 4.3); what it calls then, an event loop replaces.
    """
    billiard_pool = getattr(pool, "_pool", None)
    if not isinstance(billiard_pool, BilliardPool):
        return
    join_exited = billiard_pool._join_exited_workers

    def join_and_tell(*args: Any, **kwargs: Any) -> Any:
        before = list(billiard_pool._pool)
        try:
            return join_exited(*args, **kwargs)
        finally:
            after = set(map(id, billiard_pool._pool))
            for process in before:
                if id(process) not in after and process.exitcode is not None:
                    code = process.exitcode
                    is_meant = getattr(process, "_controlled_termination", False)
                    tell(process.pid, code, code == EX_RECYCLE, is_meant)

    billiard_pool._join_exited_workers = join_and_tell


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


def has_parameters(function: Callable[..., Any], *names: str) -> bool:
    """Whether a function has parameters of these names."""
    return set(names) <= set(inspect.signature(function).parameters)


def child_is_as_read() -> bool:
    """The loop of a child asks its own attribute for the next job."""
    return "wait_for_job" in names_used_by(BilliardWorker.workloop) and (
        has_parameters(BilliardWorker.__init__, "on_ready_counter")
    )


def names_used_by(function: Any) -> set[str]:
    """
    What a function names, and one that it was put around.

    Sentry's around a child's loop has the loop in its closure alone.
    """
    function = inspect.unwrap(function)
    names = set(function.__code__.co_names)
    for inner in inspect.getclosurevars(function).nonlocals.values():
        if inspect.isfunction(inner):
            names.update(inner.__code__.co_names)
    return names


def exits_are_as_read() -> bool:
    """A child's end is looked for once, by an attribute of the pool's."""
    return (
        "maintain_pool" in AsynPool._event_process_exit.__code__.co_names
        and "_sentinel_poll" in AsynPool._untrack_child_process.__code__.co_names
    )
