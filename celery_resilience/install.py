"""Resilience(app): the only module that knows every room."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from celery import Celery, current_app, current_task, signals

from celery_resilience import _celery, flags, soft_limit
from celery_resilience.draining import is_draining, shared
from celery_resilience.errors import (
    CircuitIsOpen,
    ConfigurationError,
    MissingExtra,
)
from celery_resilience.redaction import is_hidden
from celery_resilience.run_view import RunView
from celery_resilience.settings import (
    Settings,
    StoreChoice,
    choose_store,
    is_redis,
    read_settings,
    sqlite_path,
)
from celery_resilience.task import ResilientTask

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine

    from celery_resilience.batches.task import Streams
    from celery_resilience.circuits.breaker import FleetBreaker
    from celery_resilience.circuits.fleet import Circuits
    from celery_resilience.circuits.task import Breakers, TaskCircuit
    from celery_resilience.crashes.task import StartGuard
    from celery_resilience.delivery.facts import TellsFacts
    from celery_resilience.explain import TaskExplained
    from celery_resilience.failed.items import ItemKeeper
    from celery_resilience.failed.task import ReplayFence
    from celery_resilience.idempotency.guard import KeyGuard
    from celery_resilience.idempotency.registered import TaskKeys
    from celery_resilience.idempotency.send import KeySender
    from celery_resilience.lifecycle.bootstep import Lifecycle
    from celery_resilience.retries.budgets import Budgets
    from celery_resilience.retries.task import TaskRules
    from celery_resilience.sessions.resources import Resource
    from celery_resilience.telemetry.business import RunCounts

Thing = TypeVar("Thing")

_ATTRIBUTE = "_celery_resilience"

#: Most seconds that a message of a retry is held for its time.
MAX_RETRY_WAIT_S = 900.0

#: The environment variable by which a worker tells a spawned child, which copies
#: nothing of it, what a forked one knows.
WORKER_VARIABLE = "CELERY_RESILIENCE_WORKER"


class Resilience:
    """
    Installs celery-resilience into a Celery app.

    Needed for the worker's flags and for messages that no task will see; tasks
    with `base=ResilientTask` install the rest by themselves. Installing twice
    is installing once.

    Args:
        app: The Celery app; or give it to `init_app` later.
    """

    def __init__(self, app: Celery | None = None) -> None:
        self._app: Celery | None = None
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Install into *app*; its settings are read when it is finalized."""
        self._app = app
        install(app)

    def explain(self) -> list[TaskExplained]:
        """
        What celery-resilience changes, or would change, for each task of the app.

        Nothing is sent, and neither broker nor store is asked.

        Raises:
            ConfigurationError: A setting is wrong, or there is no app yet.
        """
        from celery_resilience.explaining import explain_app

        if self._app is None:
            raise ConfigurationError("there is no app yet: call init_app first")
        return explain_app(self._app)

    def resource(
        self,
        open: Callable[[], Thing],
        close: Callable[[Thing], object],
        *,
        scope: Literal["task", "child"] = "task",
    ) -> Resource[Thing]:
        """
        Something that tasks use, opened when it is first asked for and closed in time.

        Call what this returns to have the thing: `client = http()`. A forked child
        opens its own.

        Args:
            open: Opens it.
            close: Closes it; what it raises is logged.
            scope: "task": each run has its own, closed when its body has ended.
                "child": each process has one, which its threads share, closed when
                the process ends. Outside of a resilient task's run, "task" is as
                "child".

        Raises:
            ConfigurationError: Another scope, or something that cannot be called.
        """
        from celery_resilience.sessions.resources import Resource

        return Resource(open, close, scope)

    def circuit(self, name: str) -> FleetBreaker:
        """
        The circuit *name*, shared with the fleet, as a pybreaker; also in a web process.

        Raises:
            ConfigurationError: The name is none, or there is no app yet.
        """
        if self._app is None:
            raise ConfigurationError("there is no app yet: call init_app first")
        return install(self._app).breakers.get(name)

    def create_once_table(self, bind: Engine | Connection) -> None:
        """
        Make the table of `once` in the user's own database, unless it is there.

        Args:
            bind: An engine; or a connection, in whose transaction it is made.

        Raises:
            ConfigurationError: Neither, or of a database where `once` does not work.
        """
        from celery_resilience.idempotency.once import sql_table as once_table

        once_table.create(bind)


class IsEnding(Protocol):
    """Whether an exception ends the process, and is not the task's own."""

    def __call__(self, exc: BaseException) -> bool: ...


class DescribesFailure(Protocol):
    """What is told of a run that failed, by its exception; see `facts_of_failure`."""

    def __call__(
        self, exc: BaseException, package: str, *, is_exhausted: bool
    ) -> dict[str, Any]: ...


class AroundBody(Protocol):
    """A room that looks, in the process that runs it, at what a body leaves behind."""

    def before(self, task: ResilientTask, request: Any) -> None:
        """The body of *request* starts; this never fails."""

    def after(
        self, task: ResilientTask, request: Any, exc: BaseException | None
    ) -> None:
        """
        The body returned, or raised *exc*.

        Raises:
            ResilienceError: What the run comes to instead.
        """


@dataclass(frozen=True, slots=True)
class ChildRooms:
    """
    What surrounds a task body in the process that runs it.

    Attributes:
        around: The rooms right around the body, the outermost first.
        give_way: What an exception's handler does first of all: it gives back the
            memory that a run's limit denies the process. It makes no object.
    """

    fence: ReplayFence
    starts: StartGuard
    keys: KeyGuard
    facts: TellsFacts
    describe: DescribesFailure
    is_ending: IsEnding
    around: tuple[AroundBody, ...] = ()
    give_way: Callable[[], object] | None = None


class Installation:
    """
    celery-resilience in one app.

    Attributes:
        app: The Celery app.
        child: What surrounds a body; None outside a worker, or when it is off.
        lifecycle: Of the worker in this process, or of the one that has forked it.
        flags: The worker's flags that were given.
        has_metrics: Somebody reads what this worker counts.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.child: ChildRooms | None = None
        self.lifecycle: Lifecycle | None = None
        self.flags: dict[str, Any] = {}
        self.has_metrics = False
        self._stores: dict[str, Any] = {}

    @cached_property
    def settings(self) -> Settings:
        """
        The app's settings, read at first use, which is when it is finalized.

        Raises:
            ConfigurationError: Some are wrong.
        """
        conf = self.app.conf
        return read_settings(
            conf, prefix=getattr(conf, "prefix", None) or "", app_name=self.app.main
        )

    @cached_property
    def store_choice(self) -> StoreChoice:
        """Where failed tasks are kept, and why there."""
        conf = self.app.conf
        backend = conf.result_backend
        return choose_store(
            self.settings,
            broker_url=str(conf.broker_write_url or "amqp://"),
            result_backend=backend if isinstance(backend, str) else None,
            app_dir=self.app_dir,
            broker_tls=conf.broker_use_ssl,
        )

    @cached_property
    def send_guarded(self) -> Callable[..., Any]:
        """Sends the messages of tasks with `max_message_kib`."""
        from celery_resilience.messages.send import guarded

        return guarded

    def publish_failed(self, task: ResilientTask) -> None:
        """A call of *task* could not be sent: end what tracing has begun for it."""
        if "opentelemetry.trace" in sys.modules:
            from celery_resilience.telemetry.opentelemetry import publish_failed

            publish_failed(task)

    @cached_property
    def streams(self) -> Streams:
        """Streams of the tasks that run in this process."""
        from celery_resilience.batches.task import Streams

        return Streams(
            self.checkpoint_store,
            is_stopping=is_draining,
            task_of=self.app.tasks.__getitem__,
            keep=self.keep_item,
            count=self.count_of_run,
        )

    def count_of_run(self, request: Any, name: str, amount: int, **labels: str) -> None:
        """Count *amount* more of a metric, as the body of *request* may."""
        RunView(request, self).count(name, amount, **labels)

    def keep_item(
        self, signature: Any, exc: BaseException, *, task_id: str, request: Any
    ) -> Callable[[], object]:
        """Make a failed task of an item of a batch; what this returns stores it."""
        return self.item_keeper.keep(
            signature,
            _celery.message_of(signature, task_id),
            exc,
            task_id=task_id,
            request=request,
        )

    @cached_property
    def item_keeper(self) -> ItemKeeper:
        """Keeps failed items; it has a connection of this process's own."""
        from celery_resilience.failed.capture import Capture
        from celery_resilience.failed.items import ItemKeeper
        from celery_resilience.publisher import Publisher

        settings = self.settings
        capture = Capture(
            namespace=settings.namespace,
            default_queue=settings.failed_queue,
            routes=settings.failed_routes,
            own_queue=lambda name: getattr(
                self.app.tasks.get(name), "failed_queue", None
            ),
            clock=time.time,
            release=settings.release,
        )
        return ItemKeeper(capture, Publisher(self.app).publish)

    def new_counts(self) -> RunCounts:
        """For what one run counts itself."""
        from celery_resilience.telemetry.business import RunCounts

        return RunCounts(self._hides_label)

    def _hides_label(self, name: str) -> bool:
        hidden = frozenset(map(str.lower, self.settings.redact))
        return is_hidden(name, hidden)

    @cached_property
    def key_sender(self) -> KeySender:
        """Sends the messages of tasks with keys."""
        from celery_resilience.idempotency.send import KeySender

        return KeySender(self.key_store, namespace=self.settings.namespace)

    def task_keys(self, task: type[ResilientTask]) -> TaskKeys | None:
        """
        How the keys of *task* are made; None where it has none.

        Raises:
            ConfigurationError: An option, or the key's template, is wrong.
        """
        from celery_resilience.idempotency.registered import task_keys

        @cache
        def hides(name: str) -> bool:
            names = (*task.redact, *self.settings.redact)
            return is_hidden(name, frozenset(map(str.lower, names)))

        return task_keys(task, hides, task.own_options)

    @cached_property
    def circuits(self) -> Circuits:
        """The circuits of this process; no setting is read before one is used."""
        from celery_resilience.circuits.fleet import Circuits

        return Circuits(
            self.circuit_store,
            self.circuit_options,
            is_off=lambda: not self.settings.enabled,
        )

    @cached_property
    def breakers(self) -> Breakers:
        """The breakers of this process, by their circuits' names."""
        from celery_resilience.circuits.task import Breakers

        return Breakers(self.circuits)

    def circuit_options(self) -> dict[str, Any]:
        """
        What the app says of its circuits, by their names.

        Raises:
            ConfigurationError: An option is wrong.
        """
        if not self.settings.circuits:
            return {}
        from celery_resilience.circuits.options import circuit_options

        return {
            name: circuit_options(name, options)
            for name, options in self.settings.circuits
        }

    def check_late_options(self) -> None:
        """
        Read what else is read where a circuit or a retry budget is first used.

        Raises:
            ConfigurationError: An option of one is wrong, or a probe is no function.
        """
        self.budget_options()
        circuits = self.circuit_options()
        if circuits:
            from celery_resilience.circuits.probing import check_probes

            check_probes(circuits)

    def task_circuit(self, task: type[ResilientTask]) -> TaskCircuit | None:
        """
        The circuit around *task*; None where it has none.

        Raises:
            ConfigurationError: An option is wrong.
        """
        if task.circuit is None and task.if_circuit_open == "snooze":
            return None
        from celery_resilience.circuits.task import task_circuit

        def has_queues(name: str) -> bool:
            options = self.circuit_options().get(name)
            return bool(options and options.queues)

        return task_circuit(task, lambda: self.breakers, has_queues)

    def when_circuit_open(
        self,
        task: ResilientTask,
        request: Any,
        exc: CircuitIsOpen,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """What becomes of a run whose circuit is open; its result, or it raises."""
        from celery_resilience.circuits.task import when_open

        return when_open(
            task,
            request,
            exc,
            args,
            kwargs,
            breakers=self.breakers,
            visible_s=self.visible_s,
        )

    @property
    def visible_s(self) -> float:
        """After so many seconds the broker may deliver a held message again."""
        options = self.app.conf.broker_transport_options or {}
        # kombu's own for Redis, where nobody has set another.
        return float(options.get("visibility_timeout") or 3_600.0)

    @cached_property
    def retry_budgets(self) -> Budgets:
        """The retry budgets of this process; no setting is read before one is used."""
        from celery_resilience.retries.budgets import Budgets

        return Budgets(self.budget_store, self.budget_options)

    def budget_options(self) -> dict[str, Any]:
        """
        What the app says of its retry budgets, by their names.

        Raises:
            ConfigurationError: An option is wrong.
        """
        if not self.settings.retry_budgets:
            return {}
        from celery_resilience.retries.options import budget_options

        return {
            name: budget_options(name, options)
            for name, options in self.settings.retry_budgets
        }

    def task_rules(self, task: type[ResilientTask]) -> TaskRules | None:
        """
        The retry rules of *task*; None where it has none.

        Raises:
            ConfigurationError: They are wrong.
        """
        if task.retry_rules == ():
            return None
        from celery_resilience.retries.task import task_rules

        return task_rules(
            task,
            budgets=lambda: self.retry_budgets,
            max_wait_s=lambda: min(MAX_RETRY_WAIT_S, self.visible_s / 2),
        )

    @property
    def app_dir(self) -> Path:
        """The folder that holds the app's module or top-level package."""
        module = sys.modules.get((self.app.main or "").partition(".")[0])
        file = getattr(module, "__file__", None)
        if not file:
            return Path.cwd()
        path = Path(file).resolve()
        return path.parent.parent if path.name == "__init__.py" else path.parent

    @property
    def archive_dir(self) -> Path:
        """The folder of the archive: the setting, or beside the app."""
        name = f"{self.settings.namespace}.failed-archive".replace(":", "-")
        return self.settings.failed_archive_dir or self.app_dir / name

    @property
    def max_crashes(self) -> int:
        """The flag, or the setting."""
        return self.flags.get("max_crashes") or self.settings.max_crashes

    def flag_or_setting(self, name: str) -> Any:
        """What the worker's flag of that name says, or else the setting."""
        flag = self.flags.get(name)
        return getattr(self.settings, name) if flag is None else flag

    @property
    def memory_recycle_mib(self) -> float | str | None:
        """The flag, or the setting."""
        found: float | str | None = self.flag_or_setting("memory_recycle_mib")
        return found

    @property
    def memory_limit_mib(self) -> float | str | None:
        """The flag, or the setting; a task's own beats both."""
        found: float | str | None = self.flag_or_setting("memory_limit_mib")
        return found

    def failed_queues(self) -> list[str]:
        """Every failed queue of the app, the default first."""
        from celery_resilience.failed.routes import failed_queues

        return failed_queues(
            routes=self.settings.failed_routes,
            default=self.settings.failed_queue,
            own=[
                task.failed_queue
                for task in self.app.tasks.values()
                if isinstance(task, ResilientTask)
            ],
        )

    def failed_queue_of(self, task: Any) -> str | None:
        """Where an ordinary failure of *task* goes; None: it is not kept."""
        from celery_resilience.failed.routes import failed_queue_for
        from celery_resilience.outcome import Reason

        return failed_queue_for(
            task=task.name,
            exception="",
            reason=Reason.EXCEPTION,
            routes=self.settings.failed_routes,
            default=self.settings.failed_queue,
            own=getattr(task, "failed_queue", None),
        )

    def check_failed_queues(self) -> None:
        """
        Make sure that no command takes tasks for failed ones.

        Raises:
            ConfigurationError: A failed queue is the one that tasks are sent to.
        """
        default = self.app.conf.task_default_queue
        if default in self.failed_queues():
            raise ConfigurationError(
                f"{default!r} is the app's task_default_queue, and a failed queue cannot "
                "be a queue of tasks too: name another one in resilience_failed_queue, "
                "resilience_failed_routes or the task's failed_queue"
            )

    def check_store(self) -> None:
        """
        Make sure that the store could be opened; nothing is sent to it yet.

        Raises:
            ConfigurationError: A library or a folder is missing.
        """
        if self.store_choice.url is None:
            return
        path = sqlite_path(self.store_choice.url)
        if path is not None and not path.parent.is_dir():
            raise ConfigurationError(
                f"resilience_store_url: there is no folder {path.parent}"
            )
        try:
            self._store("backend").load()
        except MissingExtra as exc:
            raise ConfigurationError(f"resilience_store_url: {exc}") from exc

    def collect_queues(self) -> list[str]:
        """
        The broker's dead-letter queues to collect; a failed queue is collected anyway.

        Raises:
            ConfigurationError: One of them is the queue that tasks are sent to.
        """
        listed = self.settings.collect_queues
        if self.app.conf.task_default_queue in listed:
            raise ConfigurationError(
                f"resilience_collect_queues lists {self.app.conf.task_default_queue!r}, "
                "which is the app's task_default_queue: its tasks would be taken for "
                "failed ones. List the dead-letter queue"
            )
        failed_queues = self.failed_queues()
        return [queue for queue in listed if queue not in failed_queues]

    def failed_store(self) -> Any:
        """The store of failed tasks, or None when the app has none."""
        return self._store("failed")

    def start_store(self) -> Any:
        """The store of starts, or None when the app has none."""
        return self._store("starts")

    def key_store(self) -> Any:
        """The store of idempotency keys, or None when the app has none."""
        return self._store("keys")

    def checkpoint_store(self) -> Any:
        """The store of how far tasks came, or None when the app has none."""
        return self._store("checkpoints") if self.settings.enabled else None

    def circuit_store(self) -> Any:
        """The store of circuits, or None when the app has none."""
        return self._store("circuits")

    def budget_store(self) -> Any:
        """The store of retry budgets, or None when the app has none."""
        return self._store("budgets")

    def shelf_store(self) -> Any:
        """The store of snoozed messages that wait, or None when the app has none."""
        return self._store("shelf")

    def _store(self, room: str) -> Any:
        if self.store_choice.url is None:
            return None
        if not self._stores:
            self._stores = self._open_stores(self.store_choice.url)
        return self._stores[room]

    def _open_stores(self, url: str) -> dict[str, Any]:
        settings = self.settings
        if is_redis(url):
            from celery_resilience.batches.redis_store import RedisCheckpointStore
            from celery_resilience.circuits import redis_store as circuits
            from celery_resilience.crashes.redis_store import RedisStartStore
            from celery_resilience.failed.redis_store import RedisFailedTaskStore
            from celery_resilience.idempotency.redis_store import LIMITS, RedisKeyStore
            from celery_resilience.retries.redis_store import RedisBudgetStore
            from celery_resilience.shelf.redis_store import RedisShelfStore
            from celery_resilience.stores.redis import RedisServer

            tls = self.store_choice.tls
            server = RedisServer(url, settings.namespace, tls=tls)
            quick = RedisServer(url, settings.namespace, tls=tls, **LIMITS)
            hasty = RedisServer(url, settings.namespace, tls=tls, **circuits.LIMITS)
            return {
                "circuits": circuits.RedisCircuitStore(hasty),
                "budgets": RedisBudgetStore(hasty),
                "failed": RedisFailedTaskStore(server),
                "starts": RedisStartStore(server, keep_s=settings.crash_window_s),
                "keys": RedisKeyStore(quick),
                "checkpoints": RedisCheckpointStore(server),
                "shelf": RedisShelfStore(quick),
                "backend": server,
            }
        from celery_resilience.batches.sql_store import SqlCheckpointStore
        from celery_resilience.circuits.sql_store import SqlCircuitStore
        from celery_resilience.crashes.sql_store import SqlStartStore
        from celery_resilience.failed.sql_store import SqlFailedTaskStore
        from celery_resilience.idempotency.sql_store import SqlKeyStore
        from celery_resilience.retries.sql_store import SqlBudgetStore
        from celery_resilience.shelf.sql_store import SqlShelfStore
        from celery_resilience.stores.sql import SqlDatabase

        database = SqlDatabase(url, create_schema=settings.create_schema)
        return {
            "circuits": SqlCircuitStore(database, settings.namespace),
            "budgets": SqlBudgetStore(database, settings.namespace),
            "failed": SqlFailedTaskStore(database, settings.namespace),
            "starts": SqlStartStore(database, settings.namespace),
            "keys": SqlKeyStore(database, settings.namespace),
            "checkpoints": SqlCheckpointStore(database, settings.namespace),
            "shelf": SqlShelfStore(database, settings.namespace),
            "backend": database,
        }

    def schema_sql(self) -> str:
        """
        The statements that make the store's tables.

        Raises:
            ConfigurationError: The app has no store.
        """
        if self.store_choice.url is None:
            raise ConfigurationError(f"there is no store: {self.store_choice.why}")
        if is_redis(self.store_choice.url):
            raise ConfigurationError("the store is in Redis, which has no tables")
        from celery_resilience.batches import sql_store as batches
        from celery_resilience.circuits import sql_store as circuits
        from celery_resilience.crashes import sql_store as crashes
        from celery_resilience.failed import sql_table as failed
        from celery_resilience.idempotency import sql_table as keys
        from celery_resilience.retries import sql_store as retries
        from celery_resilience.shelf import sql_store as shelf
        from celery_resilience.stores.sql import SqlDatabase

        return SqlDatabase(self.store_choice.url).ddl(
            {
                "failed": (failed.VERSION, failed.TABLES),
                "batches": (batches.VERSION, batches.TABLES),
                circuits.ROOM: (circuits.VERSION, circuits.TABLES),
                "crashes": (crashes.VERSION, crashes.TABLES),
                keys.ROOM: (keys.VERSION, keys.TABLES),
                retries.ROOM: (retries.VERSION, retries.TABLES),
                shelf.ROOM: (shelf.VERSION, shelf.TABLES),
            }
        )

    def is_resilient(self, task_name: str) -> bool:
        """Whether the app has a resilient task of that name."""
        return isinstance(self.app.tasks.get(task_name), ResilientTask)


def install(app: Celery) -> Installation:
    """Install into *app*, once; returns what is installed."""
    found: Installation | None = getattr(app, _ATTRIBUTE, None)
    if found is not None:
        return found
    installation = Installation(app)
    setattr(app, _ATTRIBUTE, installation)
    flags.add_worker_flags(app)
    if "celery.bin.base" in sys.modules:
        # `celery inspect` offers only what is registered in its own process.
        import celery_resilience.memory.command  # noqa: F401

    def on_celeryd_init(
        sender: Any = None, instance: Any = None, options: Any = None, **_: Any
    ) -> None:
        if getattr(instance, "app", None) is app:
            installation.flags = {
                name: value
                for name, value in (options or {}).items()
                if name in flags.NAMES and value is not None
            }

    def on_worker_init(sender: Any = None, **_: Any) -> None:
        if sender is not None and sender.app is app:
            from celery_resilience.worker import prepare_worker

            prepare_worker(installation, sender)

    def on_worker_process_init(**_: Any) -> None:
        shared_flags = shared()
        if shared_flags is not None and installation.child is not None:
            from celery_resilience.lifecycle.signals import shield_child

            shield_child(shared_flags)
            if installation.lifecycle is not None:
                installation.lifecycle.forked()
        told = os.environ.get(WORKER_VARIABLE)
        if (
            told
            and shared_flags is None  # a fork has them, whichever app's worker it is of
            and installation.child is None
            and installation.settings.enabled
        ):
            from celery_resilience.worker import prepare_spawned_child

            prepare_spawned_child(installation, json.loads(told))
        if installation.child is not None:
            from celery_resilience._pools import on_child_loop

            on_child_loop(soft_limit.let_handlers_wait)

    uid = f"celery_resilience-{id(app)}"
    signals.celeryd_init.connect(on_celeryd_init, weak=False, dispatch_uid=uid)
    signals.worker_init.connect(on_worker_init, weak=False, dispatch_uid=uid)
    signals.worker_process_init.connect(
        on_worker_process_init, weak=False, dispatch_uid=uid
    )
    return installation


def installed_or_new(app: Celery) -> Installation:
    """What is installed in *app*; or else what would be, and is not."""
    found: Installation | None = getattr(app, _ATTRIBUTE, None)
    return Installation(app) if found is None else found


def installation_of(app: Celery) -> Installation:
    """
    What is installed in *app*.

    Raises:
        ConfigurationError: Nothing is, and no task of it is resilient.
    """
    app.finalize()
    # Tasks are bound, and install, when they are first looked at.
    list(app.tasks.values())
    found: Installation | None = getattr(app, _ATTRIBUTE, None)
    if found is None:
        raise ConfigurationError(
            f"celery-resilience is not installed in the app {app.main!r}: add "
            "Resilience(app), or base=ResilientTask to a task"
        )
    return found


def current_namespace() -> str:
    """
    The namespace of the app whose task runs here, or else of the current app.

    A thread that has no current app has that of the process, where there is just one.

    Raises:
        ConfigurationError: There is no app, or it is not known which; or one of its
            settings is wrong.
    """
    proxy: Any = current_app
    app: Any = current_task.app if current_task else proxy._get_current_object()
    if _celery.is_made_for_asking(app):
        app = _celery.only_app()
    if app is None:
        raise ConfigurationError(
            "no Celery app is known here, whose namespace the key would have: import "
            "the app, call its set_default() where a process has several, for each "
            "thread has a current app of its own, or give namespace="
        )
    return installed_or_new(app).settings.namespace
