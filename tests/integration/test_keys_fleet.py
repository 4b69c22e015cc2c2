"""Keys as workers stop, beside beat, beside another app, and beside plain Celery."""

from __future__ import annotations

import signal
from datetime import date
from typing import Any

import pytest
from conftest import FleetMaker
from integration.test_keys import counts, ends, fleet_of, logs
from polling import eventually

from celery_resilience.idempotency.record import KeyState
from celery_resilience.install import installation_of

BROKERS = [("redis", "redis"), ("rabbitmq", "postgresql")]


@pytest.mark.parametrize(("broker", "store"), BROKERS)
def test_a_warm_stop_ends_the_run_and_its_key(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """The worker waits for it, and what comes later finds that it is done."""
    fleet = fleet_of(make_fleet, broker, store)
    first = fleet.worker(concurrency=1)
    task_id = fleet.send("keyed_sleep", "a", 3.0).id
    eventually(lambda: fleet.runs(task_id))

    assert first.stop() == 0

    keys = [*installation_of(fleet.app).key_store().list()]
    assert [key.state for key in keys] == [KeyState.DONE]
    fleet.worker(concurrency=1)
    assert ends(fleet, task_id, fleet.send("keyed_sleep", "a", 3.0).id) == ["a", "a"]
    assert counts(fleet, "slept") == {"a": 1}
    assert fleet.runs(task_id) == 1


@pytest.mark.parametrize(("broker", "store"), BROKERS)
@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGKILL])
def test_a_cold_stop_loses_nothing_and_holds_no_key(
    make_fleet: FleetMaker, broker: str, store: str, number: signal.Signals
) -> None:
    """The message is delivered again, and runs once the lease has lapsed at the latest."""
    fleet = fleet_of(make_fleet, broker, store)
    first = fleet.worker(concurrency=1)
    task_id = fleet.send("keyed_sleep", "a", 4.0).id
    eventually(lambda: fleet.runs(task_id))

    first.signal(number)
    first.wait()
    first.kill()

    assert counts(fleet, "slept") == {}
    fleet.worker(concurrency=1)
    eventually(lambda: fleet.runs(task_id) == 2, within_s=20, what=lambda: logs(fleet))
    other = fleet.send("keyed_sleep", "a", 4.0).id
    assert ends(fleet, task_id, other) == ["a", "a"]
    assert counts(fleet, "slept") == {"a": 1}
    assert not fleet.records()


def test_what_beat_sends_has_its_effect_once(make_fleet: FleetMaker) -> None:
    """Each time that it is due it is the same call."""
    entry = {"task": "charge", "schedule": 0.3, "args": [1]}
    fleet = fleet_of(make_fleet, "redis", "redis", beat_schedule={"charge": entry})
    worker = fleet.worker("--beat", "--schedule", str(fleet.folder / "beat"))

    eventually(lambda: worker.text.count("Task charge[") >= 8, what=lambda: worker.text)

    assert worker.stop() == 0
    assert counts(fleet, "charged") == {1: 1}
    assert worker.outcomes()["skipped"] >= 2


@pytest.mark.parametrize("store", ["redis", "postgresql"])
def test_two_apps_in_one_store_have_their_own_keys(
    make_fleet: FleetMaker, store: str
) -> None:
    """Of the same task and the same name."""
    fleets = [fleet_of(make_fleet, "redis", store) for _ in range(2)]
    urls = {installation_of(fleet.app).store_choice.url for fleet in fleets}
    assert len(urls) == 1
    for fleet in fleets:
        fleet.worker(concurrency=1)

    for fleet in fleets:
        ends(fleet, *[fleet.send("charge", 1).id for _ in range(3)])

    for fleet in fleets:
        assert counts(fleet, "charged") == {1: 1}
        assert len([*installation_of(fleet.app).key_store().list()]) == 1


@pytest.mark.parametrize("serializer", ["yaml", "pickle"])
@pytest.mark.parametrize(
    "value", [date(2026, 11, 2), b"\x00\xff", {"b": 1, "a": [None, 1.5]}, {1, 2}]
)
def test_other_serializers_make_the_same_key_on_both_sides(
    make_fleet: FleetMaker, serializer: str, value: Any
) -> None:
    """The sender's, and the worker's of a message that was sent by name."""
    fleet = fleet_of(
        make_fleet,
        "redis",
        "redis",
        task_serializer=serializer,
        result_serializer=serializer,
        accept_content=["json", serializer],
    )
    fleet.worker()
    ids = [
        fleet.send("keyed_result", "a", value).id,
        fleet.app.send_task("keyed_result", ("a",), {"value": value}).id,
        fleet.send("keyed_result", "a", value).id,
    ]

    assert ends(fleet, *ids) == [value] * 3
    assert len(fleet.notes("keyed_result")) == 1
