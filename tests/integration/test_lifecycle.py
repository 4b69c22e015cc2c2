"""A worker's end: one deadline, honest exit codes, and a group's signal survived."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import always, eventually
from services import Service, free_port

from celery_resilience.lifecycle.health import CHILDREN_STUCK_S
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


def test_a_worker_ends_soon_after_its_last_task(make_fleet: FleetMaker) -> None:
    """Also with many children."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--drain-timeout-s", "60", concurrency=16)
    end = fleet.folder / "end"
    running(fleet, "sleep", end=end)
    kill_group(worker, signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in worker.text)
    end.touch()
    ended_at = time.monotonic()

    assert worker.wait(30) == 0
    assert time.monotonic() - ended_at < SOON_S


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
    eventually(lambda: all(fleet.runs(id) == 1 for id in ids), what=other.text)
    assert draining.is_alive
    end.touch()
    assert draining.wait() == 0
    assert other.stop() == 0
    assert [fleet.runs(id) for id in (long, *ids)] == [1] * 6
    assert draining.outcomes()["requeued"] == 5


def test_a_job_that_lies_before_a_child_runs_once(make_fleet: FleetMaker) -> None:
    """It was written to a child that has yet to accept it: no other worker has it."""
    fleet = make_fleet("redis")
    worker = fleet.worker(concurrency=1)
    fleet.send("ok").get(timeout=20)
    (child,) = worker.children()
    os.kill(child, signal.SIGSTOP)
    id = fleet.send("sleep", 0.1).id
    eventually(lambda: f"{id}] received" in worker.text)

    kill_group(worker, signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in worker.text, every_s=0.01)
    # Until the consumer has closed, which may be after a round of the event loop.
    always(lambda: worker.is_alive, for_s=1.3)
    os.kill(child, signal.SIGCONT)
    assert worker.wait(15) == 0
    assert fleet.runs(id) == 1
    fleet.worker("--stop-when-empty").wait()
    assert fleet.runs(id) == 1


# --- probes ----------------------------------------------------------------------------


def probe(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Ask as Kubernetes does; status 0 while nobody listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as got:
            return got.status, json.load(got)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)
    except OSError:
        return 0, {}


def status(port: int, path: str) -> int:
    """Of a probe."""
    return probe(port, path)[0]


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent"])
def test_a_worker_is_live_and_ready_and_then_drains(
    make_fleet: FleetMaker, pool: str
) -> None:
    """Draining it is live, and not ready."""
    port = free_port()
    fleet = make_fleet("redis")
    worker = fleet.worker("--health-port", f"127.0.0.1:{port}", pool=pool)
    eventually(lambda: status(port, "/ready") == 200, what=worker.text)
    assert status(port, "/live") == 200
    assert status(port, "/elsewhere") == 404
    end = fleet.folder / "end"
    running(fleet, "sleep", end=end)
    assert probe(port, "/live")[1]["running"] == 1

    worker.signal(signal.SIGTERM)
    eventually(lambda: probe(port, "/ready")[0] == 503)
    assert probe(port, "/ready")[1]["reasons"] == ["it drains"]
    assert status(port, "/live") == 200
    end.touch()
    assert worker.wait() == 0


def test_a_worker_whose_children_are_all_frozen_is_not_live(
    make_fleet: FleetMaker,
) -> None:
    """`inspect ping` says that all is well; and after SIGCONT it is."""
    port = free_port()
    fleet = make_fleet("redis")
    worker = fleet.worker("--health-port", str(port), concurrency=2)
    eventually(lambda: status(port, "/live") == 200)
    children = worker.children()
    os.kill(children[0], signal.SIGSTOP)
    always(lambda: status(port, "/live") == 200, for_s=CHILDREN_STUCK_S + 2)

    os.kill(children[1], signal.SIGSTOP)
    fleet.send("ok")
    eventually(lambda: status(port, "/live") == 503, within_s=15)
    assert "none of the 2 children" in probe(port, "/live")[1]["reasons"][0]
    assert fleet.app.control.inspect(timeout=2).ping()
    for child in children:
        os.kill(child, signal.SIGCONT)
    eventually(lambda: status(port, "/live") == 200)


def test_without_its_broker_a_worker_is_live_and_not_ready(
    make_fleet: FleetMaker, own_server: Callable[[str], Service]
) -> None:
    """A start anew would not bring the broker back."""
    port = free_port()
    server = own_server("redis")
    fleet = make_fleet("redis", server=server)
    worker = fleet.worker("--health-port", str(port))
    eventually(lambda: status(port, "/ready") == 200)

    server.kill()
    eventually(lambda: status(port, "/ready") == 503)
    assert "the broker is not connected" in probe(port, "/ready")[1]["reasons"]
    assert status(port, "/live") == 200
    server.start()
    eventually(lambda: status(port, "/ready") == 200, within_s=60, what=worker.text)


def test_a_store_that_is_away_is_not_ready_and_live(
    make_fleet: FleetMaker, own_server: Callable[[str], Service]
) -> None:
    """It is asked beside the main loop, which takes tasks all the while."""
    port = free_port()
    store = own_server("postgresql")
    fleet = make_fleet("redis", resilience_store_url=store.url)
    fleet.worker("--health-port", str(port))
    eventually(lambda: status(port, "/ready") == 200)

    store.kill()
    eventually(lambda: status(port, "/ready") == 503, within_s=40)
    assert "the store: " in probe(port, "/ready")[1]["reasons"][0]
    assert status(port, "/live") == 200
    fleet.send("ok").get(timeout=20)


def test_a_taken_health_port_is_refused_at_the_start(make_fleet: FleetMaker) -> None:
    """Before a probe asks somebody else."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fleet = make_fleet("redis", resilience_health_port=f"127.0.0.1:{port}")
        done = fleet.command("worker", "--pool", "solo")
    assert done.returncode == 1
    assert "resilience_health_port: cannot listen on 127.0.0.1" in done.stderr


# --- stop conditions --------------------------------------------------------------------


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


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_body_is_told_that_its_worker_drains(
    make_fleet: FleetMaker, pool: str
) -> None:
    """It ends early by itself, and the worker then."""
    fleet = make_fleet("redis")
    worker = fleet.worker(pool=pool)
    began_at = time.monotonic()
    running(fleet, "until_stopping", end=fleet.folder / "end")
    kill_group(worker, signal.SIGTERM)
    assert worker.wait() == 0
    assert time.monotonic() - began_at < 30
    assert len(fleet.notes("slept")) == 1
