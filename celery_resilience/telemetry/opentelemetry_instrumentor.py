"""The only user of what contrib's CeleryInstrumentor does not document (0.66b2).

Nothing of it is patched. Where a name is missing, the instrumentor does as it does
without us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

MODULE = "opentelemetry.instrumentation.celery"

#: Where it keeps the spans of a task, by the task's id and whether it is a publish.
_SPANS = "__otel_task_span"


def receiver_of(signal: str) -> Callable[..., Any] | None:
    """
    What the instrumentor has connected to one of Celery's signals; None: nothing.

    Args:
        signal: "task_failure" or "task_retry".
    """
    kind = getattr(sys.modules.get(MODULE), "CeleryInstrumentor", None)
    name = {"task_failure": "_trace_failure", "task_retry": "_trace_retry"}[signal]
    found = getattr(kind, name, None)
    return found if callable(found) else None


def open_publishes(task: Any) -> Iterator[tuple[Any, Callable[[], None]]]:
    """
    The spans of publishes of *task* that have not ended, and what ends each.

    It ends them at Celery's `after_task_publish`, which is not sent where the publish
    has failed. The latest comes first.
    """
    kept = getattr(task, _SPANS, None)
    if not isinstance(kept, dict):
        return
    for key in reversed(list(kept)):
        parts = kept.get(key)
        if isinstance(key, tuple) and key[-1] is True and isinstance(parts, tuple):
            span, activation = parts[:2]

            def close(key: Any = key, activation: Any = activation) -> None:
                kept.pop(key, None)
                activation.__exit__(None, None, None)

            yield span, close
