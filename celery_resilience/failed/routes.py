"""Which failed queue a failure goes to. Policy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from celery_resilience.outcome import Reason

#: Reasons that are kept only where a route names them.
ON_REQUEST = frozenset({Reason.EXPIRED, Reason.REVOKED})

Routes = Sequence[tuple[str, str | None]]


def failed_queue_for(
    *,
    task: str,
    exception: str,
    reason: str,
    routes: Routes,
    default: str,
    own: str | bool | None = None,
) -> str | None:
    """
    The failed queue of one failure; None: it is not kept.

    Args:
        task: The task's name.
        exception: Qualified name of the exception.
        reason: Why the delivery failed.
        routes: Pairs of task glob, exception name or reason, and queue.
        default: The queue when no route matches.
        own: The task's `failed_queue` option, which beats the routes.
    """
    if own is False:
        return None
    if reason in ON_REQUEST:
        return next((queue for pattern, queue in routes if pattern == reason), None)
    if isinstance(own, str):
        return own
    for pattern, queue in routes:
        if (
            pattern == reason
            or fnmatchcase(task, pattern)
            or fnmatchcase(exception, pattern)
            or pattern == exception.rpartition(".")[2]
        ):
            return queue
    return default


def failed_queues(
    *, routes: Routes, default: str, own: Iterable[str | bool | None]
) -> list[str]:
    """Every failed queue of an app, the default first."""
    queues = [default]
    queues += [queue for _, queue in routes if queue]
    queues += sorted({queue for queue in own if isinstance(queue, str)})
    return list(dict.fromkeys(queues))
