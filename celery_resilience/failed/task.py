"""The worker's child asks before it runs a replayed message, or one beside a replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from celery_resilience.deadline import TASK_WAITS_S, answer_within
from celery_resilience.errors import DropDelivery, ResilienceError, SendAgain
from celery_resilience.failed.capture import DROPPED_COPY
from celery_resilience.failed.envelope import task_record_id
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.record import State
from celery_resilience.failed.store import FailedTaskStore

logger = logging.getLogger("celery_resilience.failed")

#: Seconds until a replayed message asks again when the store did not answer.
RETRY_S = 30.0


class ReplayFence:
    """
    Lets one copy of a replay run.

    Args:
        store: The store of this process, or None when the app has none; called
            at each use, because a process opens its own.
        namespace: The app's.
        clock: Wall time, in seconds.
        redelivered_within_s: How long after its failure was captured a message may
            still be delivered again.
    """

    def __init__(
        self,
        store: Callable[[], FailedTaskStore | None],
        *,
        namespace: str,
        clock: Callable[[], float],
        redelivered_within_s: float,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._clock = clock
        self._redelivered_within_s = redelivered_within_s

    def before(self, marks: Mapping[str, Any]) -> None:
        """
        Ask for leave to run a replayed message.

        Args:
            marks: Ours on the message, with a "replay".

        Raises:
            DropDelivery: Another copy runs or ran, or the replay was called off.
            SendAgain: The store did not answer, or cannot be used.
        """
        replay = marks["replay"]
        try:
            store = self._store()
            if store is None:
                logger.warning("a replay runs unfenced: this worker has no store")
                return
            may_run = answer_within(
                TASK_WAITS_S,
                partial(
                    store.start,
                    replay["record"],
                    token=replay["token"],
                    copy=replay["copy"],
                ),
            )
        except ResilienceError as exc:
            logger.warning("a replay waits %.0f s for the store: %s", RETRY_S, exc)
            raise SendAgain("store_unavailable", RETRY_S, {}) from exc
        if not may_run:
            raise DropDelivery(DROPPED_COPY)

    def before_redelivery(self, task_id: str) -> None:
        """
        Ask whether a message that is delivered again is being replayed already.

        Its worker died after it had captured the failure and before it acknowledged
        the message; then the record was replayed, and the replay stands for it.

        Raises:
            DropDelivery: It is, or its replay has succeeded a short while ago.
        """
        wanted = Filter(state=None, ids=(task_record_id(self._namespace, task_id),))
        try:
            store = self._store()
            if store is None:
                return
            record = answer_within(TASK_WAITS_S, lambda: next(store.list(wanted), None))
        except ResilienceError as exc:
            logger.warning("%s runs, though it may be being replayed: %s", task_id, exc)
            return
        if record is None:
            return
        age_s = self._clock() - record.last_failed_at
        if record.state is State.REPLAYING or (
            record.state is State.RESOLVED
            and record.replays
            and age_s < self._redelivered_within_s
        ):
            raise DropDelivery(DROPPED_COPY)
