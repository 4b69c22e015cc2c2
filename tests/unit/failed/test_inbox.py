"""Documents are taken from a failed queue and removed only when they are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Producer
from unit.specimens import a_failed_document, fresh_name

from celery_resilience.failed.envelope import dumps, loads
from celery_resilience.failed.inbox import FilesystemInbox, KombuInbox, open_inboxes

QUEUE = "shop.failed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The queue folder of a filesystem broker."""
    for name in ("queue", "processed"):
        (tmp_path / name).mkdir()
    return tmp_path / "queue"


@pytest.fixture
def connection(folder: Path) -> Iterator[Connection]:
    """kombu's real filesystem transport."""
    options = {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "processed_folder": str(folder.parent / "processed"),
        "control_folder": str(folder.parent / "control"),
    }
    with Connection("filesystem://", transport_options=options) as connection:
        yield connection


@pytest.fixture
def inbox(connection: Connection) -> FilesystemInbox:
    """The failed queue on it."""
    return FilesystemInbox(connection.default_channel, QUEUE)


def publish(connection: Connection, body: bytes, queue: str = QUEUE) -> None:
    """What a worker's publisher does."""
    producer = Producer(connection.default_channel, auto_declare=False)
    connection.default_channel._new_queue(queue)
    producer.publish(
        body,
        exchange="",
        routing_key=queue,
        content_type="application/json",
        content_encoding="utf-8",
        headers={"x": 1},
    )


def bodies(batch: Any) -> list[bytes]:
    """What a batch holds."""
    return [message.body for message in batch.messages]


def test_a_document_comes_as_it_was_published(
    connection: Connection, inbox: FilesystemInbox
) -> None:
    """Byte for byte, with its headers and content type."""
    document = a_failed_document()
    publish(connection, dumps(document))

    (message,) = inbox.take(10).messages

    assert loads(message.body) == document
    assert message.headers == {"x": 1}
    assert message.content_type == "application/json"
    assert message.queue == QUEUE


def test_what_is_taken_stays_until_it_is_kept(
    connection: Connection, inbox: FilesystemInbox
) -> None:
    """A collector that dies before `done` loses nothing."""
    publish(connection, b"{}")

    first, again = inbox.take(10), inbox.take(10)

    assert bodies(first) == bodies(again) == [b"{}"]
    again.done()
    assert bodies(inbox.take(10)) == []
    first.done()


def test_only_what_was_taken_is_removed(
    connection: Connection, inbox: FilesystemInbox
) -> None:
    """What came meanwhile stays."""
    publish(connection, b"1")
    batch = inbox.take(10)
    publish(connection, b"2")

    batch.done()

    assert bodies(inbox.take(10)) == [b"2"]


def test_a_batch_has_its_limit(connection: Connection, inbox: FilesystemInbox) -> None:
    """The rest comes with the next one."""
    for i in range(5):
        publish(connection, str(i).encode())

    first = inbox.take(3)
    first.done()
    second = inbox.take(3)

    assert len(first.messages) == 3
    assert len(second.messages) == 2
    assert set(bodies(first)) | set(bodies(second)) == {b"0", b"1", b"2", b"3", b"4"}


def test_an_empty_queue_is_an_empty_batch(inbox: FilesystemInbox) -> None:
    """And its `done` does nothing."""
    batch = inbox.take(10)
    batch.done()

    assert batch.messages == []


def test_another_queue_is_left_alone(
    connection: Connection, inbox: FilesystemInbox, folder: Path
) -> None:
    """All queues lie in one folder."""
    publish(connection, b"mine")
    publish(connection, b"a task", queue="shop")

    inbox.take(10).done()

    assert [path.name.endswith(".shop.msg") for path in folder.iterdir()] == [True]


@pytest.mark.parametrize("half", [b"", b'{"body": "abc'])
def test_a_file_that_is_still_written_is_left_alone(
    inbox: FilesystemInbox, folder: Path, half: bytes
) -> None:
    """kombu writes under the final name."""
    path = folder / f"1_x.{QUEUE}.msg"
    path.write_bytes(half)

    batch = inbox.take(10)
    batch.done()

    assert batch.messages == []
    assert path.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"null",
        b"[1, 2]",
        b'{"hello": "world"}',
        b'{"properties": {}}',
        b'{"properties": 5}',
        b'{"body": "a", "properties": {"delivery_tag": 1, "body_encoding": "base64"}}',
        b'{"headers": [1], "properties": {"delivery_tag": "t"}}',
    ],
)
def test_what_is_no_message_of_kombus_is_taken_whole(
    inbox: FilesystemInbox, folder: Path, raw: bytes
) -> None:
    """Another system wrote it; it stops no envelope behind it."""
    (folder / f"1_x.{QUEUE}.msg").write_bytes(raw)

    batch = inbox.take(10)

    assert bodies(batch) == [raw]
    assert batch.messages[0].queue == QUEUE
    batch.done()
    assert list(folder.iterdir()) == []


def test_a_file_that_another_collector_removed_is_no_error(
    connection: Connection, inbox: FilesystemInbox, folder: Path
) -> None:
    """Two may run at once; the store keeps one record."""
    publish(connection, b"1")
    batch = inbox.take(10)
    for path in folder.iterdir():
        path.unlink()

    batch.done()

    assert inbox.take(10).messages == []


@pytest.fixture
def memory() -> Iterator[Connection]:
    """kombu's in-memory transport, which keeps what is not acknowledged."""
    with Connection("memory://") as connection:
        yield connection
        connection.default_channel.close()


def test_another_transports_queue_keeps_what_is_taken(memory: Connection) -> None:
    """Until it is acknowledged."""
    memory.default_channel.queue_declare(QUEUE)
    publish(memory, b"1")
    publish(memory, b"2")
    inbox = KombuInbox(memory, QUEUE)

    batch = inbox.take(1)

    assert bodies(batch) == [b"1"]
    assert batch.messages[0].queue == QUEUE
    batch.done()
    assert bodies(inbox.take(5)) == [b"2"]
    assert bodies(inbox.take(5)) == []


def test_an_app_opens_one_inbox_for_each_failed_queue(
    folder: Path, tmp_path: Path
) -> None:
    """Of the kind that its transport needs, over one connection."""
    app = Celery("shop", set_as_current=False)
    app.conf.update(
        broker_url="filesystem://",
        broker_transport_options={
            "data_folder_in": str(folder),
            "data_folder_out": str(folder),
            "processed_folder": str(folder.parent / "processed"),
            "control_folder": str(tmp_path / "control"),
        },
    )

    with (
        app.connection_for_read() as connection,
        open_inboxes(connection, ["a", "b"]) as inboxes,
    ):
        assert [type(inbox) for inbox in inboxes] == [FilesystemInbox] * 2
    with (
        Connection("memory://") as connection,
        open_inboxes(connection, ["a"]) as inboxes,
    ):
        assert [type(inbox) for inbox in inboxes] == [KombuInbox]


@pytest.mark.parametrize("size", [5_000, 10**15])
def test_a_foreign_message_whose_body_is_a_number_is_taken(
    inbox: FilesystemInbox, folder: Path, size: int
) -> None:
    """10**15 stops every collector, and each worker on Redis, for ever."""
    raw = {"body": size, "properties": {"delivery_tag": "t", "delivery_info": {}}}
    (folder / f"1_x.{QUEUE}.msg").write_text(json.dumps(raw))

    (message,) = inbox.take(10).messages

    assert str(size).encode() in message.body
    assert b"\0" not in message.body


def test_a_queue_whose_name_ends_alike_is_left_alone(
    connection: Connection, folder: Path
) -> None:
    """`failed` is not `shop.failed`; kombu has the same fault (filesystem.py)."""
    publish(connection, b"of shop", queue="shop.failed")

    assert FilesystemInbox(connection.default_channel, "failed").take(5).messages == []


def test_a_queue_may_have_any_name(connection: Connection) -> None:
    """`resilience_failed_queue` is any text."""
    publish(connection, b"1", queue="failed[eu]")

    batch = FilesystemInbox(connection.default_channel, "failed[eu]").take(5)

    assert bodies(batch) == [b"1"]


def test_a_queue_that_the_broker_refuses_is_told_and_empty() -> None:
    """A user's queue may be missing, forbidden or of a kind that has no `get`."""

    class ChannelError(Exception):
        pass

    class Refusing:
        channel_errors = (ChannelError,)

        def channel(self) -> Any:
            return self

        def basic_get(self, queue: str, no_ack: bool) -> Any:
            raise ChannelError(f"(403) ACCESS_REFUSED - {queue}")

    connection = Refusing()
    refused: list[tuple[str, str]] = []
    inbox = KombuInbox(connection, "dead", lambda *said: refused.append(said))

    assert inbox.take(5).messages == []
    assert refused == [("dead", "(403) ACCESS_REFUSED - dead")]
    with pytest.raises(ChannelError):
        KombuInbox(connection, QUEUE).take(5)


def test_no_queues_need_no_channel() -> None:
    """An app without dead-letter queues pays nothing for them."""
    with open_inboxes(None, [], on_refused=pytest.fail) as inboxes:
        assert inboxes == []


@pytest.mark.parametrize("steps", [[0, 3, 6, 9], [1, 5, 9]])
def test_every_priority_of_a_queue_on_redis_is_read(
    servers: Any, steps: list[int]
) -> None:
    """kombu has a list for each step, and none of the name alone where 0 is no step."""
    queue = fresh_name("failed")
    options = {"priority_steps": steps}
    with Connection(servers("redis").url, transport_options=options) as connection:
        publish(connection, b"{}", queue)
        Producer(connection.default_channel).publish(
            {}, exchange="", routing_key=queue, priority=5
        )

        with open_inboxes(connection, [queue]) as inboxes:
            found = [batch for inbox in inboxes if (batch := inbox.take(9)).messages]
            for batch in found:
                batch.done()
            left = [inbox.take(9).messages for inbox in inboxes]

    assert sum(len(batch.messages) for batch in found) == 2
    assert not any(left)
