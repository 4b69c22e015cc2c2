"""Make Celery fleets survive what happens to every fleet."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__all__ = ["CircuitOpen", "ConfigurationError", "FailedTasks", "Resilience"]
__all__ += ["ResilienceError", "ResilientTask", "Skip", "Snooze", "TaskContext"]
__all__ += ["TaskOptions", "__version__", "add_task_context", "once", "purge_once"]

if TYPE_CHECKING:
    from celery_resilience.circuits.breaker import CircuitOpen
    from celery_resilience.errors import (
        ConfigurationError,
        ResilienceError,
        Skip,
        Snooze,
    )
    from celery_resilience.failed.api import FailedTasks
    from celery_resilience.idempotency.once import once, purge_once
    from celery_resilience.install import Resilience
    from celery_resilience.task import ResilientTask
    from celery_resilience.task_options import TaskOptions
    from celery_resilience.telemetry.binding import TaskContext, add_task_context

    __version__: str
else:
    #: Imported when a name is first used: every `celery` imports this package.
    _MODULES = {"FailedTasks": "failed.api", "CircuitOpen": "circuits.breaker"}
    _MODULES |= {"Resilience": "install", "TaskOptions": "task_options"}
    _MODULES |= {"once": "idempotency.once", "purge_once": "idempotency.once"}
    _MODULES |= {"ResilientTask": "task", "TaskContext": "telemetry.binding"}
    _MODULES["add_task_context"] = "telemetry.binding"

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return version("celery-resilience")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
        return globals().setdefault(name, getattr(module, name))
