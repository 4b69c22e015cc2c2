"""Which resilient task's body runs here, for code that knows no task."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

#: Set around a body whose task says itself what becomes of an open circuit. Celery's own
#: `current_task` takes longer than a refused call may.
HEARS_OF_CIRCUITS: ContextVar[bool] = ContextVar("hears_of_circuits", default=False)

#: The task whose body runs here, and its request; None where none does. Threads that have
#: the context of the one that runs a task, as those of `asyncio.to_thread`, have it too.
RUNNING: ContextVar[tuple[Any, Any] | None] = ContextVar("running", default=None)
