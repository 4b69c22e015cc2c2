"""The metrics of one worker: what looks, what asks, and when it begins and ends."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from threading import Event
from typing import Any, ClassVar, Protocol

from celery import bootsteps

from celery_resilience import _celery_worker, _kombu, _pools
from celery_resilience.draining import is_draining
from celery_resilience.events import observe
from celery_resilience.forks import thread_gate
from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.exits import WhyEnded, exit_reason
from celery_resilience.telemetry.metrics import Metrics
from celery_resilience.telemetry.probes import Answer, Probe, Probes
from celery_resilience.telemetry.prometheus import MetricsPage
from celery_resilience.telemetry.series import Labels
from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.telemetry")

#: Seconds between two looks at what was noted.
TICK_S = 1.0

#: Where the page is.
PATH = "/metrics"

#: What OpenTelemetry's SDK for metrics is imported as, where an app has it.
OTEL_SDK = "opentelemetry.sdk.metrics"


class Store(Protocol):
    """What is asked of the store of failed tasks."""

    def stats(self) -> Mapping[str, Any]:
        """Counts by state, and of the unresolved by queue and age."""
        ...


@dataclass(frozen=True, slots=True)
class Questions:
    """
    What other rooms answer about one worker, each with a round trip.

    Attributes:
        store: The store of failed tasks; None: there is none.
        failed_queues: Queues in which failed tasks wait.
        circuits: The state of each circuit by its name; None: there is none.
        own_kib_of: Own memory of a process; None: it has ended.
    """

    store: Callable[[], Store] | None
    failed_queues: tuple[str, ...]
    circuits: Callable[[], Mapping[str, str]] | None
    own_kib_of: Callable[[int], int | None]


class WorkerMetrics:
    """
    Metrics in one worker; they cost nothing where nobody reads them.

    Args:
        app: The Celery app.
        worker: Its WorkController, before its bootsteps are made.
        address: Where Prometheus reads; None: nowhere.
        tasks: Names of the resilient tasks.
        questions: See there.
    """

    def __init__(
        self,
        app: Any,
        worker: Any,
        *,
        address: tuple[str, int] | None,
        tasks: Iterable[str],
        questions: Questions,
    ) -> None:
        self._app = app
        self._worker = worker
        self._questions = questions
        self._why = WhyEnded()
        self._has_ended = Event()
        self._has_begun = False
        self._paused: set[str] = set()
        self.metrics = Metrics(tasks)
        self.is_read = address is not None or OTEL_SDK in sys.modules
        self.pages: dict[str, Callable[[str], tuple[str, bytes]]] = {}
        if address is not None:
            self.pages[PATH] = MetricsPage(self.metrics.read)

    def attach(self) -> None:
        """Count from now on, in place of an earlier worker of this process."""
        if not self.is_read:
            return
        metrics = self.metrics
        paused = observe("circuits.queue_paused", self._queue_paused)
        metrics.attach([*self._why.attach(), paused])
        started_at = time.time()
        for instrument, look in (
            (i.ACTIVE, self._active),
            (i.OLDEST_ACTIVE, _oldest_active),
            (i.BUSY, lambda: [((), float(_celery_worker.running_tasks()))]),
            (i.SLOTS, self._slots),
            (i.DRAINING, lambda: [((), float(is_draining()))]),
            (i.STARTED, lambda: [((version("celery-resilience"),), started_at)]),
        ):
            metrics.look_at(instrument, look)

    def pool_started(self) -> None:
        """Hear which children end."""
        if self.is_read:
            try:
                _pools.hear_exits(self._worker.pool, self._exited)
            except Exception:
                logger.exception("the ends of children are not counted")

    def ready(self) -> None:
        """The worker consumes: begin to ask."""
        if not self.is_read or self._has_begun:
            return
        self._has_begun = True
        metrics = self.metrics
        metrics.start_at_zero(
            {task: self._queues_of(task) for task in sorted(metrics.tasks)}
        )
        probes = Probes(self._probes())
        for instrument in i.ALL:
            if instrument.is_probed:
                metrics.look_at(instrument, partial(probes.look, instrument))
        metrics.look_at(i.PROBES, probes.successes)
        if not self._is_shown():
            # OpenTelemetry's SDK is imported, and exports nothing.
            self.is_read = False
            metrics.detach()
            return
        for probe in probes.all:
            start_deaf(partial(probe.run, self._has_ended), f"probe-{probe.name}")
        start_deaf(self._tick, "metrics")

    def _is_shown(self) -> bool:
        is_exported = OTEL_SDK in sys.modules and self._show_to_opentelemetry()
        return is_exported or bool(self.pages)

    def _show_to_opentelemetry(self) -> bool:
        """Whether it exports anything."""
        try:
            from celery_resilience.telemetry.opentelemetry_metrics import attach

            return attach(self.metrics)
        except Exception:
            logger.exception("OpenTelemetry is not told the metrics")
            return False

    def ended(self) -> None:
        """The worker has ended."""
        self._has_ended.set()
        if self.is_read:
            self.metrics.tick()

    def _tick(self) -> None:
        while not self._has_ended.wait(TICK_S):
            with thread_gate.inside():
                self.metrics.tick()

    def _queue_paused(self, queue: str) -> None:
        """It is not empty because nobody consumes it, perhaps from the start."""
        self._paused.add(queue)

    def _queues(self) -> Mapping[str, Any]:
        """Those that are consumed now, or would be if no circuit were open."""
        queues = self._app.amqp.queues
        paused = {name: queues[name] for name in list(self._paused)}
        return {**queues.consume_from, **paused}

    def _queues_of(self, task: str) -> Iterable[str]:
        """Where a task is expected, of the queues that are consumed."""
        try:
            # Not `route`, which makes a queue that is not known: before Celery 5.7 a
            # worker without -Q consumes that too (``app/amqp.py:187``, Celery 5.6).
            found = self._app.amqp.router.lookup_route(task, (), {}, {}, None)
            if not isinstance(found, str):
                default = self._app.conf.task_default_queue
                found = {"queue": default, **(found or {})}["queue"]
            name = str(getattr(found, "name", found))
        except Exception as exc:
            logger.debug("nobody knows the queue of %s: %s", task, exc)
            name = ""
        queues = self._queues()
        return [name] if name in queues else list(queues)[:1]

    # --- what is looked at ---------------------------------------------------------------

    def _active(self) -> Iterator[tuple[Labels, float]]:
        running = Counter(request.name for request in _celery_worker.running_requests())
        for task in {*self.metrics.tasks, *running}:
            yield (task,), float(running[task])

    def _slots(self) -> Iterator[tuple[Labels, float]]:
        yield (), float(_pools.slots_of(self._worker.pool))

    def _exited(self, pid: int, code: int, is_recycled: bool, is_meant: bool) -> None:
        labels = exit_reason(
            code,
            is_recycled=is_recycled,
            is_meant=is_meant or is_draining(),
            because=self._why.pop(pid),
        )
        self.metrics.count(i.CHILD_EXITS, labels)

    # --- what is asked --------------------------------------------------------------------

    def _probes(self) -> Iterator[Probe]:
        questions = self._questions
        yield Probe("queues", QueueDepths(self._app, self._queues, questions))
        if questions.store is not None:
            yield Probe("store", partial(_ask_store, questions.store))
        if questions.circuits is not None:
            yield Probe("circuits", partial(_ask_circuits, questions.circuits))
        if _pools.is_prefork(self._worker.pool):
            yield Probe("children", self._largest_child)

    def _largest_child(self) -> Answer:
        pids = _pools.children_of(self._worker.pool)
        sizes = [self._questions.own_kib_of(pid) or 0 for pid in pids]
        return {i.CHILD_MEMORY: {(): 1024.0 * max(sizes, default=0)}}


class QueueDepths:
    """
    How many messages wait in the queues of one worker.

    Args:
        app: The Celery app.
        queues: Those that the worker consumes at the moment, by their names.
        questions: What knows the failed queues.
    """

    def __init__(
        self, app: Any, queues: Callable[[], Mapping[str, Any]], questions: Questions
    ) -> None:
        self._app = app
        self._queues = queues
        self._failed = questions.failed_queues
        self._connection: Any = None

    def __call__(self) -> Answer:
        """
        Ask, over a connection of its own, which is kept.

        Raises:
            Exception: The broker does not answer.
        """
        # A broadcast's is this worker's own, and has another name each time.
        own = [
            name
            for name, queue in self._queues().items()
            if queue.exchange.type != "fanout" and not queue.auto_delete
        ]
        if self._connection is None:
            self._connection = self._app.connection_for_read()
        try:
            found = _kombu.messages_in_each(self._connection, [*own, *self._failed])
        except Exception:
            connection, self._connection = self._connection, None
            connection.release()
            raise
        return {
            i.QUEUED: {(name,): float(found[name]) for name in own},
            i.UNCOLLECTED: {(name,): float(found[name]) for name in self._failed},
        }


def _ask_store(store: Callable[[], Store]) -> Answer:
    stats = store().stats()
    by_queue = stats["by_failed_queue"]
    return {
        i.UNRESOLVED: {(str(name),): float(n) for name, n in by_queue.items()},
        i.UNRESOLVED_AGE: {(): float(stats["oldest_s"] or 0.0)},
    }


#: The states of a circuit, each of which has a number.
STATES = ("closed", "open", "half-open", "disabled", "shadow")


def _ask_circuits(circuits: Callable[[], Mapping[str, str]]) -> Answer:
    return {
        i.CIRCUIT: {
            (name, state): float(state == found)
            for name, found in circuits().items()
            for state in STATES
        }
    }


def _oldest_active() -> Iterator[tuple[Labels, float]]:
    now = time.time()
    oldest: dict[str, float] = {}
    for request in _celery_worker.running_requests():
        if request.time_start is not None:
            age_s = max(0.0, now - request.time_start)
            oldest[request.name] = max(age_s, oldest.get(request.name, 0.0))
    for task, age_s in oldest.items():
        yield (task,), age_s


class MetricsStep(bootsteps.StartStopStep):
    """Hears of the pool's children, once there is a pool."""

    label = "Resilience: metrics"
    name = "celery_resilience.telemetry.bootstep.MetricsStep"
    requires = ("celery.worker.components:Pool",)

    metrics: ClassVar[WorkerMetrics]

    def start(self, worker: Any) -> None:
        """Before the consumer."""
        self.metrics.pool_started()

    def stop(self, worker: Any) -> None:
        """Nothing: what ends is still counted."""

    def terminate(self, worker: Any) -> None:
        """Nor at a cold stop."""


def metrics_step(metrics: WorkerMetrics) -> type[Any]:
    """A step for one app's worker."""
    return type("MetricsStep", (MetricsStep,), {"metrics": metrics})
