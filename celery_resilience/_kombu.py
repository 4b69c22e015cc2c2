"""The only user of undocumented kombu names.

Each function names the release in which its door was read. What is wrapped is
wrapped on one channel's instance, behind a check.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport import virtual

logger = logging.getLogger("celery_resilience.delivery")

# --- messages and queues -----------------------------------------------------------

#: The 28 levels of RabbitMQ's native delayed delivery, as they stand before
#: the routing key of a message that has passed through them
#: (``kombu/transport/native_delayed_delivery.py``, kombu 5.7).
_DELAYED_EXCHANGE = re.compile(r"celery_delayed_\d+")
_DELAYED_PREFIX = re.compile(r"^(?:[01]\.){28}")


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
        info.get("exchange") or "", info.get("routing_key") or ""
    )
    if not exchange:
        return routing_key
    consumed = consumer.app.amqp.queues.consume_from
    for queue in consumed.values():
        if queue.exchange.name == exchange and queue.routing_key == routing_key:
            return str(queue.name)
    channel = getattr(task_consumer, "channel", None)
    if isinstance(channel, virtual.Channel):
        for name in channel._lookup(exchange, routing_key):
            if name in consumed:
                return str(name)
    return routing_key


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


def undelayed(exchange: str, routing_key: str) -> tuple[str, str]:
    """Exchange and routing key without the marks of native delayed delivery."""
    if _DELAYED_EXCHANGE.fullmatch(exchange):
        return "", _DELAYED_PREFIX.sub("", routing_key)
    return exchange, routing_key


# --- what a channel on Redis holds -----------------------------------------------------


def redis_channel(consumer: Any) -> Any:
    """The channel of the task consumer when it emulates acks on Redis, else None."""
    channel = getattr(getattr(consumer, "task_consumer", None), "channel", None)
    if hasattr(channel, "unacked_index_key") and channel.ack_emulation:
        return channel
    return None


def unacknowledged(channel: Any) -> dict[str, Any]:
    """The messages that *channel* delivered and has not settled, by delivery tag."""
    qos = channel.qos
    while True:
        try:
            return {
                tag: message
                for tag, message in list(qos._delivered.items())
                if tag not in qos._dirty
            }
        except RuntimeError:  # changed by the event loop's thread meanwhile
            continue


def keep_invisible(channel: Any, tags: list[str]) -> None:
    """Start the visibility timeout of *tags* anew, unless they were given back."""
    with channel.conn_or_acquire() as client:
        now = time.time()
        client.zadd(channel.unacked_index_key, dict.fromkeys(tags, now), xx=True)


def stop_restoring(channel: Any) -> None:
    """Keep kombu from giving back everything when *channel* is closed."""
    channel.do_restore = False


def adopt(channel: Any, message: Any) -> None:
    """Let *message*, delivered on a channel that is gone, be settled on *channel*."""
    message.channel = channel
    channel.qos._quick_append(message.delivery_tag, message)


def settle_tag(channel: Any, message: Any, how: str) -> None:
    """
    Do on *channel* what was asked for on the lost one that *message* came by.

    Celery has tried there and failed, or its call still waits in the event loop;
    kombu would raise in the loop at a second acknowledgement, so there is none.
    """
    adopt(channel, message)
    errors = channel.connection_errors
    if how == "acknowledge":
        message.ack_log_error(logger, errors)
    else:
        message.reject_log_error(logger, errors, requeue=how == "requeue")
    message.ack = message.reject = lambda **_: None


def give_back(channel: Any, tag: str) -> None:
    """Put a message that has not started back at the head of its queue."""
    channel.qos.restore_by_tag(tag, leftmost=False)


def guard_foreign_messages(
    consumer: Any, on_foreign: Callable[[Any, str], None]
) -> None:
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
            return deliver(message, queue)
        on_foreign(message, queue)
        return None

    transport._deliver = deliver_own
    if type(channel).__module__ in REDIS_MODULES:
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
    properties = message.get("properties") if isinstance(message, dict) else None
    return (
        isinstance(properties, dict)
        and "delivery_tag" in properties
        and isinstance(properties.get("delivery_info"), dict)
    )


#: Transports whose keys are all on one server, as a script needs them.
REDIS_MODULES = frozenset({"kombu.transport.redis", "kombu.transport.sentinel"})

#: Takes the first message of several lists and notes that it is held, at once.
#: KEYS: the hash of held messages, the index of their times, the lists in order.
#: ARGV: now. Returns the list, the message, and its tag where it is noted.
TAKE = """
for i = 3, #KEYS do
  local item = redis.call('RPOP', KEYS[i])
  if item then
    local is_json, message = pcall(cjson.decode, item)
    local properties = is_json and type(message) == 'table' and message.properties
    local tag = type(properties) == 'table' and properties.delivery_tag
    local info = type(properties) == 'table' and properties.delivery_info
    if type(tag) == 'string' and type(info) == 'table' then
      local exchange = cjson.encode(info.exchange or cjson.null)
      local key = cjson.encode(info.routing_key or cjson.null)
      redis.call('ZADD', KEYS[2], ARGV[1], tag)
      redis.call('HSET', KEYS[1], tag, '[' .. item .. ',' .. exchange .. ',' .. key .. ']')
      return {KEYS[i], item, tag}
    end
    return {KEYS[i], item, ''}
  end
end
return false
"""


class AtomicTake:
    """
    Lets a Redis channel take a message and note that it is held in one step.

    kombu takes with BRPOP, and notes when it has read the reply
    (``kombu/transport/redis.py:1460`` and ``:478``, kombu 5.7): what is on its
    way, or waits in the socket for prefetch credit, is lost with a worker that
    is killed. While there are messages, a script takes instead. BRPOP, which
    can wait, is left for an idle worker. What is written is what kombu writes,
    so that other workers need not know; and one round trip is saved.

    It also hands what is no message of kombu's to *on_foreign*.
    """

    def __init__(self, channel: Any, on_foreign: Callable[[Any, str], None]) -> None:
        self._channel = channel
        self._on_foreign = on_foreign
        self._client = channel.client
        self._parse = self._client.parse_response
        self._start = channel._brpop_start
        self._read = channel.handlers["BRPOP"]
        self._note = channel.qos.append
        self._can_script = True
        self._is_idle = False
        self._is_scripted = False
        self._noted_tag: str | None = None
        self._last: Any = None

    def wrap(self) -> None:
        """Put our methods in place of the instance's."""
        channel = self._channel
        channel._brpop_start = self.start
        channel.handlers["BRPOP"] = self.read
        channel.qos.append = self.note
        self._client.parse_response = self.parse

    def start(self, timeout: float | None = None) -> None:
        """Ask for a message: take one now, or wait for one."""
        channel = self._channel
        self._is_scripted = self._can_script and not self._is_idle
        if not self._is_scripted:
            self._start(timeout)
            return
        queues = channel._queue_cycle.consume(len(channel.active_queues))
        if not queues:
            return
        keys = [channel.unacked_key, channel.unacked_index_key]
        keys += [
            channel._q_for_pri(queue, priority)
            for priority in channel.priority_steps
            for queue in queues
        ]
        channel._in_poll = self._client.connection
        channel._brpop_sent_at = time.monotonic()
        self._client.connection.send_command(
            "EVAL",
            TAKE,
            len(keys),
            *(f"{channel.global_keyprefix}{key}" for key in keys),
            time.time(),
        )

    def parse(self, connection: Any, command: str, **options: Any) -> Any:
        """Read the reply to what `start` asked for, in the form of BRPOP's."""
        if command != "BRPOP":
            return self._parse(connection, command, **options)
        if not self._is_scripted:
            self._last = self._parse(connection, command, **options)
            self._is_idle = not self._last
            return self._last
        try:
            reply = self._parse(connection, "EVAL", **options)
        except self._channel.ResponseError as exc:
            logger.warning("messages are taken without a script: %s", exc)
            self._can_script = False
            return None
        self._is_idle = not reply
        if not reply:
            return None
        key, item, tag = reply
        self._noted_tag = tag.decode() or None
        self._last = (key[len(self._channel.global_keyprefix) :], item)
        return self._last

    def read(self, **options: Any) -> Any:
        """Read a message and deliver it."""
        self._last = None
        try:
            return self._read(**options)
        except ValueError:
            key, item = self._last or (b"", b"{}")
            if _is_json(item):
                raise
            queue = bytes(key).decode(errors="replace")
            self._on_foreign(bytes(item), queue.rsplit(self._channel.sep, 1)[0])
            return True

    def note(self, message: Any, delivery_tag: str) -> None:
        """Note that a message is held; on the server, unless the script has."""
        if delivery_tag == self._noted_tag:
            self._noted_tag = None
            virtual.QoS.append(self._channel.qos, message, delivery_tag)
        else:
            self._note(message, delivery_tag)


def _is_json(item: bytes) -> bool:
    try:
        json.loads(item)
    except ValueError:
        return False
    return True


def kombu_is_as_read() -> bool:
    """Whether the names that this module uses are there."""
    return {"_delivered", "_dirty"} <= set(vars(virtual.QoS)) and all(
        hasattr(virtual.Channel, name) for name in ("_lookup", "qos", "do_restore")
    )
