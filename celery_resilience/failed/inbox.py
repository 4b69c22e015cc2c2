"""Takes documents from a failed queue without losing one between taking and keeping.

AMQP does so by itself. kombu's Redis transport takes a message before it notes
that it did (``kombu/transport/redis.py:1476``), and its filesystem transport
deletes before it reads, so those two are read in place and removed afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from celery_resilience._kombu import is_missing
from celery_resilience.message import (
    OriginalMessage,
    foreign_message,
    original_message,
)

logger = logging.getLogger("celery_resilience.failed")


@dataclass(frozen=True, slots=True)
class Batch:
    """
    Messages that are still on their queue.

    Attributes:
        messages: Oldest first.
        done: Removes them from the queue; called once they are kept.
    """

    messages: Sequence[OriginalMessage]
    done: Callable[[], None]


class Inbox(Protocol):
    """One failed queue, or dead-letter queue of the broker."""

    def take(self, limit: int) -> Batch:
        """At most *limit* messages; none when the queue is empty."""
        ...


#: Hears of a queue that the broker refuses to read from, with what it says.
OnRefused = Callable[[str, str], None]


@contextlib.contextmanager
def open_inboxes(
    connection: Any, queues: Sequence[str], *, on_refused: OnRefused | None = None
) -> Iterator[list[Inbox]]:
    """
    Queues of the app's broker, read over *connection*.

    Args:
        queues: The failed queues, or with *on_refused* queues of the user's.
    """
    if not queues:
        yield []
        return
    connection.connect()
    kind = connection.transport.driver_type
    with connection.channel() as channel:
        if kind == "redis":
            yield [
                RedisInbox(channel, queue, key)
                for queue in queues
                for key in _redis_keys(channel, queue)
            ]
        elif kind == "filesystem":
            yield [FilesystemInbox(channel, queue) for queue in queues]
        else:
            yield [KombuInbox(connection, queue, on_refused) for queue in queues]


class KombuInbox:
    """
    A queue of any transport that keeps what is taken until it is acknowledged.

    Args:
        connection: Of the app; each batch has its channel, for a missing queue
            closes it.
        on_refused: Without it only a missing queue is an empty one.
    """

    def __init__(
        self, connection: Any, queue: str, on_refused: OnRefused | None = None
    ) -> None:
        self._connection = connection
        self._queue = queue
        self._on_refused = on_refused
        self._channel: Any = None

    def take(self, limit: int) -> Batch:
        """At most *limit* messages; none when the queue is empty or missing."""
        messages: list[Any] = []
        try:
            if self._channel is None:
                self._channel = self._connection.channel()
            if self._on_refused is not None and is_missing(self._channel, self._queue):
                self._on_refused(self._queue, "there is no such queue")
                return Batch([], lambda: None)
            while len(messages) < limit:
                try:
                    raw = self._channel.basic_get(self._queue, no_ack=False)
                except (TypeError, ValueError) as exc:
                    # kombu before 5.6, of a body on SQS that is no JSON object.
                    if self._on_refused is None:
                        raise
                    self._on_refused(self._queue, f"a message cannot be read: {exc}")
                    break
                if raw is None:
                    break
                messages.append(self._channel.message_to_python(raw))
        except self._connection.channel_errors as exc:
            self._channel = None
            if self._on_refused is not None:
                self._on_refused(self._queue, str(exc))
            elif "NOT_FOUND" not in str(exc):
                raise
            messages = []  # they go back to the queue with their channel

        def done() -> None:
            for message in messages:
                message.ack()

        return Batch([original_message(m, self._queue) for m in messages], done)


class RedisInbox:
    """A list on Redis, read from its tail and trimmed afterwards."""

    def __init__(self, channel: Any, queue: str, key: str | None = None) -> None:
        self._channel = channel
        self._client = channel.client
        self._queue = queue
        key = queue if key is None else key
        prefix = channel.global_keyprefix
        known = getattr(self._client, "PREFIXED_SIMPLE_COMMANDS", ())
        # kombu's client prefixes the keys of the commands that it uses itself.
        self._key = key if "LRANGE" in known else f"{prefix}{key}"
        self._lrem_key = key if "LREM" in known else f"{prefix}{key}"

    def take(self, limit: int) -> Batch:
        """At most *limit* messages; none when the queue is empty."""
        items = self._client.execute_command("LRANGE", self._key, -limit, -1)
        items.reverse()

        def done() -> None:
            # By value, from the tail: another collector may have removed some.
            with self._client.pipeline(transaction=False) as pipe:
                for item in items:
                    pipe.execute_command("LREM", self._lrem_key, -1, item)
                pipe.execute()

        return Batch([self._message(item) for item in items], done)

    def _message(self, item: bytes) -> OriginalMessage:
        return _virtual_message(self._channel, item, self._queue)


class FilesystemInbox:
    """A queue of kombu's filesystem transport: one file a message."""

    def __init__(self, channel: Any, queue: str) -> None:
        self._channel = channel
        self._folder = Path(channel.data_folder_in)
        self._queue = queue

    def take(self, limit: int) -> Batch:
        """At most *limit* messages; none when the queue is empty."""
        ending = f"{self._queue}.msg"
        paths: list[Path] = []
        messages: list[OriginalMessage] = []
        for path in sorted(self._folder.iterdir()):
            if len(paths) == limit:
                break
            if path.name.partition(".")[2] != ending:
                continue  # of another queue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            if not _is_whole(data):
                continue  # kombu is still writing it
            paths.append(path)
            messages.append(_virtual_message(self._channel, data, self._queue))

        def done() -> None:
            for path in paths:
                path.unlink(missing_ok=True)

        return Batch(messages, done)


def _redis_keys(channel: Any, queue: str) -> list[str]:
    """A queue's lists: kombu has one for each step of priorities (``redis.py:1665``)."""
    return [
        f"{queue}{channel.sep}{step}" if step else queue
        for step in channel.priority_steps
    ]


def _is_whole(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _virtual_message(channel: Any, data: bytes, queue: str) -> OriginalMessage:
    """A message of a virtual transport from its stored form."""
    try:
        return original_message(
            channel.Message(json.loads(data), channel=channel), queue
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return foreign_message(data, queue)
