"""A worker's end: one deadline, honest exit codes, and a group's signal survived."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import eventually

#: Seconds that a worker takes to end once nothing runs.
SOON_S = 8


def kill_group(worker: Worker, number: signal.Signals) -> None:
    """Send a signal to the worker and all its children, as many supervisors do."""
    os.killpg(worker.pid, number)


def running(fleet: Fleet, *names: str, end: Path, seconds: float = 60) -> list[str]:
    """Send a task of each name, and wait until all run; returns their ids."""
    ids = [fleet.send(name, seconds, str(end)).id for name in names]
    eventually(lambda: all(fleet.runs(id) == 1 for id in ids), what="all run")
    return ids


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
@pytest.mark.parametrize("to", ["process", "group"])
def test_a_term_lets_running_tasks_end_and_the_worker_then_soon(
    make_fleet: FleetMaker, broker: str, to: str
) -> None:
    """Sent to the process or to its group: nothing is lost, and nothing runs twice."""
    fleet = make_fleet(broker)
    worker = fleet.worker("--drain-timeout-s", "30", concurrency=4)
    end = fleet.folder / "end"
    ids = running(fleet, "sleep", "sleep_early", end=end)

    if to == "group":
        kill_group(worker, signal.SIGTERM)
    else:
        worker.signal(signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in worker.text)
    end.touch()
    ended_at = time.monotonic()
    assert worker.wait(30) == 0
    assert time.monotonic() - ended_at < SOON_S, worker.text
    assert sorted(note[1] for note in fleet.notes("slept")) == sorted(ids)
    assert [fleet.runs(id) for id in ids] == [1, 1]
    assert fleet.records() == {}
    assert worker.outcomes()["succeeded"] == 2
    assert "exit code 0" in worker.text


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
@pytest.mark.parametrize(
    ("name", "code"), [("sleep", 75), ("sleep_early", 76)], ids=["late", "early"]
)
def test_what_runs_at_the_deadline_is_put_back_or_kept(
    make_fleet: FleetMaker, broker: str, name: str, code: int
) -> None:
    """And the exit code says which: 75, or 76 where it was acknowledged."""
    fleet = make_fleet(broker)
    worker = fleet.worker("--drain-timeout-s", "1")
    end = fleet.folder / "end"
    (id,) = running(fleet, name, end=end)

    kill_group(worker, signal.SIGTERM)
    assert worker.wait(15) == code, worker.text
    end.touch()
    if code == 75:
        fleet.worker()
        eventually(lambda: fleet.notes("slept"))
        assert fleet.runs(id) == 2
        assert fleet.records() == {}
    else:
        assert fleet.record_of(id)["reason"] == "interrupted"
        assert fleet.runs(id) == 1
