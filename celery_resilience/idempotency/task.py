"""A run that has its key says after its body what the key came to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from celery.exceptions import Retry

from celery_resilience.errors import DropDelivery, Skip, Snooze
from celery_resilience.idempotency.duplicates import FIRST_LOOK_S, LEASE_LOST
from celery_resilience.idempotency.heartbeat import lease_lost
from celery_resilience.idempotency.record import Claim, KeyState
from celery_resilience.idempotency.results import HANDED_OVER, pack

if TYPE_CHECKING:
    from celery_resilience.idempotency.guard import KeyGuard

#: Seconds after its due time for which a retry's key is kept for it, in the queue.
RETRY_GRACE_S = 3_600.0


class KeyedRun:
    """
    A run that has its key.

    Once another run has it, whatever this one comes to counts no more: what says so
    here raises Snooze where the other is another task's, whose result will be this
    one's too, and DropDelivery where it is another delivery of this very message.

    Attributes:
        claim: What it took.
        epoch: The fencing number; 0 where the store was away and the task runs
            without its key.
    """

    __slots__ = ("_guard", "_has_ended", "_stores_result", "claim", "epoch")

    def __init__(
        self, guard: KeyGuard, claim: Claim, epoch: int, *, stores_result: bool
    ) -> None:
        self._guard = guard
        self._has_ended = False
        self._stores_result = stores_result
        self.claim = claim
        self.epoch = epoch

    def ended_by(self, exc: BaseException, *, is_ending: bool) -> None:
        """
        The body ended in an exception.

        Args:
            is_ending: It ends the process, and is not the task's own.
        """
        if is_ending:
            self.abandoned()
        elif isinstance(exc, Skip):
            self.done(exc.result)
        elif isinstance(exc, Snooze):
            self.retrying(exc.countdown_s)
        elif isinstance(exc, Retry):
            self.retrying(0.0)
        else:
            self.failed()

    def done(self, result: Any) -> None:
        """The effect has happened."""
        if self._has_ended or not self.epoch:
            return
        data = pack(result, self._guard.serializer, has_backend=self._stores_result)
        self._end(KeyState.DONE, data)

    def failed(self) -> None:
        """The body ended in an error; another run may begin."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.FAILED)

    def interrupted(self) -> None:
        """Nobody knows whether the effect has happened."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.INTERRUPTED)

    def retrying(self, countdown_s: float) -> None:
        """The same task will come again; said before its message is published."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.RETRYING, until_s=max(countdown_s, 0.0) + RETRY_GRACE_S)

    def handed_over(self) -> None:
        """Another task goes on under this one's id, and will store its result."""
        if not self._has_ended and self.epoch:
            self._end(KeyState.DONE, HANDED_OVER)

    def still_runs(self) -> None:
        """The message of a retry could not be published."""
        self._has_ended = False

    def abandoned(self) -> None:
        """The process ends: the lease lapses."""
        self._guard.heartbeat.remove(self.claim)
        self._has_ended = True

    def _end(
        self, state: KeyState, result: bytes | None = None, until_s: float = 0.0
    ) -> None:
        self._has_ended = True
        self._guard.heartbeat.remove(self.claim)
        owner = self._guard.finish(self.claim, state, result, until_s)
        if owner is None:
            return
        lease_lost(self.claim)
        if owner == self.claim.owner:
            raise DropDelivery(LEASE_LOST)
        raise Snooze(FIRST_LOOK_S, LEASE_LOST)


@contextlib.contextmanager
def retrying(run: KeyedRun, countdown: Any, eta: Any) -> Iterator[None]:
    """
    Publish the message with which a run's own task comes again.

    Its key is handed over first: the message may be delivered at once.
    """
    run.retrying(seconds_until(countdown, eta, default_s=0.0))
    try:
        yield
    except BaseException:
        run.still_runs()
        raise


def seconds_until(countdown: Any, eta: Any, default_s: float) -> float:
    """Seconds until a retry is due, as Celery was told."""
    if isinstance(eta, datetime):
        at = eta if eta.tzinfo is not None else eta.replace(tzinfo=UTC)
        return (at - datetime.now(UTC)).total_seconds()
    if isinstance(countdown, int | float):
        return float(countdown)
    return default_s
