"""The run of a task that a batch is in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol
from uuid import NAMESPACE_OID, uuid5

from celery_resilience import _celery_run
from celery_resilience.batches.options import BatchOptions
from celery_resilience.batches.stream import Checkpoint
from celery_resilience.batches.surroundings import Surroundings
from celery_resilience.batches.tally import BatchReport
from celery_resilience.errors import CONTROL_FLOW, CircuitIsOpen
from celery_resilience.events import emit
from celery_resilience.message import id_text
from celery_resilience.redaction import safe_text, show_arguments

logger = logging.getLogger("celery_resilience.batches")

#: Seconds from one state of progress in the result backend to the next, at least.
PROGRESS_EVERY_S = 1.0

#: The state of a task whose batch goes on.
PROGRESS = "PROGRESS"


class KeepsItem(Protocol):
    """Makes a failed task of an item."""

    def __call__(
        self, signature: Any, exc: BaseException, *, task_id: str, request: Any
    ) -> Callable[[], object]:
        """
        Make it at once, and store it when what this returns is called.

        Args:
            signature: What its replay runs.
            exc: Why the item failed.
            task_id: Of the failed task.
            request: Of the run that the batch is in.
        """
        ...


class BatchRun:
    """
    What a batch may ask of its run.

    Args:
        task: Whose run it is.
        request: Of the run.
        options: The batch's.
        keep: Makes failed tasks of items.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        task: Any,
        request: Any,
        options: BatchOptions,
        *,
        keep: KeepsItem,
        clock: Callable[[], float],
    ) -> None:
        self._task = task
        self._request = request
        self._options = options
        self._keep = keep
        self._clock = clock
        self._next_progress_at: float | None = None
        self._about = {
            "task": task.name,
            "task_id": id_text(request.id),
            "batch": options.name,
        }

    def surroundings(
        self, checkpoint: Checkpoint, is_stopping: Callable[[], bool]
    ) -> Surroundings:
        """All of it."""
        return Surroundings(
            checkpoint=checkpoint,
            is_stopping=is_stopping,
            progressed=self._progressed,
            ended=self._ended,
            secrets=self._secrets_of,
            keep=None if self._options.keep_failed is None else self._kept,
            in_thread=self._in_thread,
            at_thread_end=close_connections,
        )

    def _progressed(self, report: BatchReport, total: int | None) -> None:
        facts = {**_counts(report), "total": total}
        emit("batches.progressed", **self._about, **facts)
        now = self._clock()
        if self._next_progress_at is None:
            self._next_progress_at = now
            if not _celery_run.stores_result(self._task, self._request):
                self._next_progress_at = float("inf")
        if now < self._next_progress_at:
            return
        self._next_progress_at = now + PROGRESS_EVERY_S
        try:
            meta = {"name": self._options.name, **facts}
            self._task.update_state(task_id=self._request.id, state=PROGRESS, meta=meta)
        except Exception as exc:
            self._next_progress_at = float("inf")
            logger.warning(
                "batch %s of task %s: its progress is not told any more: %s",
                self._options.name,
                self._about["task_id"],
                safe_text(exc),
            )

    def _ended(self, report: BatchReport, exc: BaseException | None) -> None:
        end = "completed" if exc is None else "failed"
        if isinstance(exc, (*CONTROL_FLOW, CircuitIsOpen)):
            end = "interrupted"
        counts = _counts(report)
        emit("batches.ended", **self._about, **counts, end=end)
        logger.info(
            "task %s[%s] batch %s %s: %d ok, %d skipped, %d failed",
            *self._about.values(),
            end,
            *counts.values(),
        )

    @cached_property
    def _secrets(self) -> Sequence[str]:
        """Of the task's arguments."""
        return show_arguments(
            self._request.args,
            self._request.kwargs,
            parameters=self._task.parameter_names,
            hidden=self._task.hidden_names,
        ).secrets

    def _secrets_of(self, item: Any) -> Sequence[str]:
        fields = item if isinstance(item, Mapping) else getattr(item, "__dict__", {})
        shown = show_arguments((), fields, hidden=self._task.hidden_names)
        return (*self._secrets, *shown.secrets)

    def _kept(self, key: Any, exc: BaseException) -> Callable[[], object]:
        assert self._options.keep_failed is not None
        parts = (self._about["task_id"], self._options.name, str(key))
        return self._keep(
            self._options.keep_failed(key),
            exc,
            # The same where the chunk is done again: one item is one failed task.
            task_id=str(uuid5(NAMESPACE_OID, "\0".join(parts))),
            request=self._request,
        )

    def _in_thread(self, call: Callable[[], Any]) -> Callable[[], Any]:
        stack, request = self._task.request_stack, self._request

        def called() -> Any:
            stack.push(request)
            try:
                return call()
            finally:
                stack.pop()

        return called


def _counts(report: BatchReport) -> dict[str, int]:
    return {
        "ok": report["ok"],
        "skipped": report["skipped"],
        "failed": report["failed"],
    }


def close_connections() -> None:
    """A thread ends: close what Django has opened for it."""
    if "django.db" in sys.modules:
        from celery_resilience.batches import django_source

        django_source.close_connections()
