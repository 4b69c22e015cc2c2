"""What the main process does to children that take too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.events import observe
from celery_resilience.memory import slots as s
from celery_resilience.memory.container import Container, find_container
from celery_resilience.memory.policy import GRACE_S, LOOK_CLOSELY_S, LOOK_S
from celery_resilience.memory.slots import Slots
from celery_resilience.memory.watch import (
    GONE_WITHIN_S,
    IDLE_LOOK_S,
    Hands,
    MemoryWatch,
)

MIB = 1_024


@dataclass
class Pool:
    """A pool of children that are numbers, and a watch over it."""

    container: Container | None = None
    has_limits: bool = True
    now: float = 1_000.0
    own_kib: dict[int, int] = field(default_factory=dict)
    signalled: list[int] = field(default_factory=list)
    ended: list[tuple[int, MemoryLimitExceeded]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = Slots(["leak", "ship"])
        self.watch = MemoryWatch(
            slots=self.slots,
            own_kib_of=self.own_kib.get,
            has_limits=self.has_limits,
            is_enforced=True,
            recycle_kib=100 * MIB,
            container=self.container,
            clock=lambda: self.now,
        )

    def child(
        self, place: int, *, own_mib: int, limit_mib: int = 0, task: str = "leak"
    ) -> memoryview[int]:
        """A child that runs *task*, which it began with 10 MiB."""
        slot = self.slots.opened(place)
        assert slot is not None
        slot[s.PID] = 100 + place
        slot[s.RUNS] += 1
        slot[s.RUNNING] = self.slots.row(task) + 1
        slot[s.OWN] = 10 * MIB
        slot[s.LIMIT] = limit_mib * MIB
        slot[s.HEARS] = 1
        self.own_kib[100 + place] = own_mib * MIB
        return slot

    def look(self, after_s: float = 0.0) -> float:
        """Let the watch look."""
        self.now += after_s
        return self.watch.look(
            Hands(
                signal=self.signalled.append,
                end=lambda pid, why: self.ended.append((pid, why)),
            )
        )


@pytest.fixture
def events() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What was emitted."""
    seen: list[tuple[str, dict[str, Any]]] = []
    names = ("recycled", "signalled", "ended", "container_filled")

    def observer_of(name: str) -> Any:
        return lambda **facts: seen.append((name, facts))

    stops = [observe(f"memory.{name}", observer_of(name)) for name in names]
    yield seen
    for stop in stops:
        stop()


def test_a_run_within_its_limit_is_left_alone() -> None:
    """And one without a limit is not even looked at."""
    pool = Pool()
    pool.child(0, own_mib=60, limit_mib=200)
    pool.child(1, own_mib=9_000)

    assert pool.look() == LOOK_S
    assert not pool.signalled
    assert not pool.ended


def test_a_run_near_its_limit_is_looked_at_closely() -> None:
    """Of no limits, nothing is near."""
    pool = Pool()
    pool.child(0, own_mib=160, limit_mib=200)

    assert pool.look() == LOOK_CLOSELY_S
    assert Pool(has_limits=False).look() == IDLE_LOOK_S


def test_a_run_above_its_limit_is_signalled_then_ended(events: list[Any]) -> None:
    """Once each, with the figures and the name."""
    pool = Pool()
    pool.child(0, own_mib=230, limit_mib=200)
    pool.look()
    pool.look(GRACE_S - 0.1)
    assert pool.signalled == [100]
    assert not pool.ended

    pool.look(0.1)
    pool.look(0.1)
    ((pid, why),) = pool.ended
    assert (pid, why.task, why.used_mib, why.limit_mib) == (100, "leak", 220.0, 200.0)
    assert "220 MiB more than at its start, with a limit of 200 MiB" in str(why)
    assert [name for name, _ in events] == ["signalled", "ended"]


@pytest.mark.parametrize("what", ["far above", "does not hear"])
def test_some_are_not_waited_for(what: str) -> None:
    """What grows so fast, or has no handler yet."""
    pool = Pool()
    slot = pool.child(0, own_mib=300 if what == "far above" else 230, limit_mib=200)
    slot[s.HEARS] = what == "far above"
    pool.look()

    assert not pool.signalled
    assert [pid for pid, _ in pool.ended] == [100]


def test_the_next_run_begins_anew() -> None:
    """Its child had been signalled for another one."""
    pool = Pool()
    pool.child(0, own_mib=230, limit_mib=200)
    pool.look()
    pool.child(0, own_mib=230, limit_mib=200)[s.RUNS] = 2
    pool.look(2 * GRACE_S)

    assert pool.signalled == [100, 100]
    assert not pool.ended


def test_a_run_that_ends_meanwhile_is_not_touched() -> None:
    """Its child may have another by now."""
    pool = Pool()
    slot = pool.child(0, own_mib=900, limit_mib=200)

    def ends_meanwhile(pid: int) -> int:
        slot[s.RUNS] += 1
        return 900 * MIB

    pool.watch.own_kib_of = ends_meanwhile
    pool.look()
    assert not pool.ended
    pool.watch.own_kib_of = lambda pid: None
    pool.look()
    assert not pool.ended


def test_each_recycle_is_told_once(events: list[Any]) -> None:
    """With the task, and how much it was."""
    pool = Pool()
    slot = pool.child(0, own_mib=10)
    slot[s.RECYCLED], slot[s.RECYCLED_AT] = 2, 150 * MIB
    slot[s.RECYCLED_GREW], slot[s.RECYCLED_TASK] = 120 * MIB, pool.slots.row("leak")
    pool.look()
    pool.look()

    facts = {"task": "leak", "rss_mib": 150.0, "growth_mib": 120.0, "limit_mib": 100.0}
    assert events == [("recycled", facts)] * 2


def test_a_child_that_starts_is_not_taken_for_its_neighbour(events: list[Any]) -> None:
    """Its slot is nobody's for a moment."""
    pool = Pool()
    first = pool.child(0, own_mib=10)
    pool.child(1, own_mib=10)[s.RECYCLED] = 1
    pool.look()
    first[s.PID] = 0
    pool.look()

    assert len(events) == 1


# --- the container ---------------------------------------------------------------------------


def filled(tmp_path: Path, used_mib: int) -> Container:
    """A container of 1 000 MiB."""
    (tmp_path / "memory.max").write_text(str(1_000 << 20))
    (tmp_path / "memory.current").write_text(str(used_mib << 20))
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    container = find_container(tmp_path, tmp_path / "none")
    assert container is not None
    return container


def test_a_container_that_fills_is_told(
    tmp_path: Path, events: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """At each level once, and again after it was below."""
    pool = Pool(filled(tmp_path, 700))
    pool.child(0, own_mib=500)
    for used_mib in (700, 810, 820, 910, 920, 810, 910):
        filled(tmp_path, used_mib)
        pool.look(IDLE_LOOK_S)

    assert [facts["used_mib"] for _, facts in events] == [810.0, 910.0, 910.0]
    assert caplog.text.count("of its 1000 MiB of memory") == 3
    assert not pool.ended


def test_in_a_full_container_the_largest_run_goes(tmp_path: Path) -> None:
    """One, and the next only when that has gone; an idle child is no run."""
    pool = Pool(filled(tmp_path, 960))
    pool.child(0, own_mib=300)
    pool.child(1, own_mib=500, task="ship")
    pool.child(2, own_mib=900)[s.RUNNING] = 0
    pool.look(IDLE_LOOK_S)
    pool.look(IDLE_LOOK_S)
    ((pid, why),) = pool.ended
    assert (pid, why.task, why.used_mib, why.limit_mib) == (101, "ship", 500.0, 1_000.0)
    assert "had used 960 of its 1000 MiB" in str(why)

    del pool.own_kib[101]
    pool.look(IDLE_LOOK_S)
    assert [pid for pid, _ in pool.ended] == [101, 100]
    pool.own_kib[100] = 0  # a zombie
    pool.look(IDLE_LOOK_S)
    pool.look(2 * GONE_WITHIN_S)
    assert len(pool.ended) == 2


def test_a_child_that_does_not_go_is_not_waited_for(tmp_path: Path) -> None:
    """The kernel would not wait either."""
    pool = Pool(filled(tmp_path, 960))
    pool.child(0, own_mib=300)
    pool.look(IDLE_LOOK_S)
    pool.look(GONE_WITHIN_S)

    assert [pid for pid, _ in pool.ended] == [100, 100]


def test_a_full_container_without_a_run_is_only_told(tmp_path: Path) -> None:
    """There is nobody to end."""
    pool = Pool(filled(tmp_path, 960))
    pool.look(IDLE_LOOK_S)
    (tmp_path / "memory.current").unlink()
    pool.look(IDLE_LOOK_S)

    assert not pool.ended


# --- inspect ------------------------------------------------------------------------------------


def test_the_report_is_plain_data(tmp_path: Path) -> None:
    """In MiB, for `celery inspect`."""
    pool = Pool(filled(tmp_path, 700))
    slot = pool.child(0, own_mib=60)
    slot[s.OWN], slot[s.START], slot[s.LAST_PEAK] = 60 * MIB, 20 * MIB, -1
    slot[s.LAST_GROWTH] = 512

    report = pool.watch.report()
    assert report["container"] == {"limit_mib": 1_000.0, "used_mib": 700.0}
    (child,) = report["children"]
    assert child["own_mib"] == 60.0
    assert child["growth_mib"] == 40.0
    assert child["last_growth_mib"] == 0.5
    assert child["last_peak_mib"] is None
    assert child["running"] == "leak"
    assert report["recycle_mib"] == 100.0
    assert report["tasks"] == []
