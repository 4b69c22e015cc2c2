"""A run that takes more memory than it may is failed alone, in one of three ways."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FleetMaker
from fleet_runner import Worker
from polling import eventually

CAP_MIB = 300


def done(sent: list[Any]) -> bool:
    """Whether all of them have succeeded."""
    return all(result.state == "SUCCESS" for result in sent)


def sizes_mib(worker: Worker) -> Iterator[float]:
    """Resident memory of each child."""
    for pid in worker.children():
        with contextlib.suppress(psutil.Error):
            yield psutil.Process(pid).memory_info().rss / (1 << 20)


def watched(worker: Worker) -> Callable[[], float]:
    """Watches a worker's children; ends with what one had at most above its start."""
    at_start = min(sizes_mib(worker))
    most, end = [0.0], threading.Event()

    def look() -> None:
        while not end.wait(0.01) and worker.is_alive:
            most[0] = max(most[0], *sizes_mib(worker), 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()

    def stop() -> float:
        end.set()
        thread.join()
        return most[0] - at_start

    return stop


@pytest.mark.parametrize(
    ("broker", "name", "how"),
    [
        ("redis", "greedy", "at once"),
        ("redis", "greedy_late", "in steps"),
        ("rabbitmq", "greedy_late", "at once"),
        ("filesystem", "greedy", "in steps"),
        ("redis", "greedy", "in crumbs"),
    ],
)
def test_an_allocation_above_the_limit_fails_in_the_task(
    make_fleet: FleetMaker, broker: str, name: str, how: str
) -> None:
    """The run is failed as memory_limit with the figures, and its child lives."""
    fleet = make_fleet(broker, resilience_memory_limit_mib=CAP_MIB)
    worker = fleet.worker()
    stop = watched(worker)
    children = sorted(worker.children())
    neighbours = [fleet.send("hold", 1, 0.3) for _ in range(3)]
    sent = fleet.send(name, how)
    neighbours += [fleet.send("hold", 1, 0.3) for _ in range(3)]

    record = fleet.record_of(sent.id)
    eventually(lambda: done(neighbours), what=worker.text[-3000:])
    assert record["reason"] == "memory_limit"
    assert "with a limit of 300 MiB" in record["message"]
    assert record["exception"].endswith("MemoryLimitExceeded")
    eventually(lambda: sent.state == "FAILURE")
    assert fleet.runs(sent.id) == 1
    assert sorted(worker.children()) == children
    assert stop() < 1.5 * CAP_MIB
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 7, "succeeded": 6, "failed": 1}


@pytest.mark.parametrize(
    ("broker", "name"), [("redis", "unbridled"), ("filesystem", "unbridled_late")]
)
def test_where_nothing_is_enforced_the_run_is_signalled(
    make_fleet: FleetMaker, broker: str, name: str
) -> None:
    """It cleans up, fails as memory_limit, and its child lives."""
    fleet = make_fleet(broker, resilience_memory_limit_mib=CAP_MIB)
    worker = fleet.worker()
    stop = watched(worker)
    children = sorted(worker.children())
    sent = fleet.send(name, "in steps")

    record = fleet.record_of(sent.id)
    assert record["reason"] == "memory_limit"
    assert "it was signalled" in record["message"]
    assert fleet.notes("cleaned up") == [["cleaned up", sent.id, "MemoryLimitExceeded"]]
    assert fleet.runs(sent.id) == 1
    assert sorted(worker.children()) == children
    assert stop() < 1.5 * CAP_MIB
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 1, "failed": 1}


@pytest.mark.parametrize(
    ("broker", "name", "how"),
    [
        ("redis", "unbridled", "at once"),
        ("redis", "unbridled_late", "deaf"),
        ("rabbitmq", "unbridled_late", "deaf"),
        ("filesystem", "unbridled", "deaf"),
    ],
)
def test_what_does_not_hear_the_signal_is_ended(
    make_fleet: FleetMaker, broker: str, name: str, how: str
) -> None:
    """That one child, which is replaced; its run fails once, and does not come again."""
    fleet = make_fleet(broker, resilience_memory_limit_mib=CAP_MIB)
    worker = fleet.worker()
    stop = watched(worker)
    neighbours = [fleet.send("hold", 1, 0.3) for _ in range(3)]
    sent = fleet.send(name, how)
    neighbours += [fleet.send("hold", 1, 0.3) for _ in range(3)]

    record = fleet.record_of(sent.id)
    eventually(lambda: done(neighbours), what=worker.text[-3000:])
    assert record["reason"] == "memory_limit"
    assert "was ended" in record["message"]
    eventually(lambda: sent.state == "FAILURE")
    assert fleet.runs(sent.id) == 1
    # One call into C fills gigabytes in a second, between two looks.
    assert stop() < (2_048 if how == "at once" else 1.5 * CAP_MIB)
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 7, "succeeded": 6, "failed": 1}


@pytest.mark.parametrize("is_plain", [False, True], ids=["resilient", "plain"])
def test_a_limit_is_for_the_tasks_that_have_it(
    make_fleet: FleetMaker, is_plain: bool
) -> None:
    """A task's own beats the flag, which beats the setting; plain Celery has none."""
    fleet = make_fleet("redis", is_plain=is_plain, resilience_memory_limit_mib=5_000)
    flags = [] if is_plain else ["--memory-limit-mib", "100"]
    fleet.worker(*flags, concurrency=1)
    allowed = fleet.send("greedy_unlimited", 200)
    refused = fleet.send("greedy", "in steps", 200)

    eventually(lambda: allowed.state == "SUCCESS")
    eventually(lambda: refused.state == ("SUCCESS" if is_plain else "FAILURE"))
    assert bool(fleet.notes("survived")) is is_plain


def test_in_a_full_container_the_largest_run_goes_first(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """It fails as memory_limit with the container's figures; the other goes on."""
    container = tmp_path / "cgroups"
    container.mkdir()
    (container / "memory.max").write_text(str(1_000 << 20))
    (container / "memory.stat").write_text("inactive_file 0\n")

    def fill(used_mib: int) -> None:
        (container / "memory.current").write_text(str(used_mib << 20))

    fill(500)
    fleet = make_fleet(
        "redis", resilience_memory_recycle_mib="50%", fleet_cgroups=str(container)
    )
    worker = fleet.worker()
    end = tmp_path / "end"
    small = fleet.send("hold", 5, 60, str(end))
    large = fleet.send("hold", 60, 60, str(end))
    eventually(lambda: len(fleet.notes("holds")) == 2)

    fill(850)
    eventually(lambda: "has used 850 of its 1000 MiB" in worker.text)
    fill(960)
    eventually(lambda: "was the largest" in worker.text)
    fill(500)
    end.touch()
    record = fleet.record_of(large.id)
    assert record["reason"] == "memory_limit"
    assert "had used 960 of its 1000 MiB" in record["message"]
    eventually(lambda: done([small]))
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 2, "succeeded": 1, "failed": 1}
