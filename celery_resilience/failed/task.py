"""The worker's child asks before it runs a replayed message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery_resilience.errors import DropDelivery, SendAgain, StoreUnavailable
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
    """

    def __init__(self, store: Callable[[], FailedTaskStore | None]) -> None:
        self._store = store

    def before(self, marks: Mapping[str, Any]) -> None:
        """
        Ask for leave to run a replayed message.

        Args:
            marks: Ours on the message, with a "replay".

        Raises:
            DropDelivery: Another copy runs or ran, or the replay was called off.
            SendAgain: The store did not answer.
        """
        replay = marks["replay"]
        store = self._store()
        if store is None:
            logger.warning("a replay runs unfenced: this worker has no store")
            return
        try:
            may_run = store.start(
                replay["record"], token=replay["token"], copy=replay["copy"]
            )
        except StoreUnavailable as exc:
            logger.warning("a replay waits %.0f s for the store: %s", RETRY_S, exc)
            raise SendAgain("store_unavailable", RETRY_S, {}) from exc
        if not may_run:
            raise DropDelivery("replay_duplicate")
