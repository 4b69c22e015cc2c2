"""A broken dependency is left alone by the whole fleet, and no task is lost by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually

#: A broker, and the store of its circuits.
FLEETS = [("redis", "redis"), ("rabbitmq", "postgresql"), ("filesystem", "sqlite")]

#: Opens at the third failure of three.
QUICK: dict[str, Any] = {"min_calls": 3, "failure_rate": 0.5, "jitter": 0}


@pytest.fixture
def down(tmp_path: Path) -> Path:
    """The dependency is away while this file is there."""
    path = tmp_path / "down"
    path.touch()
    return path


def fleet_with(make_fleet: FleetMaker, *, open_s: float, **bank: Any) -> Fleet:
    """On Redis alone."""
    return make_fleet(
        "redis", resilience_circuits={"bank": {**QUICK, "open_s": open_s, **bank}}
    )


def trip(fleet: Fleet, down: Path) -> None:
    """Let it open."""
    for _ in range(3):
        fleet.send("pay", str(down))
        seen = len(fleet.notes("failed_call"))
        eventually(lambda seen=seen: len(fleet.notes("failed_call")) > seen)
    eventually(lambda: "circuit bank opened" in texts(fleet), what=texts(fleet)[-3000:])


def texts(fleet: Fleet) -> str:
    """What all workers have logged."""
    return "\n".join(worker.text for worker in fleet.workers)


def result_of(fleet: Fleet, result: Any, within_s: float = 30) -> Any:
    """What a task came to."""
    eventually(result.ready, within_s=within_s, what=texts(fleet)[-4000:])
    return result.get(timeout=1)


@pytest.mark.parametrize(("broker", "store"), FLEETS)
def test_tasks_wait_for_an_open_circuit_and_spend_no_retry(
    make_fleet: FleetMaker, down: Path, broker: str, store: str
) -> None:
    """They are sent again, and done once the dependency is back."""
    fleet = make_fleet(
        broker,
        store="sqlite" if store == "redis" else store,
        resilience_circuits={"bank": {**QUICK, "open_s": 4}},
    )
    fleet.worker()
    trip(fleet, down)

    waiting = [fleet.send("pay", str(down)) for _ in range(10)]
    eventually(lambda: texts(fleet).count(" retry: ") >= 10, what=texts(fleet)[-3000:])
    down.unlink()

    assert [result_of(fleet, it, 60) for it in waiting] == ["paid"] * 10
    runs = [line for line in fleet.notes("pay") if line[1] in {w.id for w in waiting}]
    assert {line[2] for line in runs} == {0}
    assert len(runs) == 10
    fleet.workers[0].stop()
    counts = fleet.workers[0].outcomes()
    assert counts["succeeded"] == 10
    assert counts["snoozed"] >= 10
    assert counts["failed"] == 3
