"""On Redis, a message that a live worker holds stays invisible to the others.

kombu gives every message back that is unacknowledged for the visibility
timeout, running or not, and gives back at once what a worker held when its
connection broke. Here the worker renews what it holds, keeps what is running
over a lost connection, acknowledges it on the new one, and gives back only
what had not started.
"""

from __future__ import annotations

import logging
from typing import Any

from celery_resilience import _kombu_redis, _pools
from celery_resilience.delivery.deliveries import Deliveries

logger = logging.getLogger("celery_resilience.delivery")

#: Renewals in one visibility timeout, and the longest time between two.
RENEWALS = 3
MAX_PERIOD_S = 60.0

#: Tags in one command.
BATCH = 500


class RedisVisibility:
    """
    Holds the messages of one worker on its Redis broker.

    Args:
        deliveries: The worker's deliveries; tells which are held.
    """

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries
        self._channel: Any = None
        self._lost: dict[str, Any] = {}
        self._timer: Any = None
        self._entry: Any = None

    def started(self, consumer: Any) -> None:
        """The consumer is connected, for the first time or again."""
        self.stopped()
        self._channel = _kombu_redis.redis_channel(consumer)
        if self._channel is None:
            return
        if self._lost:
            self._resume()
        period_s = min(self._channel.visibility_timeout / RENEWALS, MAX_PERIOD_S)
        self._timer = _pools.unblocked_timer(consumer)
        self._entry = self._timer.call_repeatedly(period_s, self.renew)

    def stopped(self) -> None:
        """No more renewals."""
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None

    def renew(self) -> None:
        """Tell Redis that this worker still holds what it holds."""
        channel = self._channel
        if channel is None:
            return
        tags = list(_kombu_redis.unacknowledged(channel))
        try:
            for start in range(0, len(tags), BATCH):
                _kombu_redis.keep_invisible(channel, tags[start : start + BATCH])
        except Exception as exc:
            logger.warning("could not renew %d held messages: %s", len(tags), exc)

    @property
    def is_lost(self) -> bool:
        """The connection is lost, and what it held is not taken over yet."""
        return self._channel is None and bool(self._lost)

    def connection_lost(self, consumer: Any) -> bool:
        """
        Keep kombu from giving back what is running when the channel closes.

        Returns:
            False where there is no Redis: another broker gives everything back.
        """
        channel = _kombu_redis.redis_channel(consumer)
        if channel is None:
            return False
        self._lost.update(_kombu_redis.unacknowledged(channel))
        self._channel = None
        _kombu_redis.stop_restoring(channel)
        return True

    def _resume(self) -> None:
        """
        Take over on the new channel what was held on the lost one.

        What is left to do when that one breaks too is done on the next.
        """
        messages = {request.message for request in self._deliveries.kept()}
        ours = {m.delivery_tag for m in messages | self._deliveries.held}
        counts = {"kept": 0, "settled": 0, "given back": 0}
        for tag, message in list(self._lost.items()):
            if not message.acknowledged:
                counts[self._take_over(tag, message, is_ours=tag in ours)] += 1
            del self._lost[tag]
        self.renew()
        logger.info("after a lost connection: %s", counts)

    def _take_over(self, tag: str, message: Any, *, is_ours: bool) -> str:
        if is_ours:
            _kombu_redis.adopt(self._channel, message)
        # Read after that: who settles it from now on does so on the new channel.
        settled_as = getattr(message, "settled_as", None)
        if settled_as is not None:
            _kombu_redis.settle_tag(self._channel, message, settled_as)
            return "settled"
        if is_ours:
            return "kept"
        _kombu_redis.give_back(self._channel, message)
        return "given back"
