"""Make Celery fleets survive what happens to every fleet."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__all__ = ["CircuitOpen", "ConfigurationError", "FailedTasks", "Never", "On"]
__all__ += ["Resilience", "ResilienceError", "ResilientTask", "Skip", "Snooze"]
__all__ += ["TaskContext", "TaskOptions", "TooManyErrors", "__version__"]
__all__ += ["add_task_context", "batch", "once", "purge_once"]

if TYPE_CHECKING:
    from celery_resilience.batches.plain import batch
    from celery_resilience.circuits.breaker import CircuitOpen
    from celery_resilience.errors import (
        ConfigurationError,
        ResilienceError,
        Skip,
        Snooze,
        TooManyErrors,
    )
    from celery_resilience.failed.api import FailedTasks
    from celery_resilience.idempotency.once import once, purge_once
    from celery_resilience.install import Resilience
    from celery_resilience.retries.rules import Never, On
    from celery_resilience.task import ResilientTask
    from celery_resilience.task_options import TaskOptions
    from celery_resilience.telemetry.binding import TaskContext, add_task_context

    __version__: str
else:
    #: Imported when a name is first used: every `celery` imports this package.
    _MODULES = dict.fromkeys(("TaskContext", "add_task_context"), "telemetry.binding")
    _MODULES |= dict.fromkeys(("once", "purge_once"), "idempotency.once")
    _MODULES |= dict.fromkeys(("Never", "On"), "retries.rules")
    _MODULES |= {"FailedTasks": "failed.api", "CircuitOpen": "circuits.breaker"}
    _MODULES |= {"Resilience": "install", "TaskOptions": "task_options"}
    _MODULES |= {"ResilientTask": "task", "batch": "batches.plain"}

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return version("celery-resilience")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
        return globals().setdefault(name, getattr(module, name))
