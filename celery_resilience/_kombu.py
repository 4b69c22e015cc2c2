"""The only user of undocumented kombu names; `_kombu_redis` has those of Redis.

Each function names the release in which its door was read. What is wrapped is
wrapped on one channel's instance, behind a check.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from queue import Empty
from typing import Any, Protocol

from kombu.transport import virtual

from celery_resilience._kombu_redis import (
    REDIS_MODULES,
    AtomicTake,
    forgetting,
    reuse_client,
)
from celery_resilience.message import text_of, undelayed

# --- messages and queues -----------------------------------------------------------


def queue_of(consumer: Any, message: Any) -> str:
    """
    The name of the queue that *message* was taken from.

    AMQP tells the consumer tag, of which kombu keeps one for each queue
    (kombu 5.7, ``messaging.py:404``). A virtual transport tells what the
    message was published with.
    """
    info = message.delivery_info or {}
    task_consumer = getattr(consumer, "task_consumer", None)
    tag = info.get("consumer_tag")
    if tag is not None and task_consumer is not None:
        for name, active_tag in getattr(task_consumer, "_active_tags", {}).items():
            if active_tag == tag:
                return str(name)
    exchange, routing_key = undelayed(
        text_of(info.get("exchange")), text_of(info.get("routing_key"))
    )
    if not exchange:
        return routing_key
    queues = consumer.app.amqp.queues
    channel = getattr(task_consumer, "channel", None)
    # What is consumed, and then what is paused just now.
    for known in (queues.consume_from, queues):
        for queue in known.values():
            if queue.exchange.name == exchange and queue.routing_key == routing_key:
                return str(queue.name)
        if isinstance(channel, virtual.Channel):
            for name in channel._lookup(exchange, routing_key):
                if name in known:
                    return str(name)
    return routing_key


def is_forgotten(message: Any) -> bool:
    """
    Whether the broker forgot *message* with its delivery, to a consumer with `no_ack`.

    AMQP's channel knows these consumers. A virtual transport's holds what is still to
    be acknowledged (kombu 5.7, ``transport/virtual/base.py:646``), and gives back
    nothing else: on Redis it would say nothing of that.
    """
    channel = message.channel
    if isinstance(channel, virtual.Channel):
        held: Any = channel.qos._delivered
        return message.delivery_tag not in held
    tags = getattr(channel, "no_ack_consumers", None) or ()
    return (message.delivery_info or {}).get("consumer_tag") in tags


def is_missing(channel: Any, queue: str) -> bool:
    """
    Whether looking into *queue* would make it.

    kombu's SQS transport makes a queue that it is asked for
    (``SQS/__init__.py:524``, kombu 5.7); the others that can tell refuse.
    """
    resolve = getattr(channel, "_resolve_queue_url", None)
    if resolve is None:
        return False
    try:
        resolve(queue)
    except Exception as exc:
        if type(exc).__name__ in _SQS_MISSING:
            return True
        raise
    return False


_SQS_MISSING = ("DoesNotExistQueueException", "UndefinedQueueException")


def messages_in(connection: Any, queues: Iterable[str]) -> int:
    """
    How many messages wait in *queues*; those that a worker holds do not.

    A passive declaration tells, of AMQP's as of a virtual transport. One of Redis
    without a message is not there (kombu 5.7, ``transport/redis.py:1864``).
    """
    return sum(messages_in_each(connection, queues).values())


def messages_in_each(connection: Any, queues: Iterable[str]) -> dict[str, int]:
    """The same for each queue; 0 for one that is not there."""
    found = dict.fromkeys(queues, 0)
    for queue in found:
        with connection.channel() as channel:
            if type(channel).__module__ in REDIS_MODULES:
                # It looks for a queue without the `global_keyprefix`
                # (``transport/redis.py:1864``, kombu 5.7), and counts with it.
                found[queue] = int(channel._size(queue))
                continue
            try:
                count = channel.queue_declare(queue, passive=True).message_count
                found[queue] = int(count)
            except connection.channel_errors as exc:
                if str(getattr(exc, "reply_code", "")) != "404":
                    raise
    return found


def queue_arguments(app: Any, connection: Any) -> dict[str, Any] | None:
    """
    Arguments for a queue of ours: the app's default type, no delivery limit.

    RabbitMQ 4 drops a message of a quorum queue after 20 deliveries unless it
    is told not to; RabbitMQ 3 knows no -1.
    """
    if connection.transport.driver_type != "amqp":
        return None
    kind = getattr(app.conf, "task_default_queue_type", "classic")
    if kind != "quorum":
        return None
    properties = getattr(connection.connection, "server_properties", None) or {}
    major = str(properties.get("version", "3")).split(".")[0]
    arguments: dict[str, Any] = {"x-queue-type": "quorum"}
    if major.isdigit() and int(major) >= 4:
        arguments["x-delivery-limit"] = -1
    return arguments


def lost_connection_errors(connection: Any) -> tuple[type[Exception], ...]:
    """
    What is raised when the broker, or the folder that stands for it, is away.

    Without KeyError, which kombu's Redis transport counts among them
    (``kombu/transport/redis.py:253``, kombu 5.7): a bug is none.
    """
    known = (e for e in connection.connection_errors if e is not KeyError)
    return (OSError, *known)


def is_closed(connection: Any) -> bool:
    """
    Whether the broker has closed an idle connection; nothing is sent for it.

    redis-py looks by itself before it uses a connection again.
    """
    if connection.transport.driver_type != "amqp":
        return False
    try:
        connection.drain_events(timeout=0)
    except TimeoutError:
        return False
    except Exception:
        return True
    return False


class OnForeign(Protocol):
    """Hears of what was taken from a queue and is no message of kombu's."""

    def __call__(self, raw: Any, queue: str, forget: Callable[[], None] | None) -> None:
        """
        Keep it.

        Args:
            raw: What it was, its JSON decoded where it is JSON.
            queue: Where it was.
            forget: Lets the broker forget it; None: the broker has already.
        """
        ...


def guard_foreign_messages(consumer: Any, on_foreign: OnForeign) -> None:
    """
    Hand what is no kombu message to *on_foreign*, not to kombu.

    On a virtual transport kombu has taken it from the queue already, and then
    ends the worker (text that is no JSON) or reconnects (JSON without
    properties); read in kombu 5.7, ``virtual/base.py:970`` and ``redis.py:1476``.
    """
    channel = getattr(consumer.task_consumer, "channel", None)
    if not isinstance(channel, virtual.Channel):
        return
    transport = channel.connection
    deliver = transport._deliver

    def deliver_own(message: Any, queue: str) -> Any:
        if _is_kombu_message(message):
            try:
                return deliver(message, queue)
            except Exception:
                if _can_be_made(channel, message):
                    raise
        on_foreign(message, queue, forgetting(channel, message))
        return None

    transport._deliver = deliver_own
    if type(channel).__module__ in REDIS_MODULES:
        reuse_client(channel)
        AtomicTake(channel, on_foreign).wrap()
    if transport.driver_type == "filesystem":
        _guard_unwritten_files(channel)


def _guard_unwritten_files(channel: Any) -> None:
    """
    Let the filesystem transport leave a message alone that is still being written.

    It would move, read and delete an empty file and lose the message
    (``kombu/transport/filesystem.py:264``, kombu 5.7).
    """
    get = channel._get

    def get_written(queue: str) -> Any:
        ending = f".{queue}.msg"
        names = (n for n in os.listdir(channel.data_folder_in) if n.endswith(ending))
        first = min(names, default=None)
        if first is not None and not _is_written(f"{channel.data_folder_in}/{first}"):
            raise Empty
        return get(queue)

    channel._get = get_written


def _is_written(path: str) -> bool:
    """Whether kombu has ended writing a file: it holds a lock meanwhile."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            return os.fstat(file.fileno()).st_size > 0
    except FileNotFoundError:
        return True  # another worker took it
    except OSError:
        return False


def _is_kombu_message(message: Any) -> bool:
    message = message if isinstance(message, dict) else {}
    properties = message.get("properties")
    return (
        isinstance(message.get("body"), str | bytes)
        and isinstance(properties, dict)
        and "delivery_tag" in properties
        and isinstance(properties.get("delivery_info"), dict)
    )


def _can_be_made(channel: Any, raw: Any) -> bool:
    """Whether kombu can make a message of what looks like one."""
    try:
        hash(channel.Message(raw, channel=channel).delivery_tag)
    except Exception:
        return False
    return True


def kombu_is_as_read() -> bool:
    """Whether the names that this module uses are there."""
    return {"_delivered", "_dirty"} <= set(vars(virtual.QoS)) and all(
        hasattr(virtual.Channel, name) for name in ("_lookup", "qos", "do_restore")
    )
