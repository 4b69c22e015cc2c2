"""Messages are measured as they are encoded, which happens once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_resilience.errors import (
    ConfigurationError,
    MessageTooLarge,
    NotSerializable,
)
from celery_resilience.events import emit
from celery_resilience.messages.arguments import changed_keys, culprit
from celery_resilience.serialization import serialized

KIB = 1024


def guarded(
    task: Any,
    publish: Callable[..., Any],
    args: Any,
    kwargs: Any,
    options: dict[str, Any],
) -> Any:
    """
    Send a message of a task with `max_message_kib`, unless it must not be sent.

    Args:
        task: The task.
        publish: Celery's `apply_async`.
        options: Its keywords.

    Raises:
        MessageTooLarge: Nothing was sent.
        NotSerializable: Nothing was sent.
        ConfigurationError: The broker would not tell that it refuses a message.
    """
    producer = options.pop("producer", None)
    if producer is not None:
        return _send(task, publish, args, kwargs, options, producer)
    with task.app.producer_or_acquire() as producer:
        return _send(task, publish, args, kwargs, options, producer)


def _send(
    task: Any,
    publish: Callable[..., Any],
    args: Any,
    kwargs: Any,
    options: dict[str, Any],
    producer: Any,
) -> Any:
    _check_confirms(task, producer)
    measured = MeasuredProducer(producer, task)
    return publish(args, kwargs, producer=measured, **options)


class MeasuredProducer:
    """
    kombu's Producer, which encodes here and tells how large that is.

    Args:
        producer: The Producer.
        task: Whose messages it sends.
    """

    def __init__(self, producer: Any, task: Any) -> None:
        self._producer = producer
        self._task = task

    def publish(self, body: Any, **options: Any) -> Any:
        """
        Send *body*, encoded once.

        Raises:
            MessageTooLarge: It is not sent.
            NotSerializable: It is not sent.
        """
        serializer = options.pop("serializer", None)
        if serializer is None or options.get("content_type"):
            return self._producer.publish(body, serializer=serializer, **options)
        args, kwargs = _arguments(body)
        if why := changed_keys(args, kwargs, serializer):
            raise NotSerializable(f"{self._task.name}: {why}")
        try:
            kind, encoding, data = serialized(body, serializer)
        except Exception as exc:
            why = culprit(args, kwargs, lambda value: _can_be_sent(value, serializer))
            raise NotSerializable(
                f"{self._task.name}: the serializer {serializer!r} does not take its "
                f"arguments: {why or exc}"
            ) from exc
        self._check_size(body, serializer, len(data))
        return self._producer.publish(
            data, content_type=kind, content_encoding=encoding, **options
        )

    def _check_size(self, body: Any, serializer: str, size: int) -> None:
        name, limit_kib = self._task.name, self._task.max_message_kib
        if size > limit_kib * KIB:
            emit("messages.refused", task=name, bytes=size)
            raise MessageTooLarge(
                f"the message of {name} has {size / KIB:,.0f} KiB"
                f"{_shares(body, serializer)}, and its max_message_kib is "
                f"{limit_kib:g}: pass a key to what is stored elsewhere"
            )

    @property
    def connection(self) -> Any:
        """The Producer's, which Celery asks for at each call."""
        return self._producer.connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


def _check_confirms(task: Any, producer: Any) -> None:
    connection = producer.connection
    if connection.transport.driver_type == "amqp" and not (
        connection.transport_options.get("confirm_publish")
    ):
        raise ConfigurationError(
            f"task {task.name} has max_message_kib, and the broker would not tell which "
            "message it refuses: set broker_transport_options = "
            '{"confirm_publish": True}'
        )


def _arguments(body: Any) -> tuple[Any, Any]:
    """Of a message of either of Celery's protocols."""
    if isinstance(body, dict):
        return body.get("args"), body.get("kwargs")
    return body[0], body[1]


def _can_be_sent(value: Any, serializer: str) -> bool:
    try:
        serialized(value, serializer)
    except Exception:
        return False
    return True


def _shares(body: Any, serializer: str) -> str:
    """What the most of it is: an argument, or what follows in a canvas."""
    args, kwargs = _arguments(body)
    sizes = [
        (len(serialized(value, serializer)[2]), name)
        for name, value in [
            *((f"args[{n}]", value) for n, value in enumerate(args or ())),
            *(kwargs or {}).items(),
        ]
    ]
    told = ""
    if sizes:
        size, name = max(sizes)
        told = f", {size / KIB:,.0f} of them {name}"
    if isinstance(body, dict):
        return told
    follows = len(serialized(body[2], serializer)[2]) / KIB
    return told + (f", and {follows:,.0f} the canvas after it" if follows >= 1 else "")
