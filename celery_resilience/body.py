"""Whether a resilient task's body runs here, for code that knows no task."""

from __future__ import annotations

from contextvars import ContextVar

#: Set around a body whose task says itself what becomes of an open circuit. Celery's own
#: `current_task` takes longer than a refused call may.
HEARS_OF_CIRCUITS: ContextVar[bool] = ContextVar("hears_of_circuits", default=False)
