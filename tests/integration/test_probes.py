"""`/live` and `/ready` tell the truth, whatever the worker is in the middle of."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from conftest import FleetMaker
from draining_fleets import running
from polling import always, eventually
from services import Service, free_port


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
    eventually(lambda: status(port, "/ready") == 200, what=lambda: worker.text)
    assert status(port, "/live") == 200
    assert status(port, "/elsewhere") == 404
    end = fleet.folder / "end"
    running(fleet, "sleep", end=end)
    assert probe(port, "/live")[1]["running"] == 1

    worker.signal(signal.SIGTERM)
    eventually(lambda: probe(port, "/ready")[0] == 503)
    assert "it drains" in probe(port, "/ready")[1]["reasons"]
    assert status(port, "/live") == 200
    end.touch()
    assert worker.wait() == 0


def test_a_worker_whose_children_are_all_frozen_is_not_live(
    make_fleet: FleetMaker,
) -> None:
    """`inspect ping` says that all is well; and after SIGCONT it is."""
    port = free_port()
    fleet = make_fleet(
        "redis",
        fleet_constants={"celery_resilience.lifecycle.health.CHILDREN_STUCK_S": 1.0},
    )
    worker = fleet.worker("--health-port", str(port), concurrency=2)
    eventually(lambda: status(port, "/live") == 200)
    children = worker.children()
    os.kill(children[0], signal.SIGSTOP)
    always(lambda: status(port, "/live") == 200, for_s=3)

    os.kill(children[1], signal.SIGSTOP)
    fleet.send("ok")
    eventually(lambda: status(port, "/live") == 503)
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
    eventually(
        lambda: status(port, "/ready") == 200, within_s=60, what=lambda: worker.text
    )


def test_a_store_that_is_away_is_not_ready_and_live(
    make_fleet: FleetMaker, own_server: Callable[[str], Service]
) -> None:
    """It is asked beside the main loop, which takes tasks all the while."""
    port = free_port()
    store = own_server("postgresql")
    fleet = make_fleet(
        "redis",
        resilience_store_url=store.url,
        fleet_constants={"celery_resilience.lifecycle.watch.STORE_S": 1.0},
    )
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
