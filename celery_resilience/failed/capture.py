"""What a worker's main process stores before a failed delivery is acknowledged."""

from __future__ import annotations

from collections.abc import Callable

from celery_resilience.events import emit
from celery_resilience.failed.envelope import envelope, posted, settled
from celery_resilience.failed.routes import Routes, failed_queue_for
from celery_resilience.message import OriginalMessage, replay_of
from celery_resilience.outcome import Outcome, Settlement

#: Outcomes after which a replayed message will not come back.
FINAL = frozenset({Outcome.SUCCEEDED, Outcome.SKIPPED, Outcome.REVOKED})

#: Outcomes of a redelivery that make an earlier capture of it void.
GOOD = frozenset({Outcome.SUCCEEDED, Outcome.SKIPPED})


#: The reason of a replay's copy that did not run, because another one does or did.
DROPPED_COPY = "replay_duplicate"

#: The reason of a replay whose task put another in its place, which reports the end.
REPLACED = "replaced"


class Capture:
    """
    Turns a settlement into the message that must be stored before its ack.

    Args:
        namespace: The app's.
        default_queue: The failed queue when no route matches.
        routes: See `failed_queue_for`.
        own_queue: A task's `failed_queue` option, by the task's name.
        clock: Wall time, in seconds.
        release: The app's release.
    """

    def __init__(
        self,
        *,
        namespace: str,
        default_queue: str,
        routes: Routes,
        own_queue: Callable[[str], str | bool | None],
        clock: Callable[[], float],
        release: str | None,
    ) -> None:
        self._namespace = namespace
        self._default_queue = default_queue
        self._routes = routes
        self._own_queue = own_queue
        self._clock = clock
        self._release = release

    def message_for(
        self, settlement: Settlement, original: OriginalMessage
    ) -> OriginalMessage | None:
        """What must be stored before the ack: an envelope, a report, or nothing."""
        own = self._own_queue(settlement.task)
        is_replay = bool(replay_of(settlement.marks))
        goes_on = is_replay and settlement.reason == REPLACED
        is_unkept = own is False and not is_replay
        if is_unkept or goes_on or settlement.reason == DROPPED_COPY:
            return None
        failure = settlement.failure
        queue = failed_queue_for(
            task=settlement.task,
            exception=failure.exception if failure is not None else "",
            reason=str(settlement.reason),
            routes=self._routes,
            default=self._default_queue,
            own=own,
        )
        if settlement.outcome is Outcome.FAILED and is_replay:
            # Its record waits for an answer, whatever the routes say today.
            queue = queue or self._default_queue
        if is_replay and settlement.outcome in (*FINAL, Outcome.FAILED):
            emit(
                "failed.replay_ended", task=settlement.task, outcome=settlement.outcome
            )
        if failure is not None and queue is not None:
            emit("failed.kept", task=settlement.task)
            document = envelope(
                settlement,
                original,
                namespace=self._namespace,
                failed_queue=queue,
                at=self._clock(),
                release=self._release,
            )
        elif settlement.outcome in (FINAL if is_replay else GOOD):
            document = settled(
                settlement,
                original,
                namespace=self._namespace,
                failed_queue=queue or self._default_queue,
                at=self._clock(),
            )
        else:
            return None
        return posted(document)
