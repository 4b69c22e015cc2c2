"""A redrive queue of SQS: kombu's own transport, on a stand-in for Amazon's client."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from kombu import Connection
from unit.specimens import KnownApp, a_message

from celery_resilience._kombu import is_missing
from celery_resilience.failed.dead_letter import dead_letter
from celery_resilience.failed.inbox import KombuInbox, open_inboxes
from celery_resilience.packing import unpack

BODY = a_message().body


class Stub(ModuleType):
    """A module whose every name is a class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {"__init__": lambda *_, **__: None})


@pytest.fixture(scope="module")
def amazon() -> Iterator[None]:
    """Modules in place of Amazon's, so that kombu's transport can be imported."""
    botocore = Stub("botocore")
    botocore.__path__ = []
    stubs = [botocore, Stub("boto3")]
    for part in [
        "awsrequest",
        "client",
        "exceptions",
        "httpsession",
        "response",
        "serialize",
    ]:
        stubs.append(Stub(f"botocore.{part}"))
        setattr(botocore, part, stubs[-1])
    with pytest.MonkeyPatch.context() as patch:
        for stub in stubs:
            patch.setitem(sys.modules, stub.__name__, stub)
        before = set(sys.modules)
        importlib.import_module("kombu.transport.SQS")
        yield
        for name in set(sys.modules) - before:
            del sys.modules[name]


class Client:
    """Queues, by name, with the calls and answers of Amazon's SQS client."""

    def __init__(self, *queues: str) -> None:
        self.queues: dict[str, list[dict[str, Any]]] = {name: [] for name in queues}
        self.receives = 0

    def put(self, queue: str, body: str, **attributes: str) -> None:
        attributes = {"ApproximateReceiveCount": "4", **attributes}
        message = {"MessageId": str(uuid4()), "Body": body, "Attributes": attributes}
        self.queues[queue].append(message)

    def list_queues(self, QueueNamePrefix: str = "", **_: Any) -> dict[str, Any]:
        urls = [f"https://sqs/{name}" for name in self.queues]
        return {"QueueUrls": urls}

    def create_queue(self, QueueName: str, **_: Any) -> dict[str, Any]:
        self.queues[QueueName] = []
        return {"QueueUrl": f"https://sqs/{QueueName}"}

    def receive_message(self, QueueUrl: str, **_: Any) -> dict[str, Any]:
        waiting = self.queues[QueueUrl.rpartition("/")[2]]
        self.receives += 1
        visible = [m for m in waiting if "ReceiptHandle" not in m][:1]
        for message in visible:
            message["ReceiptHandle"] = f"receipt {self.receives}"
        return {"Messages": [dict(m) for m in visible]}

    def delete_message(self, QueueUrl: str, ReceiptHandle: str) -> None:
        waiting = self.queues[QueueUrl.rpartition("/")[2]]
        waiting[:] = [m for m in waiting if m.get("ReceiptHandle") != ReceiptHandle]

    def become_visible(self) -> None:
        """The visibility timeout of what was received is over."""
        for waiting in self.queues.values():
            for message in waiting:
                message.pop("ReceiptHandle", None)

    def close(self) -> None: ...


@pytest.fixture
def client(amazon: None, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Has a queue of tasks and its redrive queue."""
    client = Client("work", "dead")
    channel = sys.modules["kombu.transport.SQS"].Channel
    monkeypatch.setattr(channel, "sqs", lambda self, queue=None: client)
    return client


@pytest.fixture
def connection(client: Client) -> Iterator[Connection]:
    """kombu's SQS transport over it."""
    with Connection("sqs://key:secret@") as connection:
        yield connection


def a_payload() -> str:
    """What kombu sends to SQS as the body of a task message."""
    message = a_message()
    return json.dumps(
        {
            "body": BODY.decode(),
            "headers": message.headers,
            "content-type": message.content_type,
            "content-encoding": message.content_encoding,
            "properties": {
                "correlation_id": "task-1",
                "delivery_tag": str(uuid4()),
                "delivery_info": {"exchange": "", "routing_key": "work"},
            },
        }
    )


def documents(batch: Any) -> list[dict[str, Any]]:
    """The failed tasks of a batch."""
    return [
        dead_letter(message, app=KnownApp(), namespace="shop", at=1.0)
        for message in batch.messages
    ]


def test_a_redriven_message_becomes_a_failed_task(
    client: Client, connection: Connection
) -> None:
    """Received too often, from the queue that it was sent to; then it is deleted."""
    arn = "arn:aws:sqs:eu-west-1:123456789012:work"
    client.put("dead", a_payload(), DeadLetterQueueSourceArn=arn)

    with open_inboxes(connection, ["dead"], on_refused=pytest.fail) as (inbox,):
        batch = inbox.take(5)
        (document,) = documents(batch)
        assert len(client.queues["dead"]) == 1
        batch.done()

    assert (document["reason"], document["queue"]) == ("worker_lost", "work")
    assert document["failed_queue"] == "dead"
    assert "ApproximateReceiveCount 4" in document["message"]
    assert arn in document["message"]
    assert unpack(document["original"]).body == BODY
    assert client.queues["dead"] == []


def test_what_was_not_acknowledged_is_the_same_failure_again(
    client: Client, connection: Connection
) -> None:
    """SQS gives another receipt at each delivery, to a foreign message too."""
    client.put("dead", a_payload())
    client.put("dead", '{"hello": 1}')
    inbox = KombuInbox(connection, "dead", pytest.fail)

    first = documents(inbox.take(5))
    client.become_visible()
    again = documents(inbox.take(5))

    assert [d["id"] for d in first] == [d["id"] for d in again]
    assert first[0]["capture"] == again[0]["capture"]
    assert [d["reason"] for d in first] == ["worker_lost", "malformed"]


def test_a_message_that_kombu_cannot_read_holds_nothing_up(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 5.6 it raised at a body that is no JSON: what was taken is kept."""
    client.put("dead", a_payload())
    client.put("dead", "hello")
    refused: list[str] = []
    inbox = KombuInbox(connection, "dead", lambda queue, why: refused.append(why))
    channel = connection.channel()
    get = channel.basic_get

    def as_before(queue: str, **words: Any) -> Any:
        if "hello" in str(client.queues[queue][-1]) and client.receives:
            raise ValueError("Expecting value: line 1 column 1 (char 0)")
        return get(queue, **words)

    monkeypatch.setattr(
        type(channel), "basic_get", lambda _, *a, **k: as_before(*a, **k)
    )
    (document,) = documents(inbox.take(5))

    assert document["reason"] == "worker_lost"
    assert refused == [
        "a message cannot be read: Expecting value: line 1 column 1 (char 0)"
    ]


def test_a_queue_that_is_not_there_is_not_made(
    client: Client, connection: Connection
) -> None:
    """kombu would make it as it looks; the user hears of it instead."""
    refused: list[str] = []
    inbox = KombuInbox(connection, "deaf", lambda queue, why: refused.append(queue))

    assert inbox.take(5).messages == []

    assert refused == ["deaf"]
    assert set(client.queues) == {"work", "dead"}


def test_a_queue_that_is_not_predefined_is_not_asked_for(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the user has listed the queues that there are."""
    channel = connection.channel()
    monkeypatch.setattr(type(channel), "predefined_queues", {"work": {}})

    assert is_missing(channel, "deaf")
    assert not is_missing(channel, "dead")
