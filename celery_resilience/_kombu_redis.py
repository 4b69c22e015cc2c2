"""The only user of undocumented names of kombu's Redis transport.

Read in kombu 5.7. What is wrapped is wrapped on one channel's instance.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport import virtual
from kombu.utils.json import dumps

from celery_resilience.message import marks_of

logger = logging.getLogger("celery_resilience.delivery")

#: Transports whose keys are all on one server, as a script needs them.
REDIS_MODULES = frozenset({"kombu.transport.redis", "kombu.transport.sentinel"})

# --- what a channel holds -------------------------------------------------------------


def redis_channel(consumer: Any) -> Any:
    """The channel of the task consumer when it emulates acks on Redis, else None."""
    channel = getattr(getattr(consumer, "task_consumer", None), "channel", None)
    if hasattr(channel, "unacked_index_key") and channel.ack_emulation:
        return channel
    return None


def is_broadcast(message: Any, queue: str) -> bool:
    """
    Whether Redis told *message* to every worker that listens, as a `Broadcast` does.

    Nobody can send to the queue of one listener (``kombu/transport/redis.py:1185``).
    """
    return queue in getattr(message.channel, "active_fanout_queues", ())


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


def forgetting(channel: Any, raw: Any) -> Callable[[], None] | None:
    """What lets Redis forget a message that `AtomicTake` noted as held, or None."""
    if getattr(channel, "unacked_key", None) is None or not isinstance(raw, dict):
        return None
    properties = raw.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    tag = properties.get("delivery_tag")
    if not isinstance(tag, str) or not isinstance(
        properties.get("delivery_info"), dict
    ):
        return None

    def forget() -> None:
        channel.qos._remove_from_indices(tag).execute()

    return forget


def stop_restoring(channel: Any) -> None:
    """Keep kombu from giving back everything when *channel* is closed."""
    channel.do_restore = False


def finish_poll(channel: Any) -> None:
    """
    Read the answer to the last question for a message, once nothing is consumed.

    kombu leaves it to the end of the channel (``kombu/transport/redis.py:1892``, kombu
    5.7). Until then it takes the next message, which is nobody's in the meantime, and
    lost with a worker that is killed. Read now, it is put back for want of a consumer.
    """
    if not getattr(channel, "_in_poll", None):
        return
    if channel.client.connection.can_read(timeout=POLL_S):
        with contextlib.suppress(Empty):
            channel.handlers["BRPOP"]()


#: Seconds for such an answer: the server has one ready after one.
POLL_S = 3.0


def adopt(channel: Any, message: Any) -> None:
    """Let *message*, delivered on a channel that is gone, be settled on *channel*."""
    message.channel = channel
    channel.qos._quick_append(message.delivery_tag, message)


def settle_tag(channel: Any, message: Any, how: str) -> None:
    """
    Do on *channel* what was asked for on the lost one that *message* came by.

    Celery has tried there and failed, or its call still waits in the event loop;
    kombu would raise in the loop at a second acknowledgement, so there is none.

    Raises:
        ConnectionError: Or what else kombu has for it; nothing is settled then.
    """
    adopt(channel, message)
    kind = type(message)  # the instance may have been told to do nothing
    try:
        if how == "acknowledge":
            kind.ack(message)
        else:
            kind.reject(message, requeue=how == "requeue")
    except message.MessageStateError:
        return  # the thread that had asked for it was first, on this channel
    leave_alone(message)


def give_back(channel: Any, message: Any) -> None:
    """Put a message that has not started back at the head of its queue."""
    # A run that was cut off may still report, and ask for an acknowledgement in
    # the event loop, where kombu's error about the lost channel ends the worker.
    leave_alone(message)
    channel.qos.restore_by_tag(message.delivery_tag, leftmost=False)


def leave_alone(message: Any) -> None:
    """Let nobody settle *message* any more."""
    message.ack = message.reject = lambda **_: None


# --- one client for each channel --------------------------------------------------------


def reuse_client(channel: Any) -> None:
    """
    Let *channel* make its client once, not for each command.

    kombu makes one for each acknowledgement and publish
    (``kombu/transport/redis.py:2089``, kombu 5.7), which costs as much as the
    command; the client has no state but its pool.
    """
    create = getattr(channel, "_create_client", None)
    if type(channel).__module__ not in REDIS_MODULES or create is None:
        return
    made: Any = None

    def client(asynchronous: bool = False) -> Any:
        nonlocal made
        if asynchronous:
            return create(asynchronous=True)
        if made is None or made.connection_pool is not channel.pool:
            made = create()
        return made

    channel._create_client = client


# --- publishing a message --------------------------------------------------------------

#: Seconds for which Redis remembers that it has a message: longer than a worker
#: most often waits for its broker.
REMEMBERED_S = 900

#: KEYS: the list, and what remembers the message. ARGV: the message, `REMEMBERED_S`.
PUT_ONCE = """
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('LPUSH', KEYS[1], ARGV[1])
  redis.call('SET', KEYS[2], '', 'EX', ARGV[2])
end
"""


def put_once(channel: Any) -> None:
    """
    Let *channel* store a message that has a name of its own once, however often it is sent.

    Where the answer to a publish is lost, nobody knows whether Redis has the message,
    and it is sent again (``kombu/transport/redis.py:1679``, kombu 5.7).
    """
    put = getattr(channel, "_put", None)
    if type(channel).__module__ not in REDIS_MODULES or put is None:
        return

    def put_named_once(queue: str, message: Any, **options: Any) -> None:
        name = marks_of(message.get("headers")).get("sent")
        is_batch = options.get("_publish_batch") is not None
        expiring = getattr(channel, "_expires", ())  # kombu 5.5 has none
        if name is None or is_batch or queue in expiring:
            put(queue, message, **options)
            return
        priority = channel._get_message_priority(message, reverse=False)
        keys = [channel._q_for_pri(queue, priority), f"celery-resilience.sent.{name}"]
        keys = [f"{channel.global_keyprefix}{key}" for key in keys]
        try:
            with channel.conn_or_acquire() as client:
                client.eval(PUT_ONCE, 2, *keys, dumps(message), REMEMBERED_S)
        except channel.ResponseError as exc:
            logger.warning("messages are sent without a script: %s", exc)
            put(queue, message, **options)

    channel._put = put_named_once


# --- taking a message -----------------------------------------------------------------

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

    def __init__(self, channel: Any, on_foreign: Callable[..., None]) -> None:
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

    def start(self, *timeout: float) -> None:
        """Ask for a message: take one now, or wait for one."""
        channel = self._channel
        self._is_scripted = self._can_script and not self._is_idle
        if not self._is_scripted:
            self._start(*timeout)
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
            self._on_foreign(bytes(item), queue.rsplit(self._channel.sep, 1)[0], None)
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
