"""What a duplicate asks the app's result backend."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("celery_resilience.idempotency")

#: Celery's words for how a task has ended.
SUCCEEDED = "SUCCESS"
ENDED_OTHERWISE = ("FAILURE", "REVOKED")


class ResultBackend:
    """
    Celery's result backend, asked for what another delivery has stored.

    Args:
        task: Whose it is.
    """

    def __init__(self, task: Any) -> None:
        self._task = task

    def result_of(self, task_id: str) -> tuple[str | None, Any]:
        """The state that is stored of a task, None if unknown, and its result."""
        try:
            meta = self._task.backend.get_task_meta(task_id, cache=False)
        except Exception as exc:
            # Disabled, away, or of results that are not accepted.
            logger.info("the result of %s is not known: %s", task_id, exc)
            return None, None
        return meta.get("status"), meta.get("result")
