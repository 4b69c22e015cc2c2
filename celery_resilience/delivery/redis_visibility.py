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

from celery_resilience import _celery, _kombu
from celery_resilience.delivery.settle import Deliveries

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
        self._in_pool: set[str] = set()
        self._timer: Any = None
        self._entry: Any = None

    def started(self, consumer: Any) -> None:
        """The consumer is connected, for the first time or again."""
        self.stopped()
        self._channel = _kombu.redis_channel(consumer)
        if self._channel is None:
            return
        if self._lost:
            self._resume()
        period_s = min(self._channel.visibility_timeout / RENEWALS, MAX_PERIOD_S)
        self._timer = _celery.unblocked_timer(consumer)
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
        tags = list(_kombu.unacknowledged(channel))
        try:
            for start in range(0, len(tags), BATCH):
                _kombu.keep_invisible(channel, tags[start : start + BATCH])
        except Exception as exc:
            logger.warning("could not renew %d held messages: %s", len(tags), exc)

    def connection_lost(self, consumer: Any) -> None:
        """Keep kombu from giving back what is running when the channel closes."""
        channel = _kombu.redis_channel(consumer)
        if channel is None:
            return
        self._lost.update(_kombu.unacknowledged(channel))
        self._in_pool = {
            request.message.delivery_tag
            for request in _celery.requests_that_will_run(consumer)
        }
        self._channel = None
        _kombu.stop_restoring(channel)

    def _resume(self) -> None:
        """Take over on the new channel what was held on the lost one."""
        lost, self._lost = self._lost, {}
        ours = (
            self._in_pool
            | {r.message.delivery_tag for r in _celery.running_requests()}
            | {request.message.delivery_tag for request in self._deliveries.held}
        )
        counts = {"kept": 0, "settled": 0, "given back": 0}
        for tag, message in lost.items():
            settled_as = getattr(message, "settled_as", None)
            if message.acknowledged:
                continue
            if settled_as is not None:
                _kombu.settle_tag(self._channel, message, settled_as)
                counts["settled"] += 1
            elif tag in ours:
                _kombu.adopt(self._channel, message)
                counts["kept"] += 1
            else:
                _kombu.give_back(self._channel, tag)
                counts["given back"] += 1
        self.renew()
        logger.info("after a lost connection: %s", counts)
