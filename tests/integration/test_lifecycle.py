"""A worker's end: one deadline, honest exit codes, and a group's signal survived."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
from pathlib import Path

import psutil
import pytest
from conftest import FleetMaker
from draining_fleets import kill_group, running
from fleet_runner import Worker
from polling import always, eventually

from celery_resilience.lifecycle.signals import WAIT_S

#: Seconds within which a worker ends once nothing runs, also on a busy machine; the
#: deadlines of the tests below are far behind.
SOON_S = 30
LATE_S = "600"

#: Seconds that a child waits for word of who has meant its SIGTERM, where nobody but
#: the main process does.
LONG_S = 600.0


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
@pytest.mark.parametrize("to", ["process", "group"])
def test_a_term_lets_running_tasks_end_and_the_worker_then_soon(
    make_fleet: FleetMaker, broker: str, to: str
) -> None:
    """Sent to the process or to its group: nothing is lost, and nothing runs twice."""
    fleet = make_fleet(broker)
    worker = fleet.worker("--drain-timeout-s", LATE_S, concurrency=4)
    end = fleet.folder / "end"
    ids = running(fleet, "sleep", "sleep_early", end=end)

    if to == "group":
        kill_group(worker, signal.SIGTERM)
    else:
        worker.signal(signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in worker.text)
    end.touch()
    assert worker.wait(SOON_S) == 0, worker.text
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
    assert worker.wait(SOON_S) == code, worker.text
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


def test_a_worker_ends_soon_after_its_last_task(make_fleet: FleetMaker) -> None:
    """Also with many children."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--drain-timeout-s", LATE_S, concurrency=16)
    end = fleet.folder / "end"
    running(fleet, "sleep", end=end)
    kill_group(worker, signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in worker.text)
    end.touch()

    assert worker.wait(SOON_S) == 0


def living(worker: Worker) -> list[int]:
    """The children that have not ended, waited for or not."""
    return [
        pid
        for pid in worker.children()
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def test_what_the_worker_means_for_a_child_ends_it(make_fleet: FleetMaker) -> None:
    """Revoked, over its hard limit, shrunk, or stopped cold: at once, as without us."""
    fleet = make_fleet(
        "redis",
        fleet_constants={"celery_resilience.lifecycle.signals.WAIT_S": LONG_S},
    )
    worker = fleet.worker(concurrency=2)
    end = fleet.folder / "end"
    (revoked,) = running(fleet, "sleep", end=end)
    children = set(worker.children())

    fleet.app.control.revoke(revoked, terminate=True)
    eventually(lambda: set(worker.children()) != children)
    eventually(lambda: len(worker.children()) == 2)

    limited = fleet.send("hard_limit").id
    assert fleet.record_of(limited)["reason"] == "hard_time_limit"

    fleet.send("ok").get(timeout=30)
    eventually(lambda: len(worker.children()) == 2)
    fleet.app.control.pool_shrink(1)
    eventually(lambda: len(living(worker)) == 1)

    (late,) = running(fleet, "sleep", end=end)
    worker.signal(signal.SIGQUIT)
    assert worker.wait(SOON_S) == 75
    assert fleet.runs(late) == 1


def test_a_term_for_one_child_ends_it_all_the_same(make_fleet: FleetMaker) -> None:
    """An operator's: it waits for word of a drain, and there is none."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--max-crashes", "1", concurrency=1)
    (id,) = running(fleet, "sleep", end=fleet.folder / "end")
    (child,) = worker.children()

    os.kill(child, signal.SIGTERM)
    eventually(lambda: not psutil.pid_exists(child), within_s=WAIT_S + SOON_S)
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
    assert worker.wait(SOON_S) == 75, worker.text
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
        assert worker.wait(SOON_S) == code, worker.text
        end.touch()
        if code == 75:
            fleet.worker()
            eventually(lambda fleet=fleet: fleet.notes("slept"))
            assert fleet.runs(id) == 2
            assert fleet.records() == {}
        else:
            assert fleet.record_of(id)["reason"] == "interrupted"
            assert fleet.runs(id) == 1


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_what_has_not_started_is_for_others_at_once(
    make_fleet: FleetMaker, broker: str
) -> None:
    """It does not wait until the last task of its worker has ended."""
    fleet = make_fleet(broker, worker_prefetch_multiplier=8)
    draining = fleet.worker(concurrency=1)
    end = fleet.folder / "end"
    (long,) = running(fleet, "sleep", end=end)
    ids = [fleet.send("ok", n).id for n in range(3)]
    ids += [fleet.send("ok", n, countdown=5).id for n in range(2)]
    eventually(lambda: draining.text.count(" received") >= 6)

    draining.signal(signal.SIGTERM)
    other = fleet.worker(concurrency=1)
    eventually(lambda: all(fleet.runs(id) == 1 for id in ids), what=lambda: other.text)
    assert draining.is_alive
    end.touch()
    assert draining.wait() == 0
    assert other.stop() == 0
    assert [fleet.runs(id) for id in (long, *ids)] == [1] * 6
    assert draining.outcomes()["requeued"] == 5


def unread_bytes(pid: int) -> int:
    """What lies in the pipes that a process reads from."""
    lies = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        info = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
        flags = int(info.split("flags:")[1].split()[0], 8)
        if not os.readlink(link).startswith("pipe:") or flags & os.O_ACCMODE:
            continue
        fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK)
        lies += struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
        os.close(fd)
    return lies


def test_a_job_that_lies_before_a_child_runs_once(make_fleet: FleetMaker) -> None:
    """It was written to a child that has yet to accept it: no other worker has it."""
    fleet = make_fleet("redis")
    worker = fleet.worker(concurrency=1)
    fleet.send("ok").get(timeout=20)
    (child,) = worker.children()
    os.kill(child, signal.SIGSTOP)
    assert unread_bytes(child) == 0
    id = fleet.send("sleep", 0.1).id
    eventually(lambda: unread_bytes(child) > 0)

    kill_group(worker, signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in worker.text, every_s=0.01)
    # Until the consumer has closed, which may be after a round of the event loop.
    always(lambda: worker.is_alive, for_s=1.3)
    os.kill(child, signal.SIGCONT)
    assert worker.wait(SOON_S) == 0
    assert fleet.runs(id) == 1
    fleet.worker("--stop-when-empty").wait()
    assert fleet.runs(id) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_body_is_told_that_its_worker_drains(
    make_fleet: FleetMaker, pool: str
) -> None:
    """It ends early by itself, and the worker then."""
    fleet = make_fleet("redis")
    worker = fleet.worker(pool=pool)
    running(fleet, "until_stopping", end=fleet.folder / "end")
    kill_group(worker, signal.SIGTERM)
    assert worker.wait(SOON_S) == 0
    assert len(fleet.notes("slept")) == 1
