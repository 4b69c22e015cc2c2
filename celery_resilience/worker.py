"""The worker's half of `install.py`: imported only in a worker's main process."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click
from celery import bootsteps, current_task, signals
from celery.utils.imports import symbol_by_name

from celery_resilience import _celery_worker, _pools, draining
from celery_resilience.circuits.policy import State as CircuitState
from celery_resilience.crashes.gate import Gate
from celery_resilience.crashes.judge import CrashJudge
from celery_resilience.crashes.task import StartGuard
from celery_resilience.delivery.bootstep import delivery_step
from celery_resilience.delivery.consumer import build_consumer_class
from celery_resilience.delivery.deliveries import Deliveries
from celery_resilience.delivery.facts import FactsChannel, NoFacts
from celery_resilience.delivery.outbox import Outbox
from celery_resilience.delivery.redis_visibility import RedisVisibility
from celery_resilience.delivery.request import build_request_class
from celery_resilience.delivery.send_again import send_again
from celery_resilience.errors import ConfigurationError
from celery_resilience.failed.bootstep import CollectorStep
from celery_resilience.failed.capture import Capture
from celery_resilience.failed.envelope import task_record_id
from celery_resilience.failed.routes import failed_queue_for
from celery_resilience.failed.spool import Spool
from celery_resilience.failed.task import ReplayFence
from celery_resilience.forks import hold_handlers_at_forks
from celery_resilience.idempotency.guard import KeyGuard
from celery_resilience.idempotency.reservations import FreesReservations
from celery_resilience.install import (
    WORKER_VARIABLE,
    AroundBody,
    ChildRooms,
    Installation,
)
from celery_resilience.lifecycle.bootstep import (
    Lifecycle,
    connection_step,
    lifecycle_step,
)
from celery_resilience.lifecycle.policy import StopConditions
from celery_resilience.memory import signals as memory_signals
from celery_resilience.memory.bootstep import MemorySetup, memory_step
from celery_resilience.memory.container import Container, find_container, whole_kib
from celery_resilience.memory.policy import share_of
from celery_resilience.memory.reading import find_eyes
from celery_resilience.memory.slots import Slots
from celery_resilience.memory.task import MemoryAround, RunLimits
from celery_resilience.memory.watch import MemoryWatch
from celery_resilience.message import SENT_AT, replay_of
from celery_resilience.messages.warning import LargeMessages
from celery_resilience.publisher import Publisher
from celery_resilience.reasons import facts_of_failure
from celery_resilience.redaction import safe_text
from celery_resilience.sessions.task import Sessions
from celery_resilience.shelf.bootstep import LAST_ANSWER_S, shelf_step
from celery_resilience.shelf.consumer import Shelving
from celery_resilience.shelf.policy import most_held
from celery_resilience.shelf.shelf import Shelf
from celery_resilience.task import ResilientTask, parameters_of
from celery_resilience.telemetry.bootstep import (
    Questions,
    WorkerMetrics,
    metrics_step,
)
from celery_resilience.telemetry.log import FailureLog
from celery_resilience.telemetry.log_setup import LogSetup
from celery_resilience.telemetry.log_worker import WorkerLog
from celery_resilience.telemetry.tracing import Commands, attach_tracing
from celery_resilience.threads import start_at_once
from celery_resilience.worker_start import WorkerStart
from celery_resilience.worker_warnings import WorkerWarnings, visibility_timeout_s

logger = logging.getLogger("celery_resilience.worker")

#: Visibility timeouts after which a message is surely not delivered again.
REDELIVERED_WITHIN = 2


class WorkerSetup:
    """
    celery-resilience in one worker.

    Args:
        installation: What is installed in the app.
        worker: Celery's WorkController, before its bootsteps are made.
    """

    def __init__(self, installation: Installation, worker: Any) -> None:
        self.installation = installation
        self.app = installation.app
        self.worker = worker
        settings = installation.settings
        self.worker_id = f"{worker.hostname}:{os.getpid()}:{time.time():.0f}"
        self.failed_queues = installation.failed_queues()
        self.collect_queues = installation.collect_queues()
        self.publisher = Publisher(self.app)
        self.deliveries = Deliveries(
            worker=worker.hostname,
            outbox=Outbox(
                self.publisher,
                clock=time.monotonic,
                spool=None if settings.spool_dir is None else Spool(settings.spool_dir),
            ),
            facts=FactsChannel(),
            keeps=Capture(
                namespace=settings.namespace,
                default_queue=settings.failed_queue,
                routes=settings.failed_routes,
                own_queue=self._failed_queue_of,
                clock=time.time,
                release=settings.release,
            ),
            crashes=CrashJudge(
                max_crashes=installation.max_crashes,
                window_s=settings.crash_window_s,
                clock=time.time,
            ),
            gate=Gate(
                lambda request: worker._process_task(request),
                start=self._start_releasing,
            ),
        )
        flag = installation.flags.get
        self.metrics = self._make_metrics()
        self.lifecycle = Lifecycle(
            worker,
            draining.share(),
            drain_timeout_s=installation.flag_or_setting("drain_timeout_s"),
            conditions=StopConditions(
                after_s=flag("stop_after_s"),
                after_tasks=flag("stop_after_tasks"),
                when_empty=bool(flag("stop_when_empty")),
            ),
            health_address=installation.flag_or_setting("health_port"),
            waiting_at_gate=self.deliveries.gate.waiting,
            hand_back=self.deliveries.hand_back,
            ask_store=self._ask_store if installation.store_choice.url else None,
            pages_address=installation.flag_or_setting("metrics_port"),
            pages=self.metrics.pages,
        )
        self.starts = StartGuard(
            installation.start_store,
            max_crashes=installation.max_crashes,
            window_s=settings.crash_window_s,
            worker=self.worker_id,
            tell=self.deliveries.facts.send,
        )

    def _make_metrics(self) -> WorkerMetrics:
        """What this worker counts, and shows."""
        installation = self.installation
        has_store = installation.store_choice.url is not None
        return WorkerMetrics(
            self.app,
            self.worker,
            address=installation.flag_or_setting("metrics_port"),
            tasks=[task.name for task in resilient_tasks(installation)],
            questions=Questions(
                store=installation.failed_store if has_store else None,
                failed_queues=(*self.failed_queues, *self.collect_queues),
                circuits=(
                    partial(circuit_states, installation)
                    if has_circuits(installation)
                    else None
                ),
                own_kib_of=find_eyes().own_kib_of,
            ),
        )

    def _start_releasing(self, release: Callable[[], None]) -> None:
        """Hand requests to the pool where that may wait for a free slot."""
        if _pools.is_event_loop_prefork(self.worker.pool):
            # It never waits, and is not to be called from another thread.
            release()
        else:
            threading.Thread(target=release, name="gate", daemon=True).start()

    def check(self) -> None:
        """
        Refuse to start what could not keep a failed task.

        Raises:
            ConfigurationError: The message says what is wrong, all at once.
        """
        missing = _celery_worker.missing_doors(_celery_worker.CAPTURE_DOORS)
        if missing:
            raise ConfigurationError(
                "this release of Celery lacks what celery-resilience needs to keep "
                f"failed tasks: {', '.join(missing)}. Upgrade celery-resilience, or "
                "set resilience_enabled = False to run without it"
            )
        self.installation.check_failed_queues()
        for what, queues in (
            ("a failed queue", self.failed_queues),
            ("a queue of resilience_collect_queues", self.collect_queues),
        ):
            consumed = set(self.app.amqp.queues.consume_from) & set(queues)
            if consumed:
                raise ConfigurationError(
                    f"{', '.join(sorted(consumed))}: {what} cannot be consumed as "
                    "tasks. Take it out of -Q and task_queues; `celery -A app failed "
                    "collect` or --collect-failed empties it"
                )
        choice = self.installation.store_choice
        if self.collects and choice.url is None:
            raise ConfigurationError(
                f"--collect-failed needs a store, and there is none: {choice.why}"
            )
        self.installation.check_store()
        self.installation.check_late_options()
        spool = self.installation.settings.spool_dir
        if spool is not None:
            Spool(spool).check()
        self.lifecycle.listen()

    @property
    def collects(self) -> bool:
        """This worker also runs the collector."""
        flag = self.installation.flags.get("collect_failed")
        return bool(self.installation.settings.collect_failed if flag is None else flag)

    def apply(self) -> None:
        """Put our classes and steps in the places that Celery reads them from."""
        hold_handlers_at_forks()
        installation, worker = self.installation, self.worker
        visibility = RedisVisibility(self.deliveries)
        step = delivery_step(self.deliveries, visibility)
        replace_step(self.app, "consumer", step)
        worker.consumer_cls = build_consumer_class(
            symbol_by_name(worker.consumer_cls),
            deliveries=self.deliveries,
            visibility=visibility,
            prepare_tasks=self.prepare_tasks,
            is_failed_queue=lambda name: (
                name in self.failed_queues or name in self.collect_queues
            ),
            shelve=self.make_shelving(visibility, after=step),
        )
        life = self.lifecycle
        life.attach()
        if life.conditions.after_tasks is not None:
            self.deliveries.on_closed = life.delivery_closed
        replace_step(self.app, "worker", lifecycle_step(life))
        replace_step(self.app, "consumer", connection_step(life))
        installation.lifecycle = life
        memory = self.watch_memory()
        tracing = attach_tracing(
            facts=self.deliveries.facts,
            commands=failed_commands(installation),
            is_running_in=self.deliveries.is_running_in,
            is_ending=_is_ending,
            uid=f"celery_resilience-{id(self.app)}",
        )
        installation.child = ChildRooms(
            fence=replay_fence(installation),
            starts=self.starts,
            keys=key_guard(installation),
            facts=self.deliveries.facts,
            describe=facts_of_failure,
            is_ending=_is_ending,
            around=(
                *tracing.around,
                installation.streams,
                *rooms_around(installation, worker.pool_cls),
                memory.around,
            ),
            give_way=memory.around.lift,
        )
        if installation.circuits.queues():
            from celery_resilience.circuits.bootstep import circuit_step

            circuits = installation.circuits
            circuits.decide_at_once()
            paused = circuit_step(circuits, circuits.queues())
            replace_step(self.app, "consumer", paused)
        # Before there are children; whether any task has one is not known yet.
        installation.circuits.share()
        os.environ[WORKER_VARIABLE] = json.dumps(
            {
                "worker": self.worker_id,
                "max_crashes": installation.max_crashes,
                "memory": memory_told(installation, memory),
            }
        )
        log_setup = attach_log(installation, worker.pool_cls)
        LargeMessages(self._has_message_limit).attach()
        FreesReservations(self._has_key, installation.key_sender.release).attach()
        log = WorkerLog(
            installation.settings.log_format,
            self.deliveries,
            start=self.start(),
            end=life.drain,
            clock=time.monotonic,
        )
        log.attach()
        metrics = self.metrics
        metrics.attach()
        installation.has_metrics = metrics.is_read
        replace_step(self.app, "worker", metrics_step(metrics))
        warnings = WorkerWarnings(installation)
        uid = f"celery_resilience-{id(self.app)}"
        hostname = worker.hostname

        def on_ready(sender: Any = None, **_: Any) -> None:
            if getattr(sender, "app", None) is self.app:
                call_each(
                    log_setup.apply,
                    lambda: log.started(warnings.sentences()),
                    tell_of_tracing,
                    tracing.ready,
                    warnings.look_at_key_store,
                    metrics.ready,
                    note_metrics,
                    start_circuits,
                )

        def tell_of_tracing() -> None:
            if tracing.words:
                logger.info("failures are told to %s too", tracing.words)

        def note_metrics() -> None:
            installation.has_metrics = metrics.is_read

        def start_circuits() -> None:
            if has_circuits(installation):
                installation.circuits.start_reading()

        def on_shutting_down(sender: Any = None, sig: str = "", **_: Any) -> None:
            if sender == hostname:
                life.begin(sig)
                # What this stop cuts off is no crash; the store may be slow.
                start_at_once(self.starts.forget_worker)

        def on_shutdown(sender: Any = None, **_: Any) -> None:
            if sender is worker:
                do_each(
                    self.publisher.close,
                    self.deliveries.facts.close,
                    tracing.ended,
                    metrics.ended,
                    life.ended,
                )

        def on_logging(instance: Any = None, **_: Any) -> None:
            if instance is worker:
                log_setup.apply()

        def on_child(**_: Any) -> None:
            log_setup.apply()  # it may have a file of its own

        signals.celeryd_after_setup.connect(on_logging, weak=False, dispatch_uid=uid)
        signals.worker_process_init.connect(
            on_child, weak=False, dispatch_uid=f"{uid}-log"
        )
        signals.worker_ready.connect(on_ready, weak=False, dispatch_uid=uid)
        signals.worker_shutting_down.connect(
            on_shutting_down, weak=False, dispatch_uid=uid
        )
        signals.worker_shutdown.connect(on_shutdown, weak=False, dispatch_uid=uid)

    def make_shelving(self, visibility: RedisVisibility, *, after: type[Any]) -> Any:
        """
        What takes the snoozed messages that are too many; None without a server for them.

        Args:
            after: The step that gives back what the store did not take.
        """
        installation, deliveries = self.installation, self.deliveries
        if installation.store_choice.url is None:
            return None
        shelving = Shelving(
            Shelf(installation.shelf_store, Publisher(self.app)),
            deliveries,
            copy_of=lambda message, due: send_again(
                deliveries.original(message), delay_s=0.0, marks={SENT_AT: due}
            ),
            is_lost=lambda: visibility.is_lost,
            most_held=most_held(getattr(self.app.conf, "worker_eta_task_limit", None)),
        )
        replace_step(self.app, "consumer", shelf_step(shelving, after=after))
        self.lifecycle.waits_elsewhere = shelving.has_waiting
        return shelving.takes

    def watch_memory(self) -> MemorySetup:
        """What looks at the memory of this worker's processes."""
        # Registers what answers `celery inspect`, in a worker without the command too.
        import celery_resilience.memory.command  # noqa: F401

        installation = self.installation
        tasks = resilient_tasks(installation)
        eyes, container = find_eyes(), find_container()
        limits, recycle_kib = memory_limits(installation, container)
        slots = Slots([task.name for task in tasks])
        around = MemoryAround(slots, limits, eyes.make_reader)
        is_asked_for = limits.are_any or recycle_kib is not None
        setup = MemorySetup(
            around=around,
            watch=MemoryWatch(
                slots=slots,
                own_kib_of=eyes.own_kib_of,
                has_limits=limits.are_any,
                is_enforced=sys.platform == "linux",
                recycle_kib=recycle_kib,
                container=container if is_asked_for else None,
            ),
            recycle_kib=recycle_kib,
            because=self.deliveries.ended_child,
        )
        uid = f"celery_resilience-{id(self.app)}"
        memory_signals.attach(around, recycle_kib, uid)
        memory_signals.freeze_before_the_first_fork(uid)
        replace_step(self.app, "consumer", memory_step(setup))
        return setup

    def start(self) -> WorkerStart:
        """What an operator should know of this worker."""
        return WorkerStart(
            self.installation,
            self.worker,
            failed_queues=self.failed_queues,
            collect_queues=self.collect_queues,
            collects=self.collects,
            stops=self.lifecycle,
        )

    def _ask_store(self) -> None:
        """Raise what the store says, if it does not answer."""
        store = self.installation.start_store()
        if store is not None:
            store.unfinished("health", window_s=1.0)

    def _failed_queue_of(self, task_name: str) -> str | bool | None:
        task = self.app.tasks.get(task_name)
        return task.failed_queue if isinstance(task, ResilientTask) else None

    def _has_message_limit(self, task_name: str) -> bool:
        task = self.app.tasks.get(task_name)
        return isinstance(task, ResilientTask) and task.max_message_kib is not None

    def _has_key(self, task_name: str) -> bool:
        task = self.app.tasks.get(task_name)
        return isinstance(task, ResilientTask) and task.has_key

    def prepare_tasks(self) -> None:
        """Give every resilient task our Request, on top of the one that it has."""
        for task in self.app.tasks.values():
            if isinstance(task, ResilientTask) and not task.name.startswith("celery."):
                base: Any = symbol_by_name(task.Request)
                if getattr(base, "deliveries", None) is not self.deliveries:
                    ours: Any = build_request_class(base, self.deliveries)
                    task.Request = ours


def call_each(*calls: Callable[[], object]) -> None:
    """Call each; one that raises is logged, and keeps none after it from being called."""
    for call in calls:
        try:
            call()
        except Exception:
            logger.exception("a part of the worker's start failed; the rest goes on")


def attach_log(installation: Installation, pool: Any) -> LogSetup:
    """Log what ends in a worker; what it returns is applied where handlers are made."""
    look, has_greenlets = find_eyes().rss_mib_of, _pools.is_greenlet_pool(pool)
    FailureLog(
        installation.settings.log_format,
        clock=time.monotonic,
        # A greenlet's number is no process's.
        rss_mib_of=lambda pid: look(os.getpid() if has_greenlets else pid),
    ).attach()
    return log_setup_of(installation)


def log_setup_of(installation: Installation) -> LogSetup:
    """What the processes of a worker do with every record of their log."""
    settings = installation.settings

    def names_of(task: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if isinstance(task, ResilientTask):
            return task.parameter_names, task.hidden_names
        return parameters_of(task.run), settings.redact

    return LogSetup(
        settings.log_format,
        settings.redact,
        names_of=names_of,
        is_ours=lambda task: (
            isinstance(task, ResilientTask) and not task.name.startswith("celery.")
        ),
    )


def replay_fence(installation: Installation) -> ReplayFence:
    """What the processes of a worker ask before they run a message with a past."""
    visible_s = visibility_timeout_s(installation.app)
    return ReplayFence(
        installation.failed_store,
        namespace=installation.settings.namespace,
        clock=time.time,
        redelivered_within_s=REDELIVERED_WITHIN * visible_s,
    )


def key_guard(installation: Installation) -> KeyGuard:
    """What the processes of a worker ask before they run a message with a key."""
    conf = installation.app.conf
    return KeyGuard(
        installation.key_store,
        namespace=installation.settings.namespace,
        if_store_down=installation.settings.if_store_down,
        serializer=conf.result_serializer,
        accept=conf.result_accept_content or conf.accept_content,
    )


def resilient_tasks(installation: Installation) -> list[ResilientTask]:
    """The app's resilient tasks, by name."""
    tasks = installation.app.tasks
    found: list[Any] = [tasks[name] for name in sorted(tasks)]
    return [
        task
        for task in found
        if isinstance(task, ResilientTask) and not task.name.startswith("celery.")
    ]


def memory_limits(
    installation: Installation, container: Container | None
) -> tuple[RunLimits, int | None]:
    """
    What runs may take, and what a child may gain in KiB, or None.

    Raises:
        ConfigurationError: A share is asked for, and nobody knows of what.
    """
    recycle, limit = installation.memory_recycle_mib, installation.memory_limit_mib
    own = {
        task.name: task.memory_limit_mib
        for task in resilient_tasks(installation)
        if task.memory_limit_mib is not None
    }
    whole = whole_kib(container)
    if whole is None and any(
        isinstance(a, str) for a in (recycle, limit, *own.values())
    ):
        raise ConfigurationError(
            "a share of the container's memory cannot be had here, where neither cgroups "
            "nor /proc/meminfo tell how much it is: give MiB in memory_recycle_mib and "
            "memory_limit_mib"
        )
    recycle_kib = None if recycle is None else share_of(recycle, whole or 0)
    return RunLimits(limit, whole or 0, own), recycle_kib


def memory_told(installation: Installation, memory: MemorySetup) -> dict[str, Any]:
    """What a spawned child must know to share its figures."""
    slots = memory.around.slots
    return {
        "pid": os.getpid(),
        "descriptor": None if slots is None else slots.descriptor,
        "tasks": [] if slots is None else slots.tasks[1:],
        "flags": {
            name: installation.flags.get(name)
            for name in ("memory_recycle_mib", "memory_limit_mib")
        },
    }


def enter_spawned_child(installation: Installation, told: Mapping[str, Any]) -> Any:
    """The room memory around the bodies of a spawned child."""
    installation.flags.update(
        {name: value for name, value in told["flags"].items() if value is not None}
    )
    slots = None
    if told["descriptor"] is not None:
        try:
            slots = Slots.of_process(told["tasks"], told["pid"], told["descriptor"])
        except OSError as exc:
            logger.warning("this child cannot tell of its memory: %s", exc)
    limits, recycle_kib = memory_limits(installation, find_container())
    around = MemoryAround(slots, limits, find_eyes().make_reader)
    memory_signals.child_started(around, recycle_kib)
    return around


def rooms_around(installation: Installation, pool: Any) -> tuple[AroundBody, ...]:
    """
    What looks at what a body leaves behind, the outermost first.

    Args:
        pool: The pool's class, or its name.
    """
    mode = installation.settings.sessions
    if mode == "off":
        return ()
    has_greenlets = _pools.is_greenlet_pool(pool)
    _celery_worker.keep_django_connections(installation.app, _runs_a_resilient_task)
    return (Sessions(is_strict=mode == "strict", keeps=not has_greenlets),)


def _runs_a_resilient_task() -> bool:
    """Whether the task of this thread is one whose connections we look after."""
    task: Any = current_task
    return isinstance(task, ResilientTask) and not task.name.startswith("celery.")


def has_circuits(installation: Installation) -> bool:
    """Whether a setting or a task names a circuit."""
    return bool(installation.settings.circuits) or any(
        isinstance(task, ResilientTask) and task.circuit_name is not None
        for task in installation.app.tasks.values()
    )


def circuit_states(installation: Installation) -> dict[str, str]:
    """The state of each circuit that a setting or a task names, as the store has it."""
    tasks = [task.circuit_name for task in resilient_tasks(installation)]
    names = dict.fromkeys([*dict(installation.settings.circuits), *filter(None, tasks)])
    store, now = installation.circuit_store(), time.time()
    states = {name: installation.circuits.get(name).state for name in names}
    if store is not None:
        answer = store.read(list(names))
        now = answer.now
        states = {
            name: CircuitState.from_text(answer.found[name].text)
            if name in answer.found
            else CircuitState()
            for name in names
        }
    return {
        name: str(state.forced_at(now) or state.position)
        for name, state in states.items()
    }


def prepare_worker(installation: Installation, worker: Any) -> None:
    """
    Set celery-resilience up in *worker*, or make it refuse to start.

    Celery swallows what a signal's receiver raises, so that a refusal is raised
    by a bootstep.
    """
    refusal: ConfigurationError | None = None
    unexpected: Exception | None = None
    setup: WorkerSetup | None = None
    try:
        if not installation.settings.enabled:
            try:
                give_back_shelved(installation)
            except Exception:
                logger.exception("snoozed messages stay in the store")
            return
        setup = WorkerSetup(installation, worker)
        setup.check()
        setup.apply()
    except ConfigurationError as exc:
        refusal = exc
    except Exception as exc:
        unexpected = exc
        refusal = ConfigurationError(
            f"it could not be set up: {type(exc).__name__}: {safe_text(exc)}. The worker "
            "does not start, for its tasks would run unguarded; the traceback is in the "
            "log"
        )
    app = installation.app
    found = {"refusal": refusal, "unexpected": unexpected}
    step = type("ResilienceStep", (ResilienceStep,), found)
    replace_step(app, "worker", step)
    app.steps["worker"].discard(CollectorStep)
    if setup is not None and refusal is None and setup.collects:
        app.steps["worker"].add(CollectorStep)


def do_each(*lasts: Callable[[], None]) -> None:
    """Do each of what a worker does last, also after one that has failed."""
    for last in lasts:
        try:
            last()
        except Exception:
            logger.exception("at the end of the worker")


def give_back_shelved(installation: Installation) -> None:
    """
    Publish what waits in the store, in a worker that is plain Celery otherwise.

    Other workers had put it there before celery-resilience was switched off.
    """
    if installation.store_choice.url is None:
        return
    app = installation.app
    shelf = Shelf(installation.shelf_store, Publisher(app), is_last=True)
    uid = f"celery_resilience-{id(app)}-shelf"

    def on_ready(sender: Any = None, **_: Any) -> None:
        if getattr(sender, "app", None) is app:
            shelf.start()

    def on_shutdown(sender: Any = None, **_: Any) -> None:
        if getattr(sender, "app", None) is app:
            shelf.stop(LAST_ANSWER_S)

    signals.worker_ready.connect(on_ready, weak=False, dispatch_uid=uid)
    signals.worker_shutdown.connect(on_shutdown, weak=False, dispatch_uid=uid)


def prepare_spawned_child(installation: Installation, told: Mapping[str, Any]) -> None:
    """
    Put the rooms around the bodies of a child that has copied nothing of its worker.

    Args:
        told: What the worker tells by `WORKER_VARIABLE`.
    """
    log_setup_of(installation).apply()
    facts = NoFacts()
    memory = enter_spawned_child(installation, told["memory"])
    installation.child = ChildRooms(
        fence=replay_fence(installation),
        starts=StartGuard(
            installation.start_store,
            max_crashes=told["max_crashes"],
            window_s=installation.settings.crash_window_s,
            worker=told["worker"],
            tell=facts.send,
        ),
        keys=key_guard(installation),
        facts=facts,
        describe=facts_of_failure,
        is_ending=_is_ending,
        around=(
            *attach_tracing(
                facts=facts,
                commands=failed_commands(installation),
                is_running_in=lambda pid: False,
                is_ending=_is_ending,
                uid=f"celery_resilience-{id(installation.app)}",
            ).around,
            installation.streams,
            *rooms_around(installation, "prefork"),
            memory,
        ),
        give_way=memory.lift,
    )


def failed_commands(installation: Installation) -> Commands:
    """How an operator shows and replays the failed task of a run."""
    settings, tasks = installation.settings, installation.app.tasks

    def commands(
        task: str, task_id: str, marks: Mapping[str, Any], exception: str, reason: str
    ) -> Mapping[str, str]:
        queue = failed_queue_for(
            task=task,
            exception=exception,
            reason=reason,
            routes=settings.failed_routes,
            default=settings.failed_queue,
            own=getattr(tasks.get(task), "failed_queue", None),
        )
        record = replay_of(marks).get("record")
        if queue is None and record is None:
            return {}
        record = record or task_record_id(settings.namespace, task_id)
        call = f"celery -A {installation.app.main or 'APP'} failed"
        return {"show": f"{call} show {record}", "replay": f"{call} replay {record}"}

    return commands


def replace_step(app: Any, blueprint: str, step: Any) -> None:
    """Add a bootstep in place of one of the same name, of an earlier worker."""
    steps = app.steps[blueprint]
    for known in [s for s in steps if getattr(s, "name", None) == step.name]:
        steps.discard(known)
    steps.add(step)


class ResilienceStep(bootsteps.Step):
    """Ends the start of a worker that would lose failed tasks."""

    name = "celery_resilience.worker.ResilienceStep"

    refusal: ConfigurationError | None = None
    unexpected: Exception | None = None

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        if self.refusal is not None:
            if self.unexpected is not None:
                # Before this step a worker has no log.
                logger.error(
                    "celery-resilience: %s", self.refusal, exc_info=self.unexpected
                )
            if click.get_current_context(silent=True) is not None:
                raise SystemExit(f"celery-resilience: {self.refusal}")
            raise self.refusal
        super().__init__(worker, **kwargs)


def _is_ending(exc: BaseException) -> bool:
    """An exception that ends the process, and is not the task's own."""
    return (
        isinstance(exc, _celery_worker.WORKER_EXITS)
        or (not isinstance(exc, Exception) and _pools.is_being_terminated())
        or type(exc).__module__.partition(".")[0] in ("gevent", "greenlet")
    )
