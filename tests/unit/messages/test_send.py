"""A message is encoded once, measured, and sent as Celery would have sent it."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest

from celery_resilience import events, serialization
from celery_resilience.errors import (
    ConfigurationError,
    MessageTooLarge,
    NotSerializable,
)
from celery_resilience.messages import send

EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class Producer:
    """Remembers what it was to publish."""

    def __init__(self, driver: str = "redis", **options: Any) -> None:
        self.published: list[tuple[Any, dict[str, Any]]] = []
        self.connection = SimpleNamespace(
            transport=SimpleNamespace(driver_type=driver), transport_options=options
        )

    def publish(self, body: Any, **options: Any) -> str:
        """Remember."""
        self.published.append((body, options))
        return "published"

    def revive(self) -> str:
        """What a retry calls."""
        return "revived"


def task_with(limit_kib: float) -> Any:
    """A task of an app that has no pool of producers."""
    app = SimpleNamespace(producer_or_acquire=contextlib.nullcontext)
    return SimpleNamespace(name="shop.pack", max_message_kib=limit_kib, app=app)


def publish(
    task: Any,
    producer: Any,
    *args: Any,
    embed: dict[str, Any] | None = None,
    serializer: str | None = "json",
    **more: Any,
) -> Any:
    """Send a call as Celery does."""

    def apply_async(args: Any, kwargs: Any, *, producer: Any, **options: Any) -> Any:
        body = (args, kwargs, embed or EMBED)
        return producer.publish(body, serializer=serializer, priority=3, **options)

    options = {"producer": producer, **more}
    return send.guarded(task, apply_async, args, {}, options)


def test_it_is_sent_as_it_would_have_been_and_encoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes, with their content type; all else is passed on."""
    encoded = []

    def counted(value: Any, serializer: str) -> Any:
        encoded.append(value)
        return serialization.serialized(value, serializer)

    monkeypatch.setattr(send, "serialized", counted)
    producer = Producer()

    assert publish(task_with(100), producer, 1, "ü", compression="zlib") == "published"

    ((data, options),) = producer.published
    assert json.loads(data) == [[1, "ü"], {}, EMBED]
    assert options == {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "compression": "zlib",
        "priority": 3,
    }
    assert len(encoded) == 1


def test_what_is_not_ours_to_encode_is_passed_on() -> None:
    """A body with a content type is encoded already."""
    producer = Producer()
    options = {"content_type": "text/plain", "serializer": None}

    send.MeasuredProducer(producer, task_with(1)).publish("x", **options)

    assert producer.published == [("x", options)]


def test_the_rest_of_a_producer_is_there() -> None:
    """Celery revives it where it tries again."""
    measured = send.MeasuredProducer(Producer(), task_with(1))

    assert measured.revive() == "revived"


def test_a_message_above_the_limit_is_not_sent() -> None:
    """The error names the task, the sizes and what takes most; the event has no payload."""
    producer, told = Producer(), []
    stop = events.observe("messages.refused", lambda **facts: told.append(facts))
    text = "secret" * 20_000

    with pytest.raises(MessageTooLarge) as raised:
        publish(
            task_with(100), producer, 1, text, embed={**EMBED, "chain": ["y" * 4096]}
        )
    stop()

    assert producer.published == []
    assert str(raised.value) == (
        "the message of shop.pack has 121 KiB, 117 of them args[1], and 4 the canvas "
        "after it, and its max_message_kib is 100: pass a key to what is stored elsewhere"
    )
    assert [(t["task"], t["bytes"] // 1024) for t in told] == [("shop.pack", 121)]


def test_a_message_of_just_the_limit_is_sent() -> None:
    """The limit is in KiB of what is encoded."""
    body = ((), {}, EMBED)
    size = len(serialization.serialized(body, "json")[2])
    producer = Producer()

    publish(task_with(size / 1024), producer)
    with pytest.raises(MessageTooLarge):
        publish(task_with((size - 1) / 1024), producer)

    assert len(producer.published) == 1


def test_arguments_that_would_not_arrive_are_refused() -> None:
    """With what to pass instead."""
    producer = Producer()

    with pytest.raises(NotSerializable, match=r"shop.pack: .*args\[0\]\['a'\] is set"):
        publish(task_with(1), producer, {"a": {1}})
    with pytest.raises(NotSerializable, match=r"args\[0\] has the key 7"):
        publish(task_with(1), producer, {7: 1})

    assert producer.published == []


def test_amqp_without_confirms_is_refused() -> None:
    """There the next, innocent call has the error of a message that is refused."""
    with pytest.raises(ConfigurationError, match="confirm_publish"):
        publish(task_with(1), Producer("amqp"), 1)

    for producer in (Producer("amqp", confirm_publish=True), Producer("redis")):
        publish(task_with(1), producer, 1)
        assert len(producer.published) == 1
