"""A worker's life as Celery tells it: started, connected, lost, stopping, settled."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, ClassVar

from celery import bootsteps

from celery_resilience import _celery, threads
from celery_resilience.draining import SharedFlags
from celery_resilience.events import emit, observe
from celery_resilience.lifecycle.drain import Asked, Drain, Timekeeper
from celery_resilience.lifecycle.policy import ExitCode, StopConditions
from celery_resilience.lifecycle.signals import Interrupter, kill
from celery_resilience.outcome import Reason, Settlement

logger = logging.getLogger("celery_resilience.worker")

#: Seconds between two looks at the stop conditions that nobody tells of.
TICK_S = 1.0


class Lifecycle:
    """
    The life of one worker.

    Args:
        worker: Celery's WorkController, before its bootsteps are made.
        flags: Shared with its children.
        drain_timeout_s: See `Drain`.
        conditions: When it drains by itself.
    """

    def __init__(
        self,
        worker: Any,
        flags: SharedFlags,
        *,
        drain_timeout_s: float | None,
        conditions: StopConditions,
    ) -> None:
        self.worker = worker
        self.flags = flags
        self.conditions = conditions
        self.drain = Drain(
            timeout_s=drain_timeout_s, on_begin=self._begun, clock=time.monotonic
        )
        self._interrupter = Interrupter(self._cut_off)
        self._is_program = False
        self._stops: list[Any] = []

    def attach(self) -> None:
        """Hear of what is cut off, in place of an earlier worker of this process."""
        global _detach
        _detach()
        self._stops = [
            observe("delivery.requeued", self._requeued),
            observe("delivery.failed", self._failed),
            observe("delivery.given_up", self._given_up),
            observe("delivery.closed", self.settled),
            observe("memory.worker_over_limit", self._over_limit),
        ]
        _detach = self._detach

    def _detach(self) -> None:
        for stop in self._stops:
            stop()

    # --- the beginning ---------------------------------------------------------------

    def started(self) -> None:
        """The pool has started, and the consumer starts next."""
        pool = self.worker.pool
        if _celery.is_forking(pool):
            _celery.mean_own_kills(pool, self.flags.mean)
        _celery.wait_less_for_idle_children(pool)
        self._is_program = Interrupter.is_possible()
        if self._is_program:
            self._interrupter.install()
        threads.start_deaf(Timekeeper(self.drain, self).run, "drain")

    def words(self) -> str:
        """For the start line."""
        timeout_s = self.drain.timeout_s
        found = [
            "drains until idle"
            if timeout_s is None
            else f"drains for at most {timeout_s:g} s",
            self.conditions.words(),
        ]
        return "; ".join(filter(None, found))

    # --- the drain ---------------------------------------------------------------------

    def begin(self, why: str, code: int = 0, *, was_asked: bool = True) -> None:
        """The worker ends, for that reason."""
        self.drain.begin(Asked(why, code, was_asked))

    def stop(self, why: str, code: int = 0) -> None:
        """End the worker; of any thread."""
        self.begin(why, code)
        _celery.ask_to_stop()

    def _begun(self) -> None:
        self.flags.drain()
        emit("lifecycle.draining", why=self.drain.asked.why if self.drain.asked else "")

    def settled(self) -> None:
        """Every delivery is settled: say with which exit code the worker ends."""
        if self.drain.code is None:
            self.begin("an error", was_asked=False)
            self.worker.exitcode = self.drain.settled(self.worker.exitcode)
            emit("lifecycle.stopped", code=self.worker.exitcode)

    def ended(self) -> None:
        """The worker is stopped; its process may go on."""
        self.settled()
        self.drain.has_ended.set()

    # --- what is cut off ------------------------------------------------------------------

    def _requeued(self, settlement: Settlement) -> None:
        if settlement.reason == Reason.INTERRUPTED and settlement.run_s is not None:
            self.drain.cut_off(is_put_back=True)

    def _failed(self, settlement: Settlement) -> None:
        if settlement.reason == Reason.INTERRUPTED and self.drain.has_begun.is_set():
            self.drain.cut_off(is_put_back=False)

    def _given_up(self, **_: Any) -> None:
        self.drain.cut_off(is_put_back=False)

    def _over_limit(self, **_: Any) -> None:
        self.stop("memory limit", ExitCode.RECYCLED)

    # --- what the timekeeper does ------------------------------------------------------------

    def running(self) -> int:
        """How many tasks run."""
        return _celery.running_tasks()

    def interrupt(self) -> bool:
        """Cut off what runs; True where it goes on until the process ends."""
        if _celery.interrupts_bodies(self.worker.pool):
            if self._is_program:
                self._interrupter.send()
            else:
                self._cut_off()
            return False
        for request in _celery.running_requests():
            self._count_plain(request)
            _celery.cut_off_from_outside(request)
        self.worker.consumer.shutdown()
        return True

    def _cut_off(self) -> None:
        for request in _celery.running_requests():
            self._count_plain(request)
        _celery.cut_off_running(self.worker.consumer)

    def _count_plain(self, request: Any) -> None:
        """A task that is not resilient settles nothing."""
        if not hasattr(request, "settled_as"):
            self.drain.cut_off(is_put_back=bool(request.task.acks_late))

    def kill_children(self) -> int:
        """Kill the children that have not ended."""
        return kill(_celery.children_of(self.worker.pool))

    def exit_now(self, code: int) -> None:
        """End this process, unless it is somebody else's."""
        if self._is_program:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)


def _no_worker() -> None:
    """There was none in this process."""


_detach = _no_worker


class LifecycleStep(bootsteps.StartStopStep):
    """Starts what keeps the time, once there is a pool."""

    label = "Resilience: lifecycle"
    name = "celery_resilience.lifecycle.bootstep.LifecycleStep"
    requires = ("celery.worker.components:Pool",)

    lifecycle: ClassVar[Lifecycle]

    def start(self, worker: Any) -> None:
        """Before the consumer, which may wait for its broker."""
        self.lifecycle.started()

    def close(self, worker: Any) -> None:
        """The worker ends, and perhaps no signal has said so."""
        failed = worker.exitcode not in (None, 0)
        why = "an error" if failed else "shutdown"
        self.lifecycle.begin(why, was_asked=not failed)

    def stop(self, worker: Any) -> None:
        """Nothing yet: the tasks run."""


def lifecycle_step(lifecycle: Lifecycle) -> type[Any]:
    """A step for one app's worker."""
    return type("LifecycleStep", (LifecycleStep,), {"lifecycle": lifecycle})
