"""A worker's end: one deadline, honest exit codes, and a group's signal survived."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import eventually

from celery_resilience.lifecycle.signals import WAIT_S

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


def test_plain_celery_loses_what_runs_when_its_group_is_sent_term(
    make_fleet: FleetMaker,
) -> None:
    """The test above bites: the children die, and the worker says that all is well."""
    fleet = make_fleet("redis", is_plain=True)
    worker = fleet.worker()
    ids = running(fleet, "sleep", "sleep_early", end=fleet.folder / "end")

    kill_group(worker, signal.SIGTERM)
    assert worker.wait() == 0
    (fleet.folder / "end").touch()
    fleet.worker()
    fleet.send("ok").get(timeout=30)
    assert fleet.notes("slept") == []
    assert [fleet.runs(id) for id in ids] == [1, 1]


def test_an_idle_worker_ends_at_once(make_fleet: FleetMaker) -> None:
    """Also with many children, of which a join would ask each for half a second."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--drain-timeout-s", "60", concurrency=8)
    began_at = time.monotonic()

    kill_group(worker, signal.SIGTERM)
    assert worker.wait(30) == 0
    assert time.monotonic() - began_at < SOON_S


def living(worker: Worker) -> list[int]:
    """The children that have not ended, waited for or not."""
    return [
        pid
        for pid in worker.children()
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def gone_within(pid: int, seconds: float) -> None:
    """A process ends, before our shield would have let an unmeant signal through."""
    eventually(lambda: not psutil.pid_exists(pid), within_s=seconds, what="it ends")


def test_what_the_worker_means_for_a_child_ends_it(make_fleet: FleetMaker) -> None:
    """Revoked, over its hard limit, shrunk, or stopped cold: at once, as without us."""
    fleet = make_fleet("redis")
    worker = fleet.worker(concurrency=2)
    end = fleet.folder / "end"
    (revoked,) = running(fleet, "sleep", end=end)
    children = set(worker.children())

    fleet.app.control.revoke(revoked, terminate=True)
    eventually(lambda: set(worker.children()) != children, within_s=WAIT_S - 0.5)
    eventually(lambda: len(worker.children()) == 2)

    limited = fleet.send("hard_limit").id
    assert fleet.record_of(limited)["reason"] == "hard_time_limit"

    fleet.send("ok").get(timeout=30)
    eventually(lambda: len(worker.children()) == 2)
    fleet.app.control.pool_shrink(1)
    eventually(lambda: len(living(worker)) == 1, within_s=WAIT_S - 0.5)

    (late,) = running(fleet, "sleep", end=end)
    began_at = time.monotonic()
    worker.signal(signal.SIGQUIT)
    assert worker.wait(20) == 75
    assert time.monotonic() - began_at < SOON_S
    assert fleet.runs(late) == 1


def test_a_term_for_one_child_ends_it_all_the_same(make_fleet: FleetMaker) -> None:
    """An operator's: it waits for word of a drain, and there is none."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--max-crashes", "1", concurrency=1)
    (id,) = running(fleet, "sleep", end=fleet.folder / "end")
    (child,) = worker.children()

    os.kill(child, signal.SIGTERM)
    gone_within(child, WAIT_S + 5)
    assert fleet.record_of(id)["reason"] == "worker_lost"


@pytest.mark.parametrize("stubborn", ["ignores_term", "frozen"])
def test_a_child_that_does_not_end_at_the_deadline_is_killed(
    make_fleet: FleetMaker, stubborn: str
) -> None:
    """It swallows its signal, or is stopped: nothing outlives the deadline for long."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--drain-timeout-s", "1", concurrency=1)
    end = fleet.folder / "end"
    name = "deaf" if stubborn == "ignores_term" else "sleep"
    (id,) = running(fleet, name, end=end)
    (child,) = worker.children()
    if stubborn == "frozen":
        os.kill(child, signal.SIGSTOP)

    worker.signal(signal.SIGTERM)
    assert worker.wait(15) == 75, worker.text
    assert "are killed" in worker.text
    end.touch()
    fleet.worker()
    eventually(lambda: fleet.runs(id) == 2)


@pytest.mark.parametrize("pool", ["solo", "threads", "gevent"])
def test_the_deadline_holds_on_every_pool(make_fleet: FleetMaker, pool: str) -> None:
    """Late-acked work is put back, early-acked work kept, and the process ends."""
    for name, code in (("sleep", 75), ("sleep_early", 76)):
        fleet = make_fleet("redis")
        worker = fleet.worker("--drain-timeout-s", "1", pool=pool)
        end = fleet.folder / "end"
        (id,) = running(fleet, name, end=end)

        worker.signal(signal.SIGTERM)
        assert worker.wait(15) == code, worker.text
        end.touch()
        if code == 75:
            fleet.worker()
            eventually(lambda fleet=fleet: fleet.notes("slept"))
            assert fleet.runs(id) == 2
            assert fleet.records() == {}
        else:
            assert fleet.record_of(id)["reason"] == "interrupted"
            assert fleet.runs(id) == 1
