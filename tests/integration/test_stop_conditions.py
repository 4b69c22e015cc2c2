"""A worker ends by itself once it has done enough, and loses nothing by that."""

from __future__ import annotations

import pytest
from conftest import FleetMaker


@pytest.mark.parametrize("is_plain_task", [False, True])
def test_a_worker_stops_after_so_many_tasks(
    make_fleet: FleetMaker, is_plain_task: bool
) -> None:
    """Those behind are left in the queue."""
    fleet = make_fleet("redis", worker_prefetch_multiplier=4)
    name = "celery.backend_cleanup" if is_plain_task else "ok"
    for _ in range(12):
        fleet.app.send_task(name)
    worker = fleet.worker("--stop-after-tasks", "3", concurrency=1)
    assert worker.wait() == 0
    assert "stopping (3 tasks)" in worker.text
    if not is_plain_task:
        assert 3 <= len(fleet.notes("ok")) <= 4
        fleet.worker("--stop-when-empty").wait()
        assert len(fleet.notes("ok")) == 12


def test_a_worker_stops_after_so_many_seconds(make_fleet: FleetMaker) -> None:
    """What runs then ends."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--stop-after-s", "2")
    id = fleet.send("sleep", 3).id
    assert worker.wait() == 0
    assert "stopping (2 s)" in worker.text
    assert fleet.notes("slept") == [["slept", id]]


@pytest.mark.parametrize("broker", ["redis", "rabbitmq", "filesystem"])
def test_a_worker_stops_when_its_queues_are_empty(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Not before what it holds has run, an ETA included."""
    fleet = make_fleet(broker)
    ids = [fleet.send("ok").id for _ in range(5)]
    ids.append(fleet.send("sleep", 2).id)
    ids.append(fleet.send("ok", countdown=4).id)
    worker = fleet.worker("--stop-when-empty")
    assert worker.wait() == 0
    assert "stopping (its queues are empty)" in worker.text
    assert [fleet.runs(id) for id in ids] == [1] * 7
