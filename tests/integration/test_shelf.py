"""Snoozed tasks wait in the store where a worker would hold too many of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually

from celery_resilience.install import installation_of

#: Tasks that are snoozed at once.
MANY = 2_500

#: MiB by which the main process may grow meanwhile.
GROWS_MIB = 20


def shelved(fleet: Fleet) -> int:
    """How many messages wait in the store."""
    claimed = installation_of(fleet.app).shelf_store().claim(0, 60.0)
    others: int = claimed.others
    return others


def rss_mib(pid: int) -> float:
    """What a process has in memory now."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def wait_for_an_unrelated_task(fleet: Fleet) -> float:
    """Seconds until a task of another queue has run."""
    began = time.monotonic()
    sent = fleet.send("ok", queue="other", routing_key="other")
    eventually(lambda: fleet.runs(sent.id), within_s=10, every_s=0.01)
    return time.monotonic() - began


def test_five_thousand_snoozed_tasks_are_held_by_nobody(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """The worker stays small and quick; all are done once when the bank is back."""
    down = tmp_path / "down"
    down.touch()
    bank = {"min_calls": 3, "open_s": 14, "jitter": 0, "release_per_s": 1_000}
    fleet = make_fleet(
        "redis",
        resilience_circuits={"bank": bank},
        task_default_queue="bank",
        fleet_queues={"bank": {}, "other": {}},
        task_ignore_result=True,
        worker_prefetch_multiplier=4,
    )
    worker = fleet.worker()
    for _ in range(3):
        fleet.send("pay", str(down))
    eventually(lambda: "circuit bank opened" in worker.text, what=worker.text[-3000:])
    before = rss_mib(worker.pid)
    t0 = time.monotonic()

    sent = {fleet.send("pay", str(down)).id for _ in range(MANY)}
    print("sent", time.monotonic() - t0)
    waits = [wait_for_an_unrelated_task(fleet)]
    eventually(lambda: shelved(fleet) > MANY - 1_250, within_s=60, every_s=0.2)
    print("shelved", time.monotonic() - t0, shelved(fleet), waits)
    waits += [wait_for_an_unrelated_task(fleet) for _ in range(3)]
    grown = rss_mib(worker.pid) - before
    down.unlink()
    print("grown", grown, waits, time.monotonic() - t0)

    paid: list[Any] = eventually(
        lambda: (
            (lines := [n for n in fleet.notes("pay") if n[1] in sent])
            and len(lines) >= MANY
            and lines
        ),
        within_s=90,
        every_s=0.5,
        what=worker.text[-2000:],
    )
    print("paid", time.monotonic() - t0)
    assert grown < GROWS_MIB
    assert max(waits) < 1
    assert len(paid) == MANY
    assert {line[2] for line in paid} == {0}
    assert shelved(fleet) == 0
    worker.stop()
    counts = worker.outcomes()
    print(counts)
    assert counts["failed"] == 3
    assert sum(counts.values()) == 2 * counts["received"]
