"""A consumer whose worker drains: what it is still handed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kombu import Connection, Queue

from celery_resilience import draining
from celery_resilience.delivery.consumer import build_consumer_class
from celery_resilience.draining import SharedFlags


class CelerysConsumer:
    """The part of Celery's that hands a message on."""

    connection_errors = (OSError,)

    def __init__(self) -> None:
        self.handled: list[Any] = []

    def create_task_handler(self) -> Any:
        """What takes a message."""
        return self.handled.append


@pytest.fixture
def flags() -> Iterator[SharedFlags]:
    """Of a worker in this process."""
    flags = draining.share()
    yield flags
    draining.unshare(flags)


@pytest.fixture
def consumer() -> Any:
    """Ours, on top of Celery's."""
    return build_consumer_class(CelerysConsumer)()


def messages(*, no_ack: bool) -> tuple[Any, Any]:
    """A message that kombu delivers to a consumer, and its queue."""
    connection = Connection("memory://")
    queue = Queue(f"q{no_ack}", no_ack=no_ack)(connection.default_channel)
    queue.declare()
    queue.purge()
    connection.Producer().publish({}, routing_key=queue.name)
    got: list[Any] = []
    with connection.Consumer(queue, on_message=got.append):
        connection.drain_events(timeout=1)
    (message,) = got
    return message, queue


def of_amqp(tag: str, rejected: list[Any]) -> Any:
    """A message as py-amqp's channel delivers it, which knows who acknowledges none."""
    return SimpleNamespace(
        body=b"",
        channel=SimpleNamespace(no_ack_consumers={"forgets"}),
        delivery_info={"consumer_tag": tag},
        reject_log_error=lambda *_, **how: rejected.append(how),
    )


def test_what_comes_while_it_drains_is_given_back(
    flags: SharedFlags, consumer: Any
) -> None:
    """Another worker has it at once; before the drain it is handed on."""
    handle = consumer.create_task_handler()
    message, queue = messages(no_ack=False)
    handle(message)
    assert consumer.handled == [message]
    flags.drain()

    handle(message)

    assert consumer.handled == [message]
    assert queue.get() is not None


def test_what_the_broker_has_forgotten_runs_though_it_drains(
    flags: SharedFlags, consumer: Any
) -> None:
    """With `no_ack` there is nothing to give back: it would be lost."""
    handle = consumer.create_task_handler()
    flags.drain()
    message, _ = messages(no_ack=True)

    handle(message)

    assert consumer.handled == [message]


def test_amqp_says_which_consumer_acknowledges_nothing(
    flags: SharedFlags, consumer: Any
) -> None:
    """Its channel knows, and no other one's tag is taken for it."""
    handle, rejected = consumer.create_task_handler(), []
    flags.drain()

    handle(of_amqp("forgets", rejected))
    assert (len(consumer.handled), rejected) == (1, [])
    handle(of_amqp("acknowledges", rejected))
    assert (len(consumer.handled), rejected) == (1, [{"requeue": True}])
