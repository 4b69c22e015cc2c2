"""A worker stops consuming the queues of a circuit that is open."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from celery import bootsteps

from celery_resilience.circuits.fleet import Circuits
from celery_resilience.events import emit

logger = logging.getLogger("celery_resilience.circuits")

#: Seconds between two looks at what the thread of the circuits has decided.
TICK_S = 0.25


class CircuitStep(bootsteps.StartStopStep):
    """
    Cancels and adds queues as their circuits open and close; started again after each
    loss of the connection.

    Attributes:
        circuits: Those of the worker's main process.
        queues: The circuits of each queue.
    """

    label = "Resilience: circuits"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    circuits: ClassVar[Circuits]
    queues: ClassVar[dict[str, list[str]]]

    #: Queues that this worker would consume if their circuits were not open.
    paused: ClassVar[set[str]]

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        self._entry: Any = None
        self._timer: Any = None
        self._is_due = False
        super().__init__(consumer, **kwargs)
        # Before anything is consumed.
        queues = consumer.app.amqp.queues
        for queue in self.queues:
            if self._should_pause(queue) and queue in queues.consume_from:
                queues.deselect(queue)
                self._say_paused(queue)

    def start(self, consumer: Any) -> None:
        """Look now, and again in time."""
        self._cancel()
        self._look(consumer)
        self._timer = consumer.timer
        self._entry = self._timer.call_repeatedly(TICK_S, self._tick, (consumer,))

    def stop(self, consumer: Any) -> None:
        """The connection is lost, or the worker stops."""
        self._cancel()

    def shutdown(self, consumer: Any) -> None:
        """The worker ends."""
        self._cancel()

    def _tick(self, consumer: Any) -> None:
        if consumer.hub:
            self._look(consumer)
        elif not self._is_due:
            # The timer has a thread, and the connection one reader: as remote control
            # does it (worker/control.py:639, Celery 5.7).
            self._is_due = True
            consumer.call_soon(self._look, consumer)

    def _look(self, consumer: Any) -> None:
        self._is_due = False
        queues = consumer.app.amqp.queues
        for queue in self.queues:
            should = self._should_pause(queue)
            try:
                if should and queue in queues.consume_from:
                    consumer.cancel_task_queue(queue)
                    self._say_paused(queue)
                elif not should and queue in self.paused:
                    self.paused.discard(queue)
                    consumer.add_task_queue(queue)
                    if queue not in queues.consume_from:
                        # Before Celery 5.7, which adds it.
                        queues.select_add(queues[queue])
                    logger.warning("queue %s is consumed again", queue)
            except Exception:
                logger.exception("queue %s could not be paused or resumed", queue)

    def _should_pause(self, queue: str) -> bool:
        return any(self.circuits.get(name).is_paused for name in self.queues[queue])

    def _say_paused(self, queue: str) -> None:
        self.paused.add(queue)
        emit("circuits.queue_paused", queue=queue)
        logger.warning("queue %s is paused: its circuit is open", queue)

    def _cancel(self) -> None:
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None


def circuit_step(circuits: Circuits, queues: dict[str, list[str]]) -> type[Any]:
    """A step for one app's worker."""
    return type(
        "CircuitStep",
        (CircuitStep,),
        {"circuits": circuits, "queues": queues, "paused": set()},
    )
