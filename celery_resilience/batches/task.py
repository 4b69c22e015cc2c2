"""Streams and batches of the task that runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from celery.exceptions import Retry

from celery_resilience.batches.batch import Batch
from celery_resilience.batches.options import BatchOptions
from celery_resilience.batches.running import BatchRun, KeepsItem
from celery_resilience.batches.sources import source_of
from celery_resilience.batches.store import CheckpointStore
from celery_resilience.batches.stream import (
    Checkpoint,
    NoCheckpoint,
    StoredCheckpoint,
    stream,
)
from celery_resilience.batches.surroundings import Surroundings
from celery_resilience.errors import (
    ConfigurationError,
    ResilienceError,
    Skip,
)
from celery_resilience.message import id_text
from celery_resilience.run_view import RUN_FACTS

logger = logging.getLogger("celery_resilience.batches")

#: Where a request remembers how many streams its run has.
STREAMS = "_resilience_streams"

#: Where it remembers its batches, by their names.
BATCHES = "_resilience_batches"

#: The fact by which the main process counts the items of a run's batches.
BATCH_FACT = "batch"

#: The metric of these items, and what they may have come to.
METRIC = "batch_items"
OUTCOMES = ("ok", "skipped", "failed")

#: Rows of a page, unless it is said.
SIZE = 1_000


class Streams:
    """
    The streams and batches of an app's tasks, in one process of a worker.

    Args:
        store: Gives the store of places, None where the app has none.
        is_stopping: Whether the worker is about to end.
        task_of: The task of a name.
        keep: Makes failed tasks of items.
        count: Counts so many more of a metric of the run, with labels.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        store: Callable[[], CheckpointStore | None],
        is_stopping: Callable[[], bool],
        *,
        task_of: Callable[[str], Any],
        keep: KeepsItem,
        count: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._store = store
        self._is_stopping = is_stopping
        self._task_of = task_of
        self._keep = keep
        self._clock = clock

    def rows(
        self,
        request: Any,
        source: Any,
        *,
        key: str,
        size: int,
        name: str | None,
        session: Any,
    ) -> Iterator[Any]:
        """
        The rows of *source* that no earlier run of this task has done.

        Outside of a worker: all of them.
        """
        checkpoint: Checkpoint = NoCheckpoint()
        is_stopping = never
        if _is_in_worker(request):
            number = vars(request).get(STREAMS, 0) + 1
            vars(request)[STREAMS] = number
            checkpoint = self._checkpoint(
                request,
                checked_name(str(number) if name is None else name),
                "stream",
            )
            is_stopping = self._is_stopping
        return stream(
            source_of(source, key=key, session=session),
            checkpoint,
            size=checked_size(size),
            is_stopping=is_stopping,
        )

    def batch(self, request: Any, **words: Any) -> Batch:
        """
        Begin a batch of the run of *request*; outside of a worker, one that begins anew.

        Args:
            words: The fields of `BatchOptions`.

        Raises:
            ConfigurationError: One is wrong, or the run had a batch of that name.
        """
        options = BatchOptions(**words)
        if not _is_in_worker(request):
            return Batch(options, Surroundings())
        batches = vars(request).setdefault(BATCHES, {})
        if options.name in batches:
            raise ConfigurationError(
                f"batch {options.name!r}: this run had one of that name, and their "
                "places would be one: give another name"
            )
        run = BatchRun(
            self._task_of(request.task),
            request,
            options,
            keep=self._keep,
            clock=self._clock,
        )
        checkpoint = self._checkpoint(request, f"batch:{options.name}", "batch")
        # What would begin anew elsewhere is better ended here.
        is_lost = isinstance(checkpoint, NoCheckpoint)
        is_stopping = never if is_lost else self._is_stopping
        made = Batch(options, run.surroundings(checkpoint, is_stopping))
        batches[options.name] = made
        return made

    def _checkpoint(self, request: Any, name: str, what: str) -> Checkpoint:
        store = self._store()
        if store is not None:
            return StoredCheckpoint(store, id_text(request.id), name, what)
        logger.warning(
            "there is no store: a %s of %s begins anew in each run", what, request.task
        )
        return NoCheckpoint()

    def before(self, task: Any, request: Any) -> None:
        """Nothing: a stream says when it begins."""

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """What has ended well needs its places no longer than its redeliveries."""
        said = vars(request)
        if isinstance(exc, Skip):
            exc = None
        goes_on = isinstance(exc, Retry) or getattr(exc, "requeue", False)
        if BATCHES in said and not goes_on:
            told = [batch.untold(exc) for batch in said[BATCHES].values()]
            said.setdefault(RUN_FACTS, {})[BATCH_FACT] = told
            for counts in told:
                for outcome in OUTCOMES:
                    labels = {"batch": counts["name"], "outcome": outcome}
                    try:
                        self._count(request, METRIC, counts[outcome], **labels)
                    except ConfigurationError as error:
                        # Nobody is shown it where `resilience_redact` lists a label.
                        logger.warning("%s: %s", task.name, error)
        if exc is None and (STREAMS in said or BATCHES in said):
            store = self._store()
            try:
                if store is not None:
                    store.finished(id_text(request.id))
            except ResilienceError as error:
                logger.warning("%s: %s", task.name, error)


def _is_in_worker(request: Any) -> bool:
    return request is not None and not (request.is_eager or request.called_directly)


def never() -> bool:
    """No worker stops here."""
    return False


def checked_size(size: Any) -> int:
    """
    The rows of a page.

    Raises:
        ValueError: It is no whole number from 1.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"stream: size must be a whole number from 1, got {size!r}")
    return size


def checked_name(name: Any) -> str:
    """
    The name of a stream.

    Raises:
        ValueError: It is no text of 1 to 64 characters.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= 64:
        raise ValueError(f"stream: name must be 1 to 64 characters, got {name!r}")
    return name
