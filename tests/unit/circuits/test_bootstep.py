"""A queue is paused and consumed again, by the consumer of the Celery at hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker.consumer import Consumer
from kombu import Queue
from unit.specimens import fresh_name

from celery_resilience.circuits.bootstep import circuit_step


class TaskConsumer:
    """kombu's, as far as Celery's consumer asks it."""

    def __init__(self) -> None:
        self.queues: list[str] = []

    def consuming_from(self, queue: str) -> bool:
        """Whether it does."""
        return queue in self.queues

    def add_queue(self, queue: Queue) -> None:
        """From the next `consume`."""
        self.queues.append(queue.name)

    def consume(self) -> None:
        """Nothing is fetched here."""

    def cancel_by_queue(self, queue: str) -> None:
        """No more of it."""
        self.queues.remove(queue)


class Circuits:
    """One circuit that the test opens and closes."""

    is_paused = False

    def get(self, name: str) -> Any:
        """Of each name the same."""
        return self


class Timer:
    """Never fires by itself."""

    def call_repeatedly(self, *args: Any) -> object:
        """An entry."""
        return object()

    def cancel(self, entry: object) -> None:
        """Gone."""


@pytest.fixture
def circuits() -> Circuits:
    """A closed one."""
    return Circuits()


@pytest.fixture
def consumer() -> Any:
    """Celery's own, with two queues, without a broker."""
    app = Celery(fresh_name("unit"), set_as_current=False, broker="memory://")
    app.conf.task_queues = [Queue("bank"), Queue("other")]
    consumer: Any = Consumer.__new__(Consumer)
    vars(consumer).update(app=app, hub=object(), timer=Timer())
    consumer.task_consumer = TaskConsumer()
    consumer.controller = SimpleNamespace()
    return consumer


def consumed(consumer: Any) -> tuple[list[str], list[str]]:
    """What is consumed, and what would be after a lost connection."""
    tasks: TaskConsumer = consumer.task_consumer
    return sorted(tasks.queues), sorted(consumer.app.amqp.queues.consume_from)


def test_a_paused_queue_is_consumed_again(consumer: Any, circuits: Circuits) -> None:
    """Also after a connection that is lost meanwhile, or later."""
    step = circuit_step(circuits, {"bank": ["bank"]})(consumer)  # type: ignore[arg-type]
    consumer.task_consumer.queues += ["bank", "other"]
    step.start(consumer)
    assert consumed(consumer) == (["bank", "other"], ["bank", "other"])

    circuits.is_paused = True
    step._tick(consumer)
    step._tick(consumer)
    assert consumed(consumer) == (["other"], ["other"])
    circuits.is_paused = False
    step._tick(consumer)
    step._tick(consumer)
    assert consumed(consumer) == (["bank", "other"], ["bank", "other"])


def test_a_queue_that_is_paused_before_the_start_is_consumed_later(
    consumer: Any, circuits: Circuits
) -> None:
    """By a worker that began while the circuit was open."""
    circuits.is_paused = True
    step = circuit_step(circuits, {"bank": ["bank"]})(consumer)  # type: ignore[arg-type]
    consumer.task_consumer.queues += ["other"]
    step.start(consumer)
    assert consumed(consumer) == (["other"], ["other"])

    circuits.is_paused = False
    step._tick(consumer)
    assert consumed(consumer) == (["bank", "other"], ["bank", "other"])


def test_a_queue_that_nobody_asked_for_is_left_alone(
    consumer: Any, circuits: Circuits
) -> None:
    """A worker with -Q of others never consumes it."""
    consumer.app.amqp.queues.select(["other"])
    circuits.is_paused = True
    step = circuit_step(circuits, {"bank": ["bank"]})(consumer)  # type: ignore[arg-type]
    consumer.task_consumer.queues += ["other"]
    step.start(consumer)
    circuits.is_paused = False
    step._tick(consumer)

    assert consumed(consumer) == (["other"], ["other"])
