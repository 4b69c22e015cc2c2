"""What kombu hands over, on its own in-memory and filesystem transports."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
from celery.app.amqp import Queues
from kombu import Connection, Consumer, Exchange, Queue

from celery_resilience._kombu import (
    guard_foreign_messages,
    is_missing,
    kombu_is_as_read,
    queue_of,
)

QUEUE = "shop"

GOOD: dict[str, Any] = {
    "body": "W10=",
    "headers": {},
    "content-type": "application/json",
    "content-encoding": "utf-8",
    "properties": {
        "body_encoding": "base64",
        "delivery_tag": "t" * 36,
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
    },
}


class Worker:
    """A consumer of one queue, with our guard before it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.channel.queue_declare(QUEUE)
        self.received: list[Any] = []
        self.foreign: list[Any] = []
        self.task_consumer = Consumer(
            self.channel,
            [Queue(QUEUE, exchange=Exchange(""), routing_key=QUEUE)],
            on_message=self.received.append,
            auto_declare=False,
        )
        guard_foreign_messages(
            self, lambda raw, queue, forget: self.foreign.append((raw, queue))
        )
        self.task_consumer.consume()

    def push(self, raw: Any) -> None:
        """What another program writes to the queue."""
        self.channel._put(QUEUE, raw)

    def drain(self, count: int = 1) -> None:
        for _ in range(count):
            self.connection.drain_events(timeout=1)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """On kombu's in-memory transport."""
    with Connection("memory://") as connection:
        worker = Worker(connection)
        yield worker
        worker.channel._purge(QUEUE)


def test_a_message_of_kombus_is_delivered(worker: Worker) -> None:
    """The guard changes nothing for it."""
    worker.push(GOOD)

    worker.drain()

    assert [message.body for message in worker.received] == [b"[]"]
    assert worker.foreign == []


@pytest.mark.parametrize(
    "raw",
    [
        None,
        5,
        "text",
        [1, 2],
        {"hello": "world"},
        {"properties": {}},
        {"properties": 5},
        {"properties": {"delivery_tag": "t"}},
        {"properties": {"delivery_tag": "t", "delivery_info": [1]}},
        {"properties": {"delivery_info": {}}},
    ],
    ids=repr,
)
def test_what_is_no_message_of_kombus_is_handed_over(worker: Worker, raw: Any) -> None:
    """And what lies behind it is delivered."""
    worker.push(raw)
    worker.push(GOOD)

    worker.drain(2)

    assert worker.foreign == [(raw, QUEUE)]
    assert len(worker.received) == 1


def test_an_amqp_channel_is_left_alone() -> None:
    """There kombu never takes what it cannot deliver."""
    channel = SimpleNamespace(connection=SimpleNamespace(_deliver="kombu's own"))
    consumer = SimpleNamespace(task_consumer=SimpleNamespace(channel=channel))

    guard_foreign_messages(consumer, lambda raw, queue: None)

    assert channel.connection._deliver == "kombu's own"


# --- the filesystem transport ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The queue folder of a filesystem broker."""
    for name in ("queue", "processed"):
        (tmp_path / name).mkdir()
    return tmp_path / "queue"


@pytest.fixture
def channel(folder: Path) -> Iterator[Any]:
    """A guarded channel of the filesystem transport."""
    options = {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "processed_folder": str(folder.parent / "processed"),
        "control_folder": str(folder.parent / "control"),
    }
    with Connection("filesystem://", transport_options=options) as connection:
        channel = connection.channel()
        consumer = SimpleNamespace(task_consumer=SimpleNamespace(channel=channel))
        guard_foreign_messages(consumer, lambda raw, queue: None)
        yield channel


def test_a_file_that_is_still_written_is_left_alone(channel: Any, folder: Path) -> None:
    """kombu would read it empty and delete it, with its task."""
    path = folder / f"1_x.{QUEUE}.msg"
    with open(path, "wb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        with pytest.raises(Empty):
            channel._get(QUEUE)
        assert path.exists()
        file.write(json.dumps(GOOD).encode())
        file.flush()
        with pytest.raises(Empty):
            channel._get(QUEUE)

    assert channel._get(QUEUE) == GOOD


def test_an_empty_file_is_left_alone(channel: Any, folder: Path) -> None:
    """Its writer has not taken the lock yet."""
    path = folder / f"1_x.{QUEUE}.msg"
    path.touch()

    with pytest.raises(Empty):
        channel._get(QUEUE)

    assert path.exists()


def test_an_empty_queue_is_empty(channel: Any, folder: Path) -> None:
    """As kombu says it."""
    with pytest.raises(Empty):
        channel._get(QUEUE)


# --- the queue of a message -----------------------------------------------------------


def consumer_of(*queues: Queue, tags: dict[str, str] | None = None) -> Any:
    """A consumer of these queues."""
    known = Queues(queues)
    known.select([queue.name for queue in queues])
    return SimpleNamespace(
        app=SimpleNamespace(amqp=SimpleNamespace(queues=known)),
        task_consumer=SimpleNamespace(_active_tags=tags or {}, channel=None),
    )


def message_with(**info: Any) -> Any:
    """A message with this delivery info."""
    return SimpleNamespace(delivery_info=info)


def test_amqp_tells_the_queue_by_its_consumer_tag() -> None:
    """Whatever it was published with."""
    consumer = consumer_of(tags={"shop": "1", "slow": "2"})

    assert queue_of(consumer, message_with(consumer_tag="2", routing_key="x")) == "slow"


def test_the_default_exchange_names_the_queue() -> None:
    """As its routing key."""
    assert queue_of(consumer_of(), message_with(exchange="", routing_key="q")) == "q"


def test_an_exchange_is_looked_up_among_the_consumed_queues() -> None:
    """Exchange and key together, else the key."""
    consumer = consumer_of(
        Queue("a", Exchange("x"), routing_key="k"),
        Queue("b", Exchange("y"), routing_key="k"),
    )

    assert queue_of(consumer, message_with(exchange="y", routing_key="k")) == "b"
    assert queue_of(consumer, message_with(exchange="z", routing_key="k")) == "k"


def test_a_queue_that_is_paused_just_now_is_found_too() -> None:
    """What was fetched before it was paused is sent again to it."""
    paused = Queue("c", Exchange("z"), routing_key="k")
    consumer = consumer_of(Queue("a", Exchange("x"), routing_key="k"))
    consumer.app.amqp.queues["c"] = paused

    assert queue_of(consumer, message_with(exchange="z", routing_key="k")) == "c"


def test_a_message_that_tells_nothing_has_no_queue() -> None:
    """Nor any error."""
    assert queue_of(consumer_of(), SimpleNamespace(delivery_info=None)) == ""


def test_kombu_is_as_it_was_read() -> None:
    """The names that we use are there in this release."""
    assert kombu_is_as_read()


@pytest.mark.parametrize(
    "change",
    [
        {"headers": [1]},
        {"headers": "text"},
        {"body": "a"},  # no base64
        {"properties": {**GOOD["properties"], "body_encoding": "zip"}},
        {"properties": {**GOOD["properties"], "body_encoding": 5}},
        {"properties": {**GOOD["properties"], "delivery_tag": [1]}},
    ],
    ids=[
        *("headers list", "headers text", "base64", "codec", "codec number"),
        "tag list",
    ],
)
def test_a_message_that_kombu_cannot_make_is_handed_over(
    worker: Worker, change: dict[str, Any]
) -> None:
    """It ends the worker; on Redis it is given back, and ends the next one."""
    worker.push({**GOOD, **change})

    worker.drain()

    assert len(worker.foreign) == 1


@pytest.mark.parametrize("body", [5, True, 10**15])
def test_a_message_whose_body_has_no_length_is_handed_over(
    worker: Worker, body: Any
) -> None:
    """Kept as undecodable, and then the worker ends (consumer.py:143, Celery 5.7)."""
    properties = {**GOOD["properties"]}
    del properties["body_encoding"]
    worker.push({**GOOD, "body": body, "properties": properties})

    worker.drain()

    assert len(worker.foreign) == 1


def test_a_transport_that_can_tell_is_left_to_say_that_a_queue_is_missing() -> None:
    """RabbitMQ does; on Redis a queue that is not there is an empty one."""
    with Connection("memory://") as connection:
        assert not is_missing(connection.default_channel, "deaf")
