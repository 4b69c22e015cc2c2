"""Undocumented names of Celery's that the run of a task needs; as in `_celery`.

A process that only sends imports no result backend for them.
"""

from __future__ import annotations

from typing import Any

from celery.backends.base import DisabledBackend


def stores_result(task: Any, request: Any) -> bool:
    """Whether the result backend stores what this run returns."""
    ignores = request.ignore_result
    if ignores is None:
        ignores = task.ignore_result
    return not ignores and not isinstance(task.backend, DisabledBackend)


def let_canvas_go(request: Any) -> None:
    """
    Send nothing of what follows *request* in its canvas: that has been done.

    The tracer reads these after the body (``app/trace.py``, Celery 5.7).
    """
    request.callbacks = request.chain = request.chord = None
