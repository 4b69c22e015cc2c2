"""When the consumer connects, reconnects and stops."""

from __future__ import annotations

from typing import Any, ClassVar

from celery import bootsteps

from celery_resilience import _kombu, _pools
from celery_resilience.delivery.deliveries import Deliveries
from celery_resilience.delivery.redis_visibility import RedisVisibility
from celery_resilience.events import emit

#: Seconds between two looks at what waits for the broker.
TICK_S = 1.0


class DeliveryStep(bootsteps.StartStopStep):
    """
    Tells the deliveries that the broker is there; started again after each loss.

    Attributes:
        deliveries: The table of the worker's deliveries.
        visibility: Keeps the messages that this worker holds on Redis.
    """

    label = "Resilience: delivery"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    deliveries: ClassVar[Deliveries]
    visibility: ClassVar[RedisVisibility]

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        self._entry: Any = None
        self._timer: Any = None
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        """Take over what was held, send what waited, and look again in time."""
        self._cancel()
        self.deliveries.consumer_started(consumer)
        _pools.hear_before_giving_back(consumer.pool)
        _kombu.guard_foreign_messages(consumer, consumer.on_foreign)
        self.visibility.started(consumer)
        self.deliveries.outbox.reconnected()
        self._timer = _pools.unblocked_timer(consumer)
        self._entry = self._timer.call_repeatedly(TICK_S, self.deliveries.outbox.tick)

    def stop(self, consumer: Any) -> None:
        """Nothing yet: tasks still run, and their messages must stay ours."""

    def shutdown(self, consumer: Any) -> None:
        """The worker ends: what has not started goes back to the broker."""
        self._cancel()
        self.visibility.stopped()
        self.deliveries.drop_unstarted(keep=set())
        self.deliveries.outbox.close()
        emit("delivery.closed")

    def _cancel(self) -> None:
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None


def delivery_step(deliveries: Deliveries, visibility: RedisVisibility) -> type[Any]:
    """A step for one app's worker."""
    return type(
        "DeliveryStep",
        (DeliveryStep,),
        {"deliveries": deliveries, "visibility": visibility},
    )
