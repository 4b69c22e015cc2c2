"""Snoozed tasks wait in the store where a worker would hold too many of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from metrics_page import OUTCOMES, MetricsPage
from polling import eventually
from services import Service, free_port

from celery_resilience.install import installation_of

#: Tasks that are snoozed, and how many of them come back in this test.
SNOOZED = 5_000
COME_BACK = 250

#: MiB by which no process of the worker may grow meanwhile.
GROWS_MIB = 20

#: Seconds for which the tasks of a killed worker are snoozed.
WAITS_S = 9

#: Opens at the third failure of three.
QUICK: dict[str, Any] = {"min_calls": 3, "jitter": 0}


@pytest.fixture
def down(tmp_path: Path) -> Path:
    """The dependency is away while this file is there."""
    path = tmp_path / "down"
    path.touch()
    return path


def shelved(fleet: Fleet) -> int:
    """How many messages wait in the store."""
    claimed = installation_of(fleet.app).shelf_store().claim(0, 60.0)
    others: int = claimed.others
    return others


def rss_mib(worker: Worker) -> dict[int, float]:
    """What each process of a worker has in memory now."""
    pids = [worker.pid, *worker.children()]
    return {pid: psutil.Process(pid).memory_info().rss / 2**20 for pid in pids}


def trip(fleet: Fleet, down: Path) -> None:
    """Let the circuit open."""
    for _ in range(3):
        fleet.send("pay", str(down))
    eventually(
        lambda: any("circuit bank opened" in w.text for w in fleet.workers),
        what=lambda: fleet.workers[0].text[-3000:],
    )


def unrelated_s(fleet: Fleet) -> float:
    """Seconds until a task of another queue has started."""
    began = time.monotonic()
    sent = fleet.send("ok", queue="other", routing_key="other")
    eventually(lambda: fleet.runs(sent.id), within_s=20, every_s=0.01)
    return time.monotonic() - began


def paid(fleet: Fleet, ids: set[str]) -> list[list[Any]]:
    """The runs of these tasks."""
    return [line for line in fleet.notes("pay") if line[1] in ids]


class Snoozed:
    """
    A task that another worker has sent again, many times.

    Args:
        fleet: Without a worker that would take it.
        server: Its broker.
    """

    def __init__(self, fleet: Fleet, server: Any, down: Path) -> None:
        self._server = server
        self._at = datetime.now(UTC)
        self._mark = uuid4().hex
        marks = {"sent": self._mark, "waits_since": self._at.timestamp()}
        headers = {"resilience": marks}
        self._id = fleet.send("pay", str(down), eta=self._at, headers=headers).id
        prefix = fleet.conf["broker_transport_options"]["global_keyprefix"]
        self._queue = f"{prefix}{fleet.app.conf.task_default_queue}"
        self._raw: str = server.rpop(self._queue).decode()
        assert self._at.isoformat() in self._raw
        self._tag: str = json.loads(self._raw)["properties"]["delivery_tag"]

    def send(self, delays_s: list[float]) -> list[str]:
        """Put one on the queue for each of the delays; returns their ids."""
        ids = [str(uuid4()) for _ in delays_s]
        now = datetime.now(UTC)
        with self._server.pipeline(transaction=False) as pipe:
            for task_id, delay_s in zip(ids, delays_s, strict=True):
                eta = (now + timedelta(seconds=delay_s)).isoformat()
                copy = self._raw.replace(self._id, task_id)
                copy = copy.replace(self._mark, uuid4().hex)
                copy = copy.replace(self._tag, str(uuid4()))
                pipe.lpush(self._queue, copy.replace(self._at.isoformat(), eta))
            pipe.execute()
        return ids


def test_five_thousand_snoozed_tasks_are_held_by_nobody(
    make_fleet: FleetMaker, servers: Callable[[str], Service], down: Path
) -> None:
    """The worker stays small and quick; those that are due come back, each once."""
    import redis

    fleet = make_fleet(
        "redis",
        resilience_circuits={"bank": {**QUICK, "open_s": 9, "release_per_s": 1_000}},
        task_default_queue="bank",
        fleet_queues={"bank": {}, "other": {}},
        task_ignore_result=True,
    )
    server = redis.Redis.from_url(servers("redis").url)
    snoozed = Snoozed(fleet, server, down)
    worker = fleet.worker()
    trip(fleet, down)
    # The bank is back; the first that is due finds out.
    down.unlink()
    before = rss_mib(worker)

    rate = SNOOZED // COME_BACK
    delays_s = [10.0 if n % rate == 0 else 3_600.0 for n in range(SNOOZED)]
    ids = snoozed.send(delays_s)
    back = {it for it, s in zip(ids, delays_s, strict=True) if s < 60}
    # The worker holds a thousand, and those that are due may have come back.
    at_least = SNOOZED - len(back) - 1_010
    waits = [unrelated_s(fleet)]
    eventually(
        lambda: shelved(fleet) >= at_least,
        within_s=120,
        every_s=0.2,
        what=lambda: worker.text[-2000:],
    )
    waits += [unrelated_s(fleet) for _ in range(2)]
    grown = {pid: rss - before.get(pid, rss) for pid, rss in rss_mib(worker).items()}

    eventually(
        lambda: len(paid(fleet, back)) >= len(back),
        within_s=120,
        every_s=0.2,
        what=lambda: worker.text[-2000:],
    )
    assert max(grown.values()) < GROWS_MIB
    assert max(waits) < 1
    runs = paid(fleet, back)
    assert sorted(line[1] for line in runs) == sorted(back)
    assert {line[2] for line in runs} == {0}
    worker.stop()
    counts = worker.outcomes()
    assert counts["requeued"] >= at_least
    assert sum(counts.values()) == 2 * counts["received"]


@pytest.mark.parametrize(
    ("broker", "store", "pool", "is_enabled"),
    [
        ("rabbitmq", "postgresql", "prefork", True),
        ("redis", "mariadb", "threads", False),
    ],
)
def test_a_killed_worker_leaves_its_snoozed_tasks_to_another(
    make_fleet: FleetMaker,
    monkeypatch: pytest.MonkeyPatch,
    broker: str,
    store: str,
    pool: str,
    is_enabled: bool,
) -> None:
    """Which runs each once when it is due, also where celery-resilience is off by then."""
    monkeypatch.setenv("FLEET_MOST_HELD", "0")
    fleet = make_fleet(broker, store=store, task_acks_late=True)
    page = MetricsPage(free_port())
    first = fleet.worker(*page.flags, pool=pool)
    sent = [fleet.send("snoozed_for", WAITS_S) for _ in range(10)]
    eventually(lambda: shelved(fleet) == 10, what=lambda: first.text[-3000:])
    # They are acknowledged by then; killed before, it would leave the broker's copy too.
    eventually(lambda: page.sum(OUTCOMES, outcome="requeued") == 10)
    first.kill()
    fleet.conf["resilience_enabled"] = is_enabled
    second = fleet.worker(pool=pool)

    eventually(
        lambda: all(fleet.runs(it.id) >= 2 for it in sent),
        within_s=60,
        what=lambda: second.text[-3000:],
    )
    second.stop()
    assert shelved(fleet) == 0
    assert [fleet.runs(it.id) for it in sent] == [2] * 10
    assert not is_enabled or second.outcomes()["succeeded"] == 10
