"""One run of a body, and what it has taken so far: sessions, connections, resources."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any


class Run:
    """
    What one run has taken.

    Attributes:
        name: The task's; "" before its body begins.
        task_id: Of the run.
        libraries: What each library has noted of this run, by its name; empty for a
            run that has used none.
        resources: What it has opened, with how each is closed, the last one last.
        is_running: Its body has not ended.
    """

    __slots__ = ("is_running", "libraries", "name", "resources", "task_id")

    def __init__(self, name: str = "", task_id: Any = None) -> None:
        self.libraries: dict[str, Any] = {}
        self.resources: list[tuple[Any, Any]] = []
        self.begin(name, task_id)

    def begin(self, name: str, task_id: Any) -> None:
        """Its body begins."""
        self.name = name
        self.task_id = task_id
        self.is_running = bool(name)


#: The run of this thread, greenlet or asynchronous task; until the next one begins.
current: ContextVar[Run | None] = ContextVar("celery_resilience_run", default=None)
