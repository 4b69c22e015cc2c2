"""Memory: a child that grew is recycled, and a run that explodes is failed alone."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import eventually


def done(sent: list[Any]) -> bool:
    """Whether all of them have succeeded."""
    return all(result.state == "SUCCESS" for result in sent)


def pids(fleet: Fleet, name: str) -> list[int]:
    """The child of each run of a task, in order."""
    return [line[2] for line in fleet.notes(name)]


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("broker", ["redis", "rabbitmq", "filesystem"])
def test_a_child_that_grew_is_recycled(
    make_fleet: FleetMaker, broker: str, is_late: bool
) -> None:
    """At every tenth task or so; nothing is lost, run twice or taken for a crash."""
    fleet = make_fleet(broker, task_acks_late=is_late, resilience_memory_recycle_mib=40)
    worker = fleet.worker()
    sent = [fleet.send("leak", 5) for _ in range(60)]

    eventually(lambda: done(sent), within_s=60, what=worker.text[-2000:])
    assert worker.stop() == 0
    assert sorted(line[1] for line in fleet.notes("leak")) == sorted(r.id for r in sent)
    assert worker.outcomes() == {"received": 60, "succeeded": 60}
    assert "WorkerLost" not in worker.text
    assert 4 <= worker.text.count("is recycled") <= 8
    assert "most by leak" in worker.text
