"""A run that takes more memory than it may is failed alone, in one of three ways."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import BROKERS, FleetMaker, conf_for
from fleet_runner import Fleet, Worker, fleet_on
from polling import eventually
from services import Service

CAP_MIB = 300


def done(sent: list[Any]) -> bool:
    """Whether all of them have succeeded."""
    return all(result.state == "SUCCESS" for result in sent)


def sizes_mib(worker: Worker) -> dict[int, float]:
    """Resident memory of each child."""
    found = {}
    for pid in worker.children():
        with contextlib.suppress(psutil.Error):
            found[pid] = psutil.Process(pid).memory_info().rss / (1 << 20)
    return found


def watched(worker: Worker) -> Callable[[], float]:
    """Watches a worker's children; ends with what one had at most above its start."""
    at_start = sizes_mib(worker)
    fresh = min(at_start.values())
    most, end = [0.0], threading.Event()

    def look() -> None:
        while not end.wait(0.01) and worker.is_alive:
            for pid, size in sizes_mib(worker).items():
                most[0] = max(most[0], size - at_start.get(pid, fresh))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()

    def stop() -> float:
        end.set()
        thread.join()
        return most[0]

    return stop


class Limited:
    """A worker whose runs have a limit, which several tests use."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.worker = fleet.worker()
        self._failed = self._succeeded = 0

    def fails(self, name: str, how: str, *, most_mib: float = 1.5 * CAP_MIB) -> Any:
        """One run fails with a record, which is returned, and its neighbours do not."""
        fleet, worker = self.fleet, self.worker
        stop = watched(worker)
        neighbours = [fleet.send("hold", 1, 0.3) for _ in range(3)]
        sent = fleet.send(name, how)
        neighbours += [fleet.send("hold", 1, 0.3) for _ in range(3)]

        record = fleet.record_of(sent.id)
        self._failed += 1
        self._succeeded += len(neighbours)
        eventually(lambda: done(neighbours), what=lambda: worker.text[-3000:])
        eventually(lambda: sent.state == "FAILURE")
        assert record["reason"] == "memory_limit"
        assert record["exception"].endswith("MemoryLimitExceeded")
        assert fleet.runs(sent.id) == 1
        assert stop() < most_mib
        return record

    def end(self) -> None:
        """Stop the worker: it has had one outcome for each message, and no other."""
        assert self.worker.stop() == 0
        assert self.worker.outcomes() == {
            "received": self._failed + self._succeeded,
            "succeeded": self._succeeded,
            "failed": self._failed,
        }


@pytest.fixture(scope="module")
def limited_on(
    servers: Callable[[str], Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Limited]]:
    """The worker on each broker."""
    made: dict[str, Limited] = {}
    with contextlib.ExitStack() as stack:

        def get(broker: str) -> Limited:
            if broker not in made:
                name = BROKERS[broker]
                conf = conf_for(
                    broker,
                    tmp_path_factory.mktemp(broker),
                    None if name is None else servers(name),
                    resilience_memory_limit_mib=CAP_MIB,
                )
                folder = tmp_path_factory.mktemp("limited")
                fleet = stack.enter_context(fleet_on(folder, conf))
                made[broker] = Limited(fleet)
                stack.callback(made[broker].end)
            return made[broker]

        yield get


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
    limited_on: Callable[[str], Limited], broker: str, name: str, how: str
) -> None:
    """The run is failed as memory_limit with the figures, and its child lives."""
    limited = limited_on(broker)
    children = sorted(limited.worker.children())

    record = limited.fails(name, how)

    assert "with a limit of 300 MiB" in record["message"]
    assert sorted(limited.worker.children()) == children


@pytest.mark.parametrize(
    ("broker", "name"), [("redis", "unbridled"), ("filesystem", "unbridled_late")]
)
def test_where_nothing_is_enforced_the_run_is_signalled(
    limited_on: Callable[[str], Limited], broker: str, name: str
) -> None:
    """It cleans up, fails as memory_limit, and its child lives."""
    limited = limited_on(broker)
    children = sorted(limited.worker.children())

    record = limited.fails(name, "in steps")

    assert "it was signalled" in record["message"]
    cleaned = ["cleaned up", record["task_id"], "MemoryLimitExceeded"]
    assert limited.fleet.notes("cleaned up") == [cleaned]
    assert sorted(limited.worker.children()) == children


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
    limited_on: Callable[[str], Limited], broker: str, name: str, how: str
) -> None:
    """That one child, which is replaced; its run fails once, and does not come again."""
    limited = limited_on(broker)
    children = sorted(limited.worker.children())

    # One call into C fills gigabytes in a second, between two looks.
    most_mib = 2_048 if how == "at once" else 1.5 * CAP_MIB
    record = limited.fails(name, how, most_mib=most_mib)

    assert "was ended" in record["message"]
    eventually(lambda: len(limited.worker.children()) == len(children))
    assert sorted(limited.worker.children()) != children


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
