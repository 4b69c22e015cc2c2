"""When the shelf looks for what is due, and the consumer for what is stored."""

from __future__ import annotations

from typing import Any, ClassVar

from celery import bootsteps

from celery_resilience.shelf.consumer import Shelving

#: Seconds between two looks whether the store has answered.
TICK_S = 0.1

#: Seconds that the end of a worker waits for the store's answer.
LAST_ANSWER_S = 2.0


_AFTER = ("celery.worker.consumer.tasks:Tasks",)


class ShelfStep(bootsteps.StartStopStep):
    """
    Starts the shelf with the consumer; started again after each lost connection.

    Attributes:
        shelving: What hands messages over.
    """

    label = "Resilience: shelf"
    requires = _AFTER

    shelving: ClassVar[Shelving]

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        self._entry: Any = None
        self._timer: Any = None
        self._is_due = False
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        """The consumer is connected."""
        self._cancel()
        self.shelving.consumer = consumer
        self.shelving.shelf.start()
        self._timer = consumer.timer
        self._entry = self._timer.call_repeatedly(TICK_S, self._tick, (consumer,))

    def stop(self, consumer: Any) -> None:
        """The connection is lost, or the worker stops."""
        self._cancel()

    def shutdown(self, consumer: Any) -> None:
        """The worker ends: what is not stored goes back to the broker."""
        self._cancel()
        self.shelving.shelf.stop(LAST_ANSWER_S)
        self.shelving.settle()

    def _tick(self, consumer: Any) -> None:
        if consumer.hub:
            self.shelving.settle()
        elif self.shelving.shelf.has_decided and not self._is_due:
            # The timer has a thread, and the connection one reader.
            self._is_due = True
            consumer.call_soon(self._settle)

    def _settle(self) -> None:
        self._is_due = False
        self.shelving.settle()

    def _cancel(self) -> None:
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None


def shelf_step(shelving: Shelving, *, after: type[Any]) -> type[Any]:
    """
    A step for one app's worker.

    Args:
        after: The step that starts before it, and so ends after it: what is not stored
            is given back there.
    """
    requires: Any = (*_AFTER, after)
    return type("ShelfStep", (ShelfStep,), {"shelving": shelving, "requires": requires})
