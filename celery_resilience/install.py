"""Resilience(app): the only module that knows every room."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from celery import Celery, signals

from celery_resilience.errors import ConfigurationError
from celery_resilience.flags import WORKER_FLAGS, add_worker_flags
from celery_resilience.settings import (
    Settings,
    StoreChoice,
    choose_store,
    read_settings,
)
from celery_resilience.task import ResilientTask

if TYPE_CHECKING:
    from celery_resilience.crashes.task import StartGuard
    from celery_resilience.delivery.facts import FactsChannel
    from celery_resilience.failed.task import ReplayFence

_ATTRIBUTE = "_celery_resilience"


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
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Celery) -> None:
        """Install into *app*; its settings are read when it is finalized."""
        install(app)


class IsEnding(Protocol):
    """Whether an exception ends the process, and is not the task's own."""

    def __call__(self, exc: BaseException) -> bool: ...


@dataclass(frozen=True, slots=True)
class ChildRooms:
    """What surrounds a task body in the process that runs it."""

    fence: ReplayFence
    starts: StartGuard
    facts: FactsChannel
    is_ending: IsEnding


class Installation:
    """
    celery-resilience in one app.

    Attributes:
        app: The Celery app.
        child: What surrounds a body; None outside a worker, or when it is off.
        flags: The worker's flags that were given.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.child: ChildRooms | None = None
        self.flags: dict[str, Any] = {}
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
    def max_crashes(self) -> int:
        """The flag, or the setting."""
        return self.flags.get("max_crashes") or self.settings.max_crashes

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

    def failed_store(self) -> Any:
        """The store of failed tasks, or None when the app has none."""
        return self._store("failed")

    def start_store(self) -> Any:
        """The store of starts, or None when the app has none."""
        return self._store("starts")

    def _store(self, room: str) -> Any:
        if self.store_choice.url is None:
            return None
        if not self._stores:
            from celery_resilience.crashes.sql_store import SqlStartStore
            from celery_resilience.failed.sql_store import SqlFailedTaskStore
            from celery_resilience.stores.sql import SqlDatabase

            database = SqlDatabase(
                self.store_choice.url, create_schema=self.settings.create_schema
            )
            self._stores = {
                "failed": SqlFailedTaskStore(database, self.settings.namespace),
                "starts": SqlStartStore(database, self.settings.namespace),
                "database": database,
            }
        return self._stores[room]

    def schema_sql(self) -> str:
        """
        The statements that make the store's tables.

        Raises:
            ConfigurationError: The app has no store.
        """
        if self.store_choice.url is None:
            raise ConfigurationError(
                f"resilience_store_url is not set: {self.store_choice.why}"
            )
        from celery_resilience.crashes import sql_store as crashes
        from celery_resilience.failed import sql_store as failed
        from celery_resilience.stores.sql import SqlDatabase

        return SqlDatabase(self.store_choice.url).ddl(
            {
                "failed": (failed.VERSION, failed.TABLES),
                "crashes": (crashes.VERSION, crashes.TABLES),
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
    add_worker_flags(app)

    def on_celeryd_init(
        sender: Any = None, instance: Any = None, options: Any = None, **_: Any
    ) -> None:
        if getattr(instance, "app", None) is app:
            installation.flags = {
                name: value
                for name, value in (options or {}).items()
                if name in WORKER_FLAGS and value is not None
            }

    def on_worker_init(sender: Any = None, **_: Any) -> None:
        if sender is not None and sender.app is app:
            from celery_resilience.worker import prepare_worker

            prepare_worker(installation, sender)

    uid = f"celery_resilience-{id(app)}"
    signals.celeryd_init.connect(on_celeryd_init, weak=False, dispatch_uid=uid)
    signals.worker_init.connect(on_worker_init, weak=False, dispatch_uid=uid)
    return installation


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
