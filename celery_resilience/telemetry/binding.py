"""Which task a line of the log belongs to: bound to every line written inside one.

Hardly anything is done for a task; a line asks which one runs where it is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

from celery_resilience._celery import running
from celery_resilience.body import RUNNING
from celery_resilience.message import id_text
from celery_resilience.trace_ids import trace_id_of

#: What is bound, by the names that it has on a record. Celery calls the first two so.
NAMES = ("task_id", "task_name", "root_id", "parent_id", "attempt", "trace_id")

#: Where a request remembers what is bound to its lines.
BOUND = "_resilience_bound"

#: Where a request remembers a trace that is not its message's.
TRACE = "_resilience_trace_id"

_NOTHING: dict[str, Any] = {}


def bound_here() -> dict[str, Any]:
    """
    What is bound to a line that is written here and now; {} outside of a task.

    A resilient task that is applied within another one has its own; what is called as a
    function belongs to its caller.
    """
    # Celery knows too, also around a body and of plain tasks, but takes microseconds.
    here = RUNNING.get() or running()
    if here is None:
        return _NOTHING
    task, request = here
    found: dict[str, Any] | None = request.__dict__.get(BOUND)
    if found is None:
        found = request.__dict__[BOUND] = _bound_to(request, task.name)
    return found


def _bound_to(request: Any, name: str) -> dict[str, Any]:
    task_id = id_text(request.id) or None
    return {
        "task_id": task_id,
        "task_name": name,
        "root_id": id_text(request.root_id) or task_id,
        "parent_id": id_text(request.parent_id) or None,
        "attempt": (request.retries or 0) + 1,
        "trace_id": request.__dict__.get(TRACE) or trace_id_of(request.__dict__),
    }


def bind_trace_id(request: Any, trace_id: str) -> None:
    """The lines of a run belong to this trace, and not to that of its message."""
    vars(request)[TRACE] = trace_id
    vars(request).pop(BOUND, None)


class TaskContext(logging.Filter):
    """
    Binds the running task to each record of a handler, and lets every record pass.

    A record written inside a task gets the attributes `task_id`, `task_name`, `root_id`,
    `parent_id`, `attempt` and `trace_id`; those that it has already stay. A worker puts
    one on every handler that there is when it starts; a handler that is made later, and a
    format that names an attribute, want one of their own.

    Args:
        missing: What the attributes are outside of a task; None: they are not set.
    """

    def __init__(self, missing: str | None = None) -> None:
        super().__init__()
        self._outside = {} if missing is None else dict.fromkeys(NAMES, missing)

    def filter(self, record: logging.LogRecord) -> bool:
        """Bind the running task; always True."""
        attributes = record.__dict__
        found = bound_here() or self._outside
        if attributes.keys().isdisjoint(found):
            attributes.update(found)
        else:
            # An app's own stay.
            attributes.update({**found, **attributes})
        return True


def add_task_context(
    logger: Any, method_name: str, event_dict: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Bind the running task to an event of structlog's: one of its processors."""
    for name, value in bound_here().items():
        event_dict.setdefault(name, value)
    return event_dict


def handlers() -> Iterator[logging.Handler]:
    """Every handler of every logger, each once."""
    known = list(logging.root.manager.loggerDict.values())
    loggers = [logging.root, *(it for it in known if isinstance(it, logging.Logger))]
    yield from dict.fromkeys(h for logger in loggers for h in logger.handlers)


def bind_handlers() -> None:
    """Give every handler that has none a filter that binds the running task."""
    for handler in handlers():
        if not any(isinstance(it, TaskContext) for it in handler.filters):
            # The first, for the user's own may look at what is bound.
            handler.filters.insert(0, TaskContext())
