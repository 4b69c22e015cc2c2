"""Make Celery fleets survive what happens to every fleet."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from celery_resilience.errors import (
    ConfigurationError,
    ResilienceError,
    Skip,
    Snooze,
)
from celery_resilience.install import Resilience
from celery_resilience.task import ResilientTask

if TYPE_CHECKING:
    from celery_resilience.failed.api import FailedTasks

__all__ = [
    "ConfigurationError",
    "FailedTasks",
    "Resilience",
    "ResilienceError",
    "ResilientTask",
    "Skip",
    "Snooze",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # What only operators and commands use is not paid for by every import.
    if name == "FailedTasks":
        from celery_resilience.failed.api import FailedTasks

        return FailedTasks
    if name == "__version__":
        return version("celery-resilience")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
