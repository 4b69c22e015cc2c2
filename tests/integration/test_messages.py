"""A message that is too large is refused where it is sent, and the next one is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually

from celery_resilience.errors import (
    ConfigurationError,
    MessageTooLarge,
    NotSerializable,
)

BROKERS = ["redis", "rabbitmq", "filesystem"]

LARGE = "x" * 20_000


def small(fleet: Fleet, *args: Any, **options: Any) -> Any:
    """Send a task whose messages have at most 16 KiB."""
    return fleet.app.tasks["small"].apply_async(args, **options)


def ended(fleet: Fleet, *ids: str) -> None:
    """Wait until these bodies have run."""
    eventually(
        lambda: all(fleet.runs(task_id) for task_id in ids),
        within_s=30,
        what=lambda: fleet.workers[0].text[-2000:],
    )


@pytest.mark.parametrize("broker", BROKERS)
def test_it_is_refused_at_its_caller(make_fleet: FleetMaker, broker: str) -> None:
    """Nothing of it reaches the broker, and the next message is sent and run."""
    fleet = make_fleet(broker)
    with pytest.raises(MessageTooLarge, match="the message of small has 20 KiB"):
        small(fleet, LARGE)
    with pytest.raises(NotSerializable, match=r"args\[0\] is set: pass a sorted list"):
        small(fleet, {1})
    sent = [
        small(fleet, "before").id,
        small(fleet, "compressed", compression="zlib").id,
        small(fleet, "pickled", serializer="pickle").id,
    ]
    fleet.conf["accept_content"] = ["json", "pickle"]

    worker = fleet.worker(concurrency=1)
    ended(fleet, *sent)
    worker.stop()

    assert sorted(line[2] for line in fleet.notes("value")) == [
        "before",
        "compressed",
        "pickled",
    ]
    assert worker.outcomes()["received"] == 3


def test_what_follows_in_a_canvas_counts(make_fleet: FleetMaker) -> None:
    """It travels with the first message; the error says how much of it that is."""
    fleet = make_fleet("redis")
    task = fleet.app.tasks["small"]

    with pytest.raises(MessageTooLarge, match="and 20 the canvas after it"):
        chain(task.si(1), task.si(LARGE)).apply_async()
    with pytest.raises(MessageTooLarge, match="and 20 the canvas after it"):
        chord([task.si(1), task.si(2)], task.si(LARGE)).apply_async()


def test_a_retry_that_is_too_large_fails_with_its_reason(
    make_fleet: FleetMaker,
) -> None:
    """A worker is a caller too."""
    fleet = make_fleet("redis")
    fleet.worker(concurrency=1)

    record = fleet.record_of(fleet.send("small_retry").id)

    assert "the retry could not be published" in record["message"]
    assert "max_message_kib is 16" in record["message"]


def test_rabbitmq_has_to_confirm(make_fleet: FleetMaker) -> None:
    """Without that, a refusal would be the next call's."""
    fleet = make_fleet("rabbitmq")
    fleet.app.conf.broker_transport_options = {}

    with pytest.raises(ConfigurationError, match="confirm_publish"):
        small(fleet, 1)
    fleet.send("ok", 1)


def test_a_worker_warns_of_large_messages_without_a_limit(
    make_fleet: FleetMaker,
) -> None:
    """Whoever has sent them; once for each task."""
    fleet = make_fleet("redis")
    sent = [fleet.send("ok", "x" * size).id for size in (300_000, 300_000, 200_000)]
    sent.append(fleet.app.send_task("small", ("x" * 400_000,)).id)

    worker = fleet.worker(concurrency=1)
    ended(fleet, *sent)

    assert worker.text.count("a message of ok has 293 KiB") == 1
    assert "a message of small" not in worker.text


def test_plain_celery_takes_all(make_fleet: FleetMaker, tmp_path: Path) -> None:
    """The tests above would see it."""
    fleet = make_fleet("redis", is_plain=True)
    fleet.worker(concurrency=1)

    sent = small(fleet, LARGE)
    ended(fleet, sent.id)

    assert fleet.notes("value") == [["value", sent.id, LARGE]]
