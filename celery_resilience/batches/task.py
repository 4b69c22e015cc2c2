"""Streams of the task that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from celery_resilience.batches.sources import source_of
from celery_resilience.batches.store import CheckpointStore
from celery_resilience.batches.stream import (
    Checkpoint,
    NoCheckpoint,
    StoredCheckpoint,
    stream,
)
from celery_resilience.errors import ResilienceError
from celery_resilience.message import id_text

logger = logging.getLogger("celery_resilience.batches")

#: Where a request remembers how many streams its run has.
STREAMS = "_resilience_streams"

#: Rows of a page, unless it is said.
SIZE = 1_000


class Streams:
    """
    The streams of an app's tasks, in one process of a worker.

    Args:
        store: Gives the store of places, None where the app has none.
        is_stopping: Whether the worker is about to end.
    """

    def __init__(
        self,
        store: Callable[[], CheckpointStore | None],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._store = store
        self._is_stopping = is_stopping

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
        if request is not None and not (request.is_eager or request.called_directly):
            number = vars(request).get(STREAMS, 0) + 1
            vars(request)[STREAMS] = number
            checkpoint = self._checkpoint(
                request, checked_name(str(number) if name is None else name)
            )
            is_stopping = self._is_stopping
        return stream(
            source_of(source, key=key, session=session),
            checkpoint,
            size=checked_size(size),
            is_stopping=is_stopping,
        )

    def _checkpoint(self, request: Any, name: str) -> Checkpoint:
        store = self._store()
        if store is not None:
            return StoredCheckpoint(store, id_text(request.id), name)
        logger.warning(
            "there is no store: a stream of %s begins anew in each run", request.task
        )
        return NoCheckpoint()

    def before(self, task: Any, request: Any) -> None:
        """Nothing: a stream says when it begins."""

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """What has ended well needs its places no longer than its redeliveries."""
        if exc is None and STREAMS in vars(request):
            store = self._store()
            try:
                if store is not None:
                    store.finished(id_text(request.id))
            except ResilienceError as error:
                logger.warning("%s: %s", task.name, error)


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
