"""What every worker is told runs once in each; on Redis nobody can tell one again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import FleetMaker
from polling import eventually


def told_to_all(fleet: Any, name: str, *args: Any) -> str:
    """Send a task to every worker; returns its id."""
    to_all = fleet.conf["fleet_broadcast"]
    # Declared, or a producer on Redis takes the exchange for a direct one.
    exchange = fleet.app.amqp.queues[to_all].exchange
    sent = fleet.send(name, *args, queue=to_all, declare=[exchange])
    return str(sent.id)


@pytest.mark.parametrize("name", ["snoozed", "killed_unless"])
def test_a_broadcast_that_cannot_come_again_is_kept(
    make_fleet: FleetMaker, servers: Any, tmp_path: Path, name: str
) -> None:
    """It would lie on a list that nobody reads; `--to-queue` runs it somewhere."""
    fleet = make_fleet("redis", fleet_broadcast="news")
    fleet.worker(concurrency=1)
    cure = tmp_path / "cure"
    task_id = told_to_all(fleet, name, *([str(cure)] if name != "snoozed" else []))

    record = fleet.record_of(task_id)

    assert record["reason"] == ("exception" if name == "snoozed" else "worker_lost")
    assert fleet.runs(task_id) == 1
    with redis.Redis.from_url(servers("redis").url) as client:
        assert client.keys(f"{fleet.conf['task_default_queue']}:bcast*") == []
    cure.touch()
    refused = fleet.command("failed", "replay", record["id"], "--yes")
    assert refused.returncode == 1
    assert "takes only what is told to every worker" in refused.stderr
    assert fleet.record_of(task_id)["state"] == "unresolved"
    queue = fleet.conf["task_default_queue"]
    replay = ("failed", "replay", record["id"], "--yes", "--wait", "--to-queue", queue)
    assert fleet.command(*replay).returncode == 0


def test_a_broadcast_on_rabbitmq_comes_again(make_fleet: FleetMaker) -> None:
    """There each worker has a queue of its own, to which a copy is sent."""
    fleet = make_fleet("rabbitmq", fleet_broadcast="news")
    fleet.worker(concurrency=1)

    task_id = told_to_all(fleet, "snoozed")

    eventually(lambda: fleet.runs(task_id) == 3)
    assert not fleet.records()
