"""Whether a resilient task's body runs here, for code that knows no task."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

#: Set around a body whose task says itself what becomes of an open circuit. Celery's own
#: `current_task` takes longer than a refused call may.
HEARS_OF_CIRCUITS: ContextVar[bool] = ContextVar("hears_of_circuits", default=False)

#: The request whose body runs here, for threads that have no `current_task` of Celery's
#: and have the context of the one that runs the task, as those of `asyncio.to_thread`.
RUNNING: ContextVar[Any] = ContextVar("running", default=None)
