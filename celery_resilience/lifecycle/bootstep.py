"""A worker's life as Celery tells it: started, connected, lost, stopping, settled."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from celery import bootsteps

from celery_resilience import _celery_worker, _pools, threads
from celery_resilience._kombu import messages_in
from celery_resilience.draining import SharedFlags, unshare
from celery_resilience.events import emit, observe
from celery_resilience.forks import thread_gate
from celery_resilience.lifecycle.drain import Asked, Drain, Timekeeper
from celery_resilience.lifecycle.health import Since
from celery_resilience.lifecycle.policy import (
    ExitCode,
    StopConditions,
    is_idle_long_enough,
)
from celery_resilience.lifecycle.server import HealthServer, Pages
from celery_resilience.lifecycle.signals import Interrupter, kill
from celery_resilience.lifecycle.watch import HealthWatch
from celery_resilience.outcome import Reason, Settlement

logger = logging.getLogger("celery_resilience.worker")

#: Seconds between two looks at the stop conditions that nobody tells of.
TICK_S = 1.0

#: Seconds between two looks at the other conditions.
LOOK_S = 0.25


class Lifecycle:
    """
    The life of one worker.

    Args:
        worker: Celery's WorkController, before its bootsteps are made.
        flags: Shared with its children.
        drain_timeout_s: See `Drain`.
        conditions: When it drains by itself.
        health_address: Where `/live` and `/ready` are answered; None: nowhere.
        pages_address, pages: Where others' pages are shown, which may be the same
            address, and what they are by their paths.
        waiting_at_gate: How many requests wait to run alone.
        hand_back: Returns what no pool was given, once nothing is consumed any more.
        ask_store: Raises what the store says where it does not answer; None: there is
            no store.

    Attributes:
        waits_elsewhere: Whether messages that are this worker's lie in no queue.

    Raises:
        ConfigurationError: The address is taken.
    """

    def __init__(
        self,
        worker: Any,
        flags: SharedFlags,
        *,
        drain_timeout_s: float | None,
        conditions: StopConditions,
        health_address: tuple[str, int] | None = None,
        waiting_at_gate: Callable[[], set[Any]] = set,
        hand_back: Callable[[], None] = lambda: None,
        ask_store: Callable[[], None] | None = None,
        pages_address: tuple[str, int] | None = None,
        pages: Pages | None = None,
    ) -> None:
        self.hand_back = hand_back
        self.waits_elsewhere: Callable[[], bool] = lambda: False
        self.worker = worker
        self.flags = flags
        self.conditions = conditions
        self.drain = Drain(
            timeout_s=drain_timeout_s, on_begin=self._begun, clock=time.monotonic
        )
        self._interrupter = Interrupter(self._cut_off)
        self._is_program = False
        self._main_pid = os.getpid()
        self._stops: list[Any] = []
        self._watch = HealthWatch(self, waiting_at_gate, ask_store)
        self._servers: list[HealthServer] = []
        self._address = health_address
        self._pages_address = pages_address
        self._pages = pages or {}
        self._closed = 0
        self._consumed: dict[str, Any] = {}
        self._timer: Any = None
        self._entry: Any = None

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
            observe("circuits.queue_paused", self._queue_paused),
        ]
        _detach = self._detach

    def _detach(self) -> None:
        for stop in self._stops:
            stop()

    # --- the beginning ---------------------------------------------------------------

    def started(self) -> None:
        """The pool has started, and the consumer starts next."""
        self._look_into(self.worker.pool)
        self._is_program = Interrupter.is_possible()
        if self._is_program:
            self._interrupter.install()
        threads.start_deaf(Timekeeper(self.drain, self).run, "drain")
        if self.conditions.words():
            threads.start_deaf(self._look_at_conditions, "stop-conditions")
        for server in self._servers:
            server.serve()
        if self._address is not None:
            threads.start_deaf(self._watch.run, "health-watch")

    def _look_into(self, pool: Any) -> None:
        """A release without one of these doors is told at the start; it still works."""
        try:
            if _pools.is_forking(pool):
                _pools.mean_own_kills(pool, self.flags.mean)
        except Exception:
            logger.exception("children are ended by SIGKILL, some seconds later")

    def listen(self) -> None:
        """
        Take the ports, before the pool forks.

        Raises:
            ConfigurationError: One is taken.
        """
        watch, shown = self._watch, self._pages
        if self._address is not None:
            answers = {"/live": watch.live, "/ready": watch.ready}
            pages = shown if self._pages_address == self._address else {}
            server = HealthServer(self._address, answers, watch.facts, pages)
            self._servers.append(server)
        if self._pages_address not in (None, self._address):
            assert self._pages_address is not None
            others = {} if self._address is None else {"health_port": self._address}
            server = HealthServer(
                self._pages_address, {}, dict, shown, "metrics_port", others
            )
            self._servers.append(server)

    def forked(self) -> None:
        """Child: let go what is the main process's alone; solo has no child."""
        if os.getpid() == self._main_pid:
            return
        for server in self._servers:
            server.close_in_child()

    def _queue_paused(self, queue: str) -> None:
        """It is not empty because nobody consumes it, perhaps from the start."""
        self._consumed[queue] = self.worker.app.amqp.queues[queue]

    # --- the connection ------------------------------------------------------------------

    def connected(self, consumer: Any) -> None:
        """The consumer has its broker, for the first time or again."""
        self.disconnected()
        self._watch.connected(consumer)
        self._consumed.update(consumer.app.amqp.queues.consume_from)
        self._timer = _pools.unblocked_timer(consumer)
        self._entry = self._timer.call_repeatedly(TICK_S, self._tick, (consumer,))

    def disconnected(self) -> None:
        """The broker is lost, or the worker stops."""
        self._watch.is_connected = False
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None

    def _tick(self, consumer: Any) -> None:
        self._watch.tick(consumer)
        self._look_at_count()

    # --- the stop conditions --------------------------------------------------------------

    def delivery_closed(self) -> None:
        """A delivery of a resilient task is settled."""
        self._closed += 1
        self._look_at_count()

    def _look_at_count(self) -> None:
        limit = self.conditions.after_tasks
        # Those that are not resilient settle nothing, and are counted by Celery.
        if (
            limit is not None
            and max(self._closed, _celery_worker.ended_tasks()) >= limit
        ):
            self.stop(f"{limit} tasks")

    def _look_at_conditions(self) -> None:
        """A thread's: ends the worker when it is time, or has nothing to do."""
        started_at = time.monotonic()
        after_s, idle = self.conditions.after_s, Since()
        accepted = 0
        while not self.drain.has_begun.wait(LOOK_S):
            now = time.monotonic()
            if after_s is not None and now - started_at >= after_s:
                self.stop(f"{after_s:g} s")
            if not self.conditions.when_empty:
                continue
            before, accepted = accepted, _celery_worker.accepted_tasks()
            is_idle = (
                self._watch.is_connected
                and not _celery_worker.held_tasks()
                and not self.waits_elsewhere()
                and before == accepted
            )
            idle_s = idle.look(is_idle, now)
            if (
                idle_s is not None
                and is_idle_long_enough(idle_for_s=idle_s, was_ever_busy=bool(accepted))
                and self._are_queues_empty()
                and not _celery_worker.held_tasks()
                and accepted == _celery_worker.accepted_tasks()
            ):
                self.stop("its queues are empty")

    def _are_queues_empty(self) -> bool:
        app = self.worker.app
        # With those that are paused just now.
        self._consumed.update(app.amqp.queues.consume_from)
        try:
            with thread_gate.inside(), app.connection_for_read() as connection:
                return not messages_in(connection, self._consumed)
        except Exception as exc:
            # Away, perhaps: then nobody knows.
            logger.info("cannot see whether the queues are empty: %s", exc)
            return False

    def words(self) -> str:
        """For the start line."""
        timeout_s = self.drain.timeout_s
        found = [
            "drains until idle"
            if timeout_s is None
            else f"drains for at most {timeout_s:g} s",
            self.conditions.words(),
            _where("health", self._address),
            _where("metrics", self._pages_address),
        ]
        return "; ".join(filter(None, found))

    # --- the drain ---------------------------------------------------------------------

    def begin(self, why: str, code: int = 0, *, was_asked: bool = True) -> None:
        """The worker ends, for that reason."""
        self.drain.begin(Asked(why, code, was_asked))

    def stop(self, why: str, code: int = 0) -> None:
        """End the worker; of any thread."""
        self.begin(why, code)
        _celery_worker.ask_to_stop()

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
        for server in self._servers:
            server.close()
        unshare(self.flags)
        self.drain.has_ended.set()

    # --- what is cut off ------------------------------------------------------------------

    def _requeued(self, settlement: Settlement) -> None:
        # Not what a lost connection has cut off, nor what had yet to start.
        if (
            settlement.reason == Reason.INTERRUPTED
            and settlement.run_s is not None
            and self._is_ending()
        ):
            self.drain.cut_off(is_put_back=True)

    def _failed(self, settlement: Settlement) -> None:
        failure = settlement.failure
        # Nor what an earlier interruption of the same key fails.
        if (
            settlement.reason == Reason.INTERRUPTED
            and failure is not None
            and failure.exception.endswith("WorkerLostError")
            and self._is_ending()
        ):
            self.drain.cut_off(is_put_back=False)

    def _is_ending(self) -> bool:
        """Celery cuts off at a cold stop before it says that there is one."""
        return self.drain.has_begun.is_set() or _celery_worker.is_in_a_signals_handler()

    def _given_up(self, **_: Any) -> None:
        self.drain.cut_off(is_put_back=False)

    def _over_limit(self, **_: Any) -> None:
        self.stop("memory limit", ExitCode.RECYCLED)

    # --- what the timekeeper does ------------------------------------------------------------

    def running(self) -> int:
        """How many tasks run."""
        return _celery_worker.running_tasks()

    def interrupt(self) -> bool:
        """Cut off what runs; True where it goes on until the process ends."""
        if _pools.interrupts_bodies(self.worker.pool):
            if self._is_program:
                self._interrupter.send()
            else:
                self._cut_off()
            return False
        for request in _celery_worker.running_requests():
            self._count_plain(request)
            _celery_worker.cut_off_from_outside(request)
        self.worker.consumer.shutdown()
        return True

    def _cut_off(self) -> None:
        for request in _celery_worker.running_requests():
            self._count_plain(request)
        _celery_worker.cut_off_running(self.worker.consumer)

    def _count_plain(self, request: Any) -> None:
        """A task that is not resilient settles nothing."""
        if not hasattr(request, "settled_as"):
            self.drain.cut_off(is_put_back=bool(request.task.acks_late))

    def kill_children(self) -> int:
        """Kill the children that have not ended."""
        return kill(_pools.children_of(self.worker.pool))

    def exit_now(self, code: int) -> None:
        """End this process, unless it is somebody else's."""
        if self._is_program:
            # What ends in the usual way flushes at its exit.
            emit("lifecycle.exiting", code=code)
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)


def _where(what: str, address: tuple[str, int] | None) -> str:
    return "" if address is None else f"{what} on {address[0] or '*'}:{address[1]}"


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
        """The consumer is stopped, and the pool is waited for next."""
        self.lifecycle.hand_back()

    def terminate(self, worker: Any) -> None:
        """A cold stop: the end of the connection is near."""


class ConnectionStep(bootsteps.StartStopStep):
    """Hears when the broker is there, and when it is lost."""

    label = "Resilience: connection"
    name = "celery_resilience.lifecycle.bootstep.ConnectionStep"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    lifecycle: ClassVar[Lifecycle]

    def start(self, consumer: Any) -> None:
        """The consumer consumes."""
        self.lifecycle.connected(consumer)

    def stop(self, consumer: Any) -> None:
        """The connection is lost, or the worker stops."""
        self.lifecycle.disconnected()


def connection_step(lifecycle: Lifecycle) -> type[Any]:
    """A step for one app's consumer."""
    return type("ConnectionStep", (ConnectionStep,), {"lifecycle": lifecycle})


def lifecycle_step(lifecycle: Lifecycle) -> type[Any]:
    """A step for one app's worker."""
    return type("LifecycleStep", (LifecycleStep,), {"lifecycle": lifecycle})
