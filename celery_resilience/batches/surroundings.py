"""What a batch asks of the run that it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_resilience.batches.stream import Checkpoint, NoCheckpoint
from celery_resilience.batches.tally import BatchReport


def _nothing(*_: Any) -> None:
    """Nobody asks."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """
    What a batch asks of the run that it is in; as it is here, of none.

    Attributes:
        checkpoint: Where the batch stands.
        is_stopping: Whether the run should end after the present item.
        progressed: Told of each committed chunk: report, and number of items or None.
        ended: Told of how the batch ended: report, and what raised.
        secrets: What must not be shown of an item, and of the task.
        keep: Makes a failed task of an item that failed, from its key and exception, at
            once; what it returns stores it, and may raise that the broker is away.
        in_thread: Lets a call in another thread be one of the run.
        at_thread_end: Called in each of those threads as it ends.
    """

    checkpoint: Checkpoint = field(default_factory=NoCheckpoint)
    is_stopping: Callable[[], bool] = bool
    progressed: Callable[[BatchReport, int | None], object] = _nothing
    ended: Callable[[BatchReport, BaseException | None], object] = _nothing
    secrets: Callable[[Any], Sequence[str]] = lambda item: ()
    keep: Callable[[Any, BaseException], Callable[[], object]] | None = None
    in_thread: Callable[[Callable[[], Any]], Callable[[], Any]] = lambda call: call
    at_thread_end: Callable[[], object] = _nothing
