"""What an app knows of its own tasks and queues, for reading dead letters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from celery_resilience.task import ResilientTask, parameters_of

logger = logging.getLogger("celery_resilience.failed")


class AppKnowledge:
    """
    `KnownApp` of a Celery app.

    Args:
        app: The Celery app.
        redact: Names that are hidden in every task.
    """

    def __init__(self, app: Any, redact: Sequence[str]) -> None:
        self._app = app
        self._redact = redact

    def names_of(self, task: str) -> tuple[Sequence[str], Sequence[str]] | None:
        """A task's positional parameters, and the hidden ones; None: not known."""
        known = self._app.tasks.get(task)
        if known is None:
            return None
        if isinstance(known, ResilientTask):
            return known.parameter_names, known.hidden_names
        return parameters_of(known.run), self._redact

    def bound_queue(self, exchange: str, routing_key: str) -> str | None:
        """The queue that the app binds to *exchange* with *routing_key*."""
        for name, queue in self._app.amqp.queues.items():
            if queue.exchange.name == exchange and queue.routing_key == routing_key:
                return str(name)
        return None

    def home_of(self, task: str) -> str:
        """The queue that the app sends a task to."""
        default = str(self._app.conf.task_default_queue)
        try:
            queue = self._app.amqp.router.route({}, task).get("queue")
        except Exception as exc:  # a router is the user's code
            logger.warning("no route for %s: %s", task, type(exc).__name__)
            return default
        return str(getattr(queue, "name", None) or default)

    def delivery_limit_of(self, queue: str) -> int | None:
        """The delivery limit with which the app declares a queue."""
        declared = dict(self._app.amqp.queues).get(queue)
        arguments = getattr(declared, "queue_arguments", None) or {}
        limit = arguments.get("x-delivery-limit")
        return limit if isinstance(limit, int) else None
