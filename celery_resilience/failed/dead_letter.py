"""What a message in a dead-letter queue of the broker's is, as a failed task.

Policy only: no Celery, no I/O, no clock of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import uuid4

from celery_resilience.failed.envelope import LARGEST_COUNT, envelope, foreign, iso
from celery_resilience.failure import Failure, fingerprint_of
from celery_resilience.message import (
    OriginalMessage,
    id_text,
    is_delay,
    marks_of,
    text_of,
    undelayed,
)
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.redaction import ShownArguments, safe_text, show_arguments

EXCEPTION = "DeadLettered"

#: What RabbitMQ calls a death (`x-death`, `reason`), and what we call it. A full
#: queue refuses a message, whether the oldest one or the newest.
REASONS: Mapping[str, Reason] = {
    "rejected": Reason.REJECTED,
    "expired": Reason.EXPIRED,
    "delivery_limit": Reason.WORKER_LOST,
    "maxlen": Reason.REJECTED,
}

#: The attribute by which SQS tells which queue a message was redriven from.
SQS_SOURCE = "DeadLetterQueueSourceArn"

#: Why a message lies in a dead-letter queue where no broker tells of its death.
REDRIVEN = "redriven"
UNTOLD = "untold"

#: A store that fails to keep dead letters gives them back to their queue, and a
#: quorum queue drops a message that was given back too often (20 times, on
#: RabbitMQ 4). So that takes half a day: seconds before the next look, and their
#: limit.
FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 3_600.0


class KnownApp(Protocol):
    """What the app that collects knows of its own tasks and queues."""

    def names_of(self, task: str) -> tuple[Sequence[str], Sequence[str]] | None:
        """A task's positional parameters, and the hidden ones; None: not known."""
        ...

    def bound_queue(self, exchange: str, routing_key: str) -> str | None:
        """The queue that the app binds to *exchange* with *routing_key*."""
        ...

    def home_of(self, task: str) -> str:
        """The queue that the app sends a task to."""
        ...

    def delivery_limit_of(self, queue: str) -> int | None:
        """The delivery limit with which the app declares a queue."""
        ...


@dataclass(frozen=True, slots=True)
class Death:
    """
    How a message came into a dead-letter queue.

    Attributes:
        word: The broker's for it; or `REDRIVEN` or `UNTOLD`.
        queue: Where it died.
        count: How often: there, of that.
        at: Wall time of the first of them, in seconds.
    """

    word: str
    queue: str
    exchange: str
    routing_key: str
    count: int = 1
    at: float | None = None

    @property
    def reason(self) -> Reason:
        """Ours for it."""
        if self.word == REDRIVEN:
            return Reason.WORKER_LOST
        if self.word == UNTOLD:
            return Reason.MANUAL
        return REASONS.get(self.word, Reason.REJECTED)


@dataclass(frozen=True, slots=True)
class Call:
    """What a task message says of its call, read without unpickling anything."""

    task: str
    task_id: str
    attempt: int = 1
    root_id: str | None = None
    parent_id: str | None = None
    arguments: tuple[Any, Any] | None = None
    embedded: Mapping[str, Any] = field(default_factory=dict)


def dead_letter(
    message: OriginalMessage, *, app: KnownApp, namespace: str, at: float
) -> dict[str, Any]:
    """
    The envelope of a message that was taken from a dead-letter queue.

    Args:
        message: As it was taken; `queue` is the dead-letter queue.
        app: The one that collects.
        namespace: The app's.
        at: Wall time of the taking, in seconds.
    """
    call = call_of(message)
    death = death_of(message, app, call.task if call is not None else "")
    identity = _identity(message, death)
    original = replace(
        message,
        exchange=death.exchange,
        routing_key=death.routing_key,
        queue=death.queue,
        properties=_own_properties(message),
        # It tells of the dead-letter queue's deliveries, and a death has an
        # identity instead.
        redelivered=message.redelivered and not identity,
    )
    if call is None:
        return foreign(
            original,
            why="it is no task message",
            namespace=namespace,
            at=at,
            found_on=message.queue,
        )
    shown = _shown(call, app.names_of(call.task))
    chain = call.embedded.get("chain")
    settlement = Settlement(
        outcome=Outcome.FAILED,
        reason=death.reason,
        task=call.task,
        task_id=call.task_id,
        queue=death.queue,
        worker="",
        attempt=call.attempt,
        root_id=call.root_id,
        parent_id=call.parent_id,
        failure=Failure(
            EXCEPTION,
            told(death, message, app.delivery_limit_of(death.queue)),
            fingerprint_of("dead_letter", call.task, death.word, death.queue),
        ),
        args=shown.args,
        kwargs=shown.kwargs,
        arguments=shown.named,
        in_chord=bool(call.embedded.get("chord")),
        chain_length=len(chain) if isinstance(chain, list) else 0,
        marks=marks_of(message.headers),
    )
    # The time of a death that was not the only one is that of the first.
    died_at = death.at if death.at is not None and death.count == 1 else at
    document = envelope(
        settlement,
        original,
        namespace=namespace,
        failed_queue=message.queue,
        at=died_at,
    )
    document["dead_letter"] = death.word
    document["capture"] = _capture(document, identity)
    return document


def death_of(message: OriginalMessage, app: KnownApp, task: str) -> Death:
    """
    Where a message first died, and of what it died there last.

    RabbitMQ tells by `x-death`, SQS by its receive count. Else only what the
    message was published with tells where it belongs; where that is the
    dead-letter queue itself, the app would send its task to another.
    """
    return _told_death(message) or _untold_death(message, app, task)


def call_of(message: OriginalMessage) -> Call | None:
    """The call of a task message of protocol 2 or 1; None: it is no task message."""
    headers, body = message.headers, _json_of(message)
    options: Mapping[str, Any]
    if "task" in headers:
        task, task_id = headers["task"], headers.get("id")
        options, parts = headers, body if _is_call(body) else None
    elif isinstance(body, Mapping):
        task, task_id, options = body.get("task"), body.get("id"), body
        parts = [body.get("args") or [], body.get("kwargs") or {}, body]
    else:
        return None
    task_id = id_text(task_id)
    if not (isinstance(task, str) and task and task_id):
        return None
    embedded = parts[2] if parts is not None else {}
    return Call(
        task=task,
        task_id=task_id,
        attempt=_attempt(options.get("retries")),
        root_id=id_text(options.get("root_id")) or None,
        parent_id=id_text(options.get("parent_id")) or None,
        arguments=None if parts is None else (parts[0], parts[1]),
        embedded=embedded if isinstance(embedded, Mapping) else {},
    )


def told(death: Death, message: OriginalMessage, limit: int | None = None) -> str:
    """What is said of a death, in a sentence for an operator."""
    queue, found_on = repr(death.queue), repr(message.queue)
    if death.word == UNTOLD:
        return (
            f"found in {found_on}, and nothing tells how it came there; it belongs "
            f"to queue {queue}"
        )
    if death.word == REDRIVEN:
        attributes = _sqs_attributes(message)
        said = ", ".join(
            f"{name} {safe_text(attributes[name], 200)}"
            for name in ("ApproximateReceiveCount", SQS_SOURCE)
            if name in attributes
        )
        often = f"too often ({said})" if said else "too often"
        return (
            f"SQS moved it from queue {queue} to {found_on}, for it was received "
            f"{often}"
        )
    limited = f"its delivery limit of {limit}" if limit else "its delivery limit"
    why = {
        "rejected": f"a worker rejected it in queue {queue}",
        "expired": f"its time to live ran out in queue {queue}",
        "delivery_limit": (
            f"queue {queue} delivered it as often as {limited} allows, and each time "
            "its worker or channel was lost, or gave it back"
        ),
        "maxlen": f"queue {queue} was full and rejected it; no worker did",
    }.get(death.word, f"the broker took it out of queue {queue}")
    times = "once" if death.count == 1 else f"{death.count} times"
    since = "" if death.at is None else f", first at {iso(death.at)}"
    return f"{why} ({safe_text(death.word, 100)} {times}{since}; found in {found_on})"


def pause_s(failures: int) -> float:
    """
    Seconds to leave dead-letter queues alone.

    Args:
        failures: How often in a row they were taken and could not be kept.
    """
    doubled = FIRST_PAUSE_S * 2.0 ** (min(failures, 20) - 1)
    return min(doubled, LONGEST_PAUSE_S) if failures > 0 else 0.0


def _told_death(message: OriginalMessage) -> Death | None:
    deaths = _deaths(message.headers)
    if not deaths:
        return None
    first_queue = text_of(message.headers.get("x-first-death-queue"))
    if not any(death.queue == first_queue for death in deaths):
        # The delays of native delayed delivery are no deaths. The last one
        # stands first, so that of two in one second the later listed counts.
        oldest = min(reversed(deaths), key=lambda d: d.at or 0.0)
        first_queue = oldest.queue
    return next(death for death in deaths if death.queue == first_queue)


def _deaths(headers: Mapping[str, Any]) -> list[Death]:
    """The deaths that RabbitMQ tells of, the last one first."""
    table = headers.get("x-death")
    entries = table if isinstance(table, list | tuple) else []
    found = [death for entry in entries if (death := _death(entry)) is not None]
    if not found:
        for which in ("last", "first"):
            names = ("queue", "reason", "exchange")
            death = _death({n: headers.get(f"x-{which}-death-{n}") for n in names})
            if death is not None and death not in found:
                found.append(death)
    return found


def _death(entry: Any) -> Death | None:
    if not isinstance(entry, Mapping):
        return None
    queue, word = entry.get("queue"), entry.get("reason")
    if not (isinstance(queue, str) and queue and isinstance(word, str) and word):
        return None
    if is_delay(queue):
        return None
    keys = entry.get("routing-keys")
    key = keys[0] if isinstance(keys, list | tuple) and keys else queue
    exchange, routing_key = undelayed(text_of(entry.get("exchange")), text_of(key))
    count: Any = entry.get("count")
    return Death(
        word=word,
        queue=queue,
        exchange=exchange,
        routing_key=routing_key,
        count=max(count, 1) if isinstance(count, int) else 1,
        at=_seconds(entry.get("time")),
    )


def _untold_death(message: OriginalMessage, app: KnownApp, task: str) -> Death:
    sqs = _sqs_message(message)
    exchange, routing_key = message.exchange, message.routing_key
    queue = app.bound_queue(exchange, routing_key) if exchange else routing_key
    if not queue or queue == message.queue:
        source = text_of(_sqs_attributes(message).get(SQS_SOURCE))
        exchange, queue = "", source.rpartition(":")[2] or app.home_of(task)
        routing_key = queue
    return Death(
        word=UNTOLD if sqs is None else REDRIVEN,
        queue=queue,
        exchange=exchange,
        routing_key=routing_key,
    )


def _identity(message: OriginalMessage, death: Death) -> str:
    """
    The same whenever this death is told of, and for no other one.

    The tag that a message has for life; else where and when it died; "" where
    neither is told.
    """
    sqs = _sqs_message(message)
    tag = (sqs or message.properties).get("MessageId" if sqs else "delivery_tag")
    if isinstance(tag, str) and len(tag) >= 32:
        return tag
    if death.at is None:
        return ""
    return f"{death.queue}\0{death.word}\0{death.count}\0{death.at}"


def _sqs_message(message: OriginalMessage) -> Mapping[str, Any] | None:
    """SQS's own message, which kombu puts beside its (``SQS/__init__.py:1653``)."""
    info = message.properties.get("delivery_info")
    found = info.get("sqs_message") if isinstance(info, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _sqs_attributes(message: OriginalMessage) -> Mapping[str, Any]:
    """Those that kombu was told to ask for (`fetch_message_attributes`)."""
    found = (_sqs_message(message) or {}).get("Attributes")
    return found if isinstance(found, Mapping) else {}


def _own_properties(message: OriginalMessage) -> dict[str, Any]:
    """
    The properties of a message, without SQS's own message.

    That has the body a second time, and a receipt handle that is another one at
    each delivery; the message's own id takes its place as the tag.
    """
    properties, sqs = dict(message.properties), _sqs_message(message)
    if sqs is not None:
        properties["delivery_info"] = {
            name: value
            for name, value in properties["delivery_info"].items()
            if name not in ("sqs_message", "sqs_queue")
        }
        properties["delivery_tag"] = sqs.get("MessageId")
    return properties


def _capture(document: Mapping[str, Any], identity: str) -> str:
    """The same for one death, however often its message is taken."""
    if not identity:
        return uuid4().hex
    parts = (
        *(document["id"], document["replay_number"], document["attempt_number"]),
        identity,
    )
    data = "\0".join(map(str, parts)).encode(errors="replace")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _shown(
    call: Call, names: tuple[Sequence[str], Sequence[str]] | None
) -> ShownArguments:
    """Of a task that is not known nobody knows which arguments are secret."""
    if call.arguments is None or names is None:
        return ShownArguments("", "")
    args, kwargs = call.arguments
    args = tuple(args) if isinstance(args, list) else args
    return show_arguments(args, kwargs, parameters=names[0], hidden=names[1])


def _json_of(message: OriginalMessage) -> Any:
    if message.content_type != "application/json":
        return None
    try:
        return json.loads(message.body, object_hook=_plain)
    except (ValueError, RecursionError):
        return None


def _plain(value: dict[str, Any]) -> Any:
    """The text of what kombu tags with its type (``utils/json.py``, kombu 5.7)."""
    return value["__value__"] if value.keys() == {"__type__", "__value__"} else value


def _is_call(body: Any) -> bool:
    return isinstance(body, list) and len(body) == 3


def _attempt(retries: Any) -> int:
    is_count = isinstance(retries, int) and 0 <= retries < LARGEST_COUNT
    return int(retries) + 1 if is_count else 1


def _seconds(time: Any) -> float | None:
    """py-amqp reads a timestamp as UTC without saying so (``serialization.py``)."""
    if isinstance(time, datetime):
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    return None
