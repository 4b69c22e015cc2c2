"""A batch outside of any task: in a script, a management command, a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_resilience.batches.batch import Batch
from celery_resilience.batches.options import (
    CHUNK,
    MAX_ERRORS,
    MIN_ITEMS,
    BatchOptions,
    ErrorTypes,
)
from celery_resilience.batches.surroundings import Surroundings
from celery_resilience.known_words import known_words


@known_words("batch")
def batch(
    name: str,
    *,
    key: Callable[[Any], Any] | str | None = None,
    chunk: int = CHUNK,
    skip: ErrorTypes = (),
    stop: ErrorTypes = (),
    max_errors: int | None = MAX_ERRORS,
    max_error_rate: float | None = None,
    min_items: int = MIN_ITEMS,
    concurrency: int = 1,
    session: Any = None,
    savepoints: bool = True,
) -> Batch:
    """
    A batch that belongs to no task, and begins at the first item.

    Scopes, limits, chunks, threads and the report are those of
    `self.resilience.batch(...)`, whose arguments it has.

    Raises:
        ConfigurationError: An option is wrong.
    """
    options = BatchOptions(
        name=name,
        key=key,
        chunk=chunk,
        skip=skip,  # type: ignore[arg-type]
        stop=stop,  # type: ignore[arg-type]
        max_errors=max_errors,
        max_error_rate=max_error_rate,
        min_items=min_items,
        concurrency=concurrency,
        session=session,
        savepoints=savepoints,
    )
    return Batch(options, Surroundings())
