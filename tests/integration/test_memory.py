"""What counts as growth, and what is told of it."""

from __future__ import annotations

import json
from collections import Counter
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


def memory_of(fleet: Fleet, worker: Worker) -> Any:
    """What `celery inspect resilience_memory` says of a worker."""
    command = ("inspect", "resilience_memory", "--json", "-d", "w0@test")
    said = fleet.command(*command)
    assert said.returncode == 0, said.stdout + said.stderr
    return json.loads(said.stdout)[f"{worker.name}@test"]


def test_inspect_names_what_grows(make_fleet: FleetMaker) -> None:
    """With the exact peak of the last run, and the children as they are."""
    fleet = make_fleet("redis", resilience_memory_recycle_mib="50%")
    worker = fleet.worker(concurrency=1)
    sent = [fleet.send("leak", 10), fleet.send("leak", 10), fleet.send("spike", 50)]
    eventually(lambda: done(sent), what=lambda: worker.text[-2000:])

    figures = memory_of(fleet, worker)
    (child,) = figures["children"]
    assert child["runs"] == 3
    assert child["last_task"] == "spike"
    assert 49 <= child["last_peak_mib"] < 70
    assert 19 <= child["growth_mib"] < 40
    assert child["running"] is None
    leak, spike = figures["tasks"]
    assert (leak["task"], leak["runs"]) == ("leak", 2)
    assert 19 <= leak["growth_mib"] < 30
    assert 49 <= spike["peak_mib"] < 70
    assert spike["growth_mib"] < 10
    assert figures["recycle_mib"] > 100
    assert worker.stop() == 0


@pytest.mark.parametrize("is_plain", [False, True], ids=["resilient", "plain"])
def test_a_spike_that_is_given_back_is_no_growth(
    make_fleet: FleetMaker, is_plain: bool
) -> None:
    """Plain Celery takes the peak for the size, and recycles."""
    fleet = make_fleet(
        "redis",
        is_plain=is_plain,
        **(
            {"worker_max_memory_per_child": 150 * 1024}
            if is_plain
            else {"resilience_memory_recycle_mib": 80}
        ),
    )
    worker = fleet.worker(concurrency=1)
    sent = [fleet.send("spike", 300), *(fleet.send("leak", 0) for _ in range(3))]

    eventually(lambda: done(sent), what=lambda: worker.text[-2000:])
    (spiked,), (*after,) = pids(fleet, "spike"), pids(fleet, "leak")
    assert all((pid != spiked) is is_plain for pid in after)


@pytest.mark.parametrize("is_plain", [False, True], ids=["resilient", "plain"])
def test_a_fat_main_process_does_not_recycle_for_ever(
    make_fleet: FleetMaker, is_plain: bool
) -> None:
    """What a child has from the start is not its growth; to plain Celery it is."""
    fleet = make_fleet(
        "redis",
        is_plain=is_plain,
        fleet_ballast_mib=200,
        **(
            {"worker_max_memory_per_child": 150 * 1024}
            if is_plain
            else {"resilience_memory_recycle_mib": 100}
        ),
    )
    worker = fleet.worker(concurrency=1)
    sent = [fleet.send("leak", 0) for _ in range(3)]

    eventually(lambda: done(sent), within_s=60, what=lambda: worker.text[-2000:])
    assert len(set(pids(fleet, "leak"))) == (3 if is_plain else 1)


def test_a_limit_below_what_a_child_needs_is_told(make_fleet: FleetMaker) -> None:
    """What fresh children gain at once is forgiven, and what comes later is not."""
    fleet = make_fleet("redis")
    worker = fleet.worker("--memory-recycle-mib", "20", concurrency=1)
    sent = [fleet.send("leak", 30) for _ in range(8)]

    eventually(lambda: done(sent), within_s=60, what=lambda: worker.text[-2000:])
    assert worker.text.count("it is below what a child needs") == 1
    runs = Counter(pids(fleet, "leak"))
    assert [*runs.values()][:3] == [1, 2, 2]


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_a_pool_without_children_ends_with_its_own_code(
    make_fleet: FleetMaker, pool: str
) -> None:
    """The worker finishes what runs, and its supervisor starts it again."""
    fleet = make_fleet(
        "redis", resilience_memory_recycle_mib=30, resilience_memory_limit_mib=10
    )
    worker = fleet.worker(pool=pool, concurrency=1)
    assert "memory_limit_mib is for the prefork pool" in worker.text
    spike = fleet.send("spike", 100)
    eventually(lambda: done([spike]))
    sent = [fleet.send("leak", 20) for _ in range(2)]

    assert worker.wait() == 12, worker.text[-3000:]
    assert done(sent)
    assert "exits with code 12" in worker.text
    assert worker.outcomes() == {"received": 3, "succeeded": 3}
