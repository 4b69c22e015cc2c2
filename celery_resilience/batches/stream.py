"""Rows one by one, and where to go on after each page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from celery_resilience.batches.sources import Source
from celery_resilience.batches.store import CheckpointStore
from celery_resilience.errors import Snooze, StoreUnavailable
from celery_resilience.serialization import deserialized, serialized
from celery_resilience.soft_limit import soft_limit_deferred

logger = logging.getLogger("celery_resilience.batches")

#: Seconds after which a run looks again whether the store is there.
LOOK_AGAIN_S = 10.0


class Checkpoint(Protocol):
    """Where one stream of one task stands."""

    def load(self) -> Any:
        """The place to go on after; None: the start."""
        ...

    def save(self, place: Any) -> None:
        """All before *place* is done."""
        ...


class NoCheckpoint:
    """Each run begins at the start."""

    def load(self) -> Any:
        """The start."""
        return None

    def save(self, place: Any) -> None:
        """It is forgotten."""


class StoredCheckpoint:
    """
    A place in the store.

    Args:
        store: Where it is.
        task_id: Whose it is, in each of its runs.
        name: Of the stream, at most 64 characters.
        what: What it is of.
    """

    def __init__(
        self, store: CheckpointStore, task_id: str, name: str, what: str = "stream"
    ) -> None:
        self._store = store
        self._task_id = task_id
        self._name = name
        self._what = what

    def load(self) -> Any:
        """
        The place to go on after; None: the start.

        Raises:
            Snooze: The store is away, so that nobody knows.
        """
        try:
            data = self._store.load(self._task_id, self._name)
        except StoreUnavailable as exc:
            raise Snooze(LOOK_AGAIN_S, f"the place of a {self._what}: {exc}") from exc
        if data is None:
            return None
        logger.info(
            "task %s goes on with its %s %s where an earlier run stopped",
            self._task_id,
            self._what,
            self._name,
        )
        return deserialized("application/json", "utf-8", data, accept=["json"])

    def save(self, place: Any) -> None:
        """All before *place* is done; if the store is away, it is done again."""
        try:
            self._store.save(self._task_id, self._name, serialized(place, "json")[2])
        except StoreUnavailable as exc:
            logger.warning(
                "task %s: where its %s %s stands could not be saved: %s",
                self._task_id,
                self._what,
                self._name,
                exc,
            )


def stream(
    source: Source,
    checkpoint: Checkpoint,
    *,
    size: int,
    is_stopping: Callable[[], bool],
) -> Iterator[Any]:
    """
    The rows of *source* after its checkpoint.

    A page is committed and its place saved when the row after it is asked for: all of
    it has been done by then.

    Args:
        source: What is read.
        checkpoint: Where to start, and what is told how far it came.
        size: Rows of a page, of which two are in memory at most.
        is_stopping: Whether the run should end between two pages.

    Raises:
        Snooze: The rest is another run's, or the store is away at the start.
    """
    place = checkpoint.load()
    while True:
        page = source.page(place, size)
        if not page.rows:
            return
        yield from page.rows
        place, is_last = page.place, page.is_last
        del page
        with soft_limit_deferred():
            # Cut off in between, the page would be done again.
            source.commit()
            checkpoint.save(place)
        if is_last:
            return
        if is_stopping():
            raise Snooze(0, "its worker stops: the rest of the stream is another run's")
