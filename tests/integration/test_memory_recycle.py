"""A child that is recycled between two tasks loses nothing, and nobody waits for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually


def done(sent: list[Any]) -> bool:
    """Whether all of them have succeeded."""
    return all(result.state == "SUCCESS" for result in sent)


def pids(fleet: Fleet, name: str) -> list[int]:
    """The child of each run of a task, in order."""
    return [line[2] for line in fleet.notes(name)]


@pytest.mark.parametrize(
    ("broker", "is_late"),
    [("redis", True), ("rabbitmq", False), ("filesystem", True)],
)
def test_a_child_that_grew_is_recycled(
    make_fleet: FleetMaker, broker: str, is_late: bool
) -> None:
    """At every tenth task or so; nothing is lost, run twice or taken for a crash."""
    fleet = make_fleet(
        broker,
        task_acks_late=is_late,
        resilience_memory_recycle_mib=40,
        worker_prefetch_multiplier=4,
    )
    worker = fleet.worker()
    sent = [fleet.send("leak", 5) for _ in range(30)]

    eventually(lambda: done(sent), within_s=60, what=lambda: worker.text[-2000:])
    assert worker.stop() == 0
    assert sorted(line[1] for line in fleet.notes("leak")) == sorted(r.id for r in sent)
    assert worker.outcomes() == {"received": 30, "succeeded": 30}
    assert "WorkerLost" not in worker.text
    assert 2 <= worker.text.count("is recycled") <= 8
    assert "most by leak" in worker.text


def gaps(fleet: Fleet) -> list[float]:
    """Seconds from the end of a run to the start of the next, in the only slot."""
    ends = [line[3] for line in fleet.notes("ended")]
    starts = [line[3] for line in fleet.notes("leak")]
    return sorted(start - end for end, start in zip(ends, starts[1:], strict=False))


def test_a_recycled_childs_slot_is_free_at_once(make_fleet: FleetMaker) -> None:
    """Within 0.2 s on a quiet machine; with plain Celery half of them take five."""
    fleet = make_fleet("redis", fleet_recycle_every=1, worker_prefetch_multiplier=10)
    worker = fleet.worker(concurrency=1)
    sent = [fleet.send("leak", 0) for _ in range(14)]

    eventually(lambda: done(sent), within_s=60, what=lambda: worker.text[-2000:])
    assert len(set(pids(fleet, "leak"))) == 14
    assert gaps(fleet)[7] < 2
    assert gaps(fleet)[-1] < 4


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_childs_collection_copies_nothing_of_the_main_process(
    make_fleet: FleetMaker, is_plain: bool
) -> None:
    """With plain Celery it writes to each object that it shares."""
    fleet = make_fleet("redis", is_plain=is_plain, fleet_cold=True)
    fleet.worker(concurrency=1)

    fleet.send("collect_garbage")

    before, after = eventually(
        lambda: found if len(found := fleet.notes("private_kib")) == 2 else None
    )
    assert (after[1] - before[1] < 2_048) != is_plain


@pytest.mark.parametrize(
    ("broker", "is_late", "every", "count"),
    [
        ("redis", False, 1, 24),
        ("redis", True, 10, 200),
        ("rabbitmq", True, 1, 24),
        ("filesystem", False, 1, 12),
    ],
)
def test_a_recycle_loses_nothing(
    make_fleet: FleetMaker, broker: str, is_late: bool, every: int, count: int
) -> None:
    """Nor doubles it, nor is it taken for a crash."""
    fleet = make_fleet(
        broker,
        task_acks_late=is_late,
        fleet_recycle_every=every,
        worker_prefetch_multiplier=4,
    )
    worker = fleet.worker(concurrency=4)
    sent = [fleet.send("leak", 0) for _ in range(count)]

    eventually(lambda: len(fleet.notes("ended")) >= count, within_s=120, every_s=0.5)
    eventually(lambda: done(sent), what=lambda: worker.text[-2000:])
    assert worker.stop() == 0
    assert sorted(line[1] for line in fleet.notes("leak")) == sorted(r.id for r in sent)
    assert len(set(pids(fleet, "leak"))) >= count // every
    assert worker.outcomes() == {"received": count, "succeeded": count}
    assert "WorkerLost" not in worker.text
    assert "exited with" not in worker.text


def test_spawned_children_are_recycled_too(make_fleet: FleetMaker) -> None:
    """They share nothing with the main process but what they open."""
    fleet = make_fleet(
        "redis", resilience_memory_limit_mib=100, worker_pool_start_method="spawn"
    )
    (fleet.folder / "fleet_worker.py").write_text(SPAWNED)
    worker = fleet.worker("--memory-recycle-mib", "20", concurrency=1)
    greedy = fleet.send("greedy", "at once")
    sent = [fleet.send("leak", 11) for _ in range(4)]

    assert fleet.record_of(greedy.id)["reason"] == "memory_limit"
    eventually(lambda: done(sent), within_s=60, what=lambda: worker.text[-2000:])
    first, second, third, fourth = pids(fleet, "leak")
    assert first == second != third == fourth
    assert fleet.notes("handlers wait") == [["handlers wait", True]] * 4
    said = fleet.command("inspect", "resilience_memory", "--json", "-d", "w0@test")
    figures = json.loads(said.stdout)["w0@test"]
    assert figures["recycled"] >= 1
    assert figures["tasks"][0]["task"] == "leak"
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 5, "succeeded": 4, "failed": 1}


SPAWNED = """
import json, os
from celery import Celery
from celery_resilience import Resilience, ResilientTask, soft_limit
from fleet import note
from memory_tasks import kept, take

app = Celery("fleet", set_as_current=False)
app.conf.update(json.loads(os.environ["FLEET_CONF"]))
Resilience(app)

@app.task(name="leak", base=ResilientTask, bind=True, shared=False)
def leak(self, mib):
    note("leak", self.request.id, os.getpid())
    note("handlers wait", soft_limit._waiting is not None)
    take(mib, kept)

@app.task(name="greedy", base=ResilientTask, shared=False)
def greedy(how):
    bytearray(2 << 30)
"""
