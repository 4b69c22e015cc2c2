"""The store stays below its caps, and what goes is in the archive first."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from unit.conftest import Backend
from unit.specimens import a_failed_document, a_message, fresh_name

from celery_resilience.failed.archive import Archive, load_line, read_lines
from celery_resilience.failed.caps import Caps, Trimmer
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.store import FailedTaskStore, Kept, Usage

ALL = Filter(state=None)
NOW = 10_000_000.0
DAY = 86_400.0


@pytest.fixture
def store(backend: Backend) -> FailedTaskStore:
    """An empty store, of each kind."""
    return backend.failed(fresh_name("shop"))


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """It stands still."""
    return Clock()


def a_trimmer(
    store: FailedTaskStore, folder: Path, clock: Any = lambda: NOW, **caps: Any
) -> Trimmer:
    """A trimmer whose archive is in *folder*."""
    archive = Archive(folder, namespace="shop", clock=clock)
    return Trimmer(store, Caps(**caps), archive, clock=clock)


def fill(store: FailedTaskStore, count: int, **facts: Any) -> list[str]:
    """Keep so many, the first one oldest; returns their ids."""
    prefix = facts.pop("prefix", "t")
    documents = [
        a_failed_document(task_id=f"{prefix}{n}", at=NOW - count + n, **facts)
        for n in range(count)
    ]
    store.keep(documents)
    return [document["id"] for document in documents]


def archived(folder: Path) -> list[Kept]:
    """What is in the archive, oldest file first."""
    found = []
    for path in sorted(folder.glob("*.jsonl.gz"), key=lambda p: p.stat().st_mtime_ns):
        with open(path, "rb") as file:
            found += [load_line(line) for line in read_lines(file)]
    return found


def left(store: FailedTaskStore) -> set[str]:
    """The ids that are in the store."""
    return {summary.id for summary in store.list(ALL)}


@pytest.mark.parametrize(
    ("caps", "used", "excess"),
    [
        ({}, Usage(10**9, 10**12), Usage(0, 0)),
        ({"max_count": 100}, Usage(100, 5), Usage(0, 0)),
        ({"max_count": 100}, Usage(101, 5), Usage(11, 0)),
        ({"max_bytes": 1_000}, Usage(5, 1_000), Usage(0, 0)),
        ({"max_bytes": 1_000}, Usage(5, 1_300), Usage(0, 400)),
        ({"max_count": 1}, Usage(2, 5), Usage(2, 0)),
    ],
)
def test_only_what_is_over_a_cap_must_go(
    caps: dict[str, Any], used: Usage, excess: Usage
) -> None:
    """Down to nine tenths, so that not each failure makes another move."""
    assert Caps(**caps).excess(used) == excess


def test_the_oldest_above_the_count_are_moved(
    store: FailedTaskStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To the archive, whole, with a warning that names the file and the setting."""
    ids = fill(store, 25)
    before = list(store.kept(ids))

    with caplog.at_level(logging.WARNING):
        moved = a_trimmer(store, tmp_path, max_count=20).trim()

    assert moved == 7
    assert left(store) == set(ids[7:])
    assert [(k.record, k.replays) for k in archived(tmp_path)] == [
        (k.record, k.replays) for k in before[:7]
    ]
    (path,) = tmp_path.iterdir()
    assert str(path) in caplog.text
    assert "7 failed tasks" in caplog.text
    assert "7 of them unresolved" in caplog.text
    assert "resilience_failed_max)" in caplog.text


def test_the_largest_are_no_problem(store: FailedTaskStore, tmp_path: Path) -> None:
    """The cap in bytes is kept too."""
    large = a_message(body=os.urandom(100_000))
    ids = fill(store, 20, message=large)

    a_trimmer(store, tmp_path, max_bytes=1_000_000).trim()

    (used,) = store.usage().values()
    assert 700_000 < used.size <= 900_000
    assert left(store) == set(ids[-used.count :])
    assert len(archived(tmp_path)) == 20 - used.count


def test_what_is_done_with_goes_first(store: FailedTaskStore, tmp_path: Path) -> None:
    """And what is being replayed never goes."""
    ids = fill(store, 10)
    store.claim(ids[:2])
    store.discard(ids[-3:])

    a_trimmer(store, tmp_path, max_count=5).trim()

    assert left(store) == {*ids[:2], *ids[5:7]}


def test_the_age_counts_before_the_size(store: FailedTaskStore, tmp_path: Path) -> None:
    """What the old ones leave below the cap stays."""
    store.keep(
        [a_failed_document(task_id=f"old{n}", at=NOW - 31 * DAY - n) for n in range(8)]
    )
    young = fill(store, 10)

    assert a_trimmer(store, tmp_path, keep_s=30 * DAY, max_count=10).trim() == 8

    assert left(store) == set(young)


def test_an_idle_collector_looks_too(
    store: FailedTaskStore, tmp_path: Path, clock: Clock
) -> None:
    """Else nothing would grow old where nothing fails."""
    store.keep([a_failed_document(task_id="old", at=NOW - 31 * DAY)])
    trimmer = a_trimmer(store, tmp_path, clock, keep_s=30 * DAY)

    trimmer.after(Usage())
    assert len(left(store)) == 1
    clock.now += 61
    trimmer.after(Usage())
    assert left(store) == set()


def test_what_is_too_old_is_moved(store: FailedTaskStore, tmp_path: Path) -> None:
    """Of every state but a replay under way."""
    old = [
        a_failed_document(task_id=f"old{n}", at=NOW - 31 * DAY - n) for n in range(3)
    ]
    store.keep(old)
    store.discard([old[0]["id"]])
    store.claim([old[1]["id"]])
    young = fill(store, 3)

    assert a_trimmer(store, tmp_path, keep_s=30 * DAY).trim() == 2

    assert left(store) == {old[1]["id"], *young}
    assert {k.record.id for k in archived(tmp_path)} == {old[0]["id"], old[2]["id"]}


def test_each_failed_queue_has_its_caps(store: FailedTaskStore, tmp_path: Path) -> None:
    """A flood in one takes nothing from another."""
    flood = fill(store, 30, prefix="f", failed_queue="flood")
    calm = fill(store, 9, prefix="c", failed_queue="calm")

    a_trimmer(store, tmp_path, max_count=10).trim()

    assert left(store) == {*flood[-9:], *calm}


def test_what_cannot_be_archived_is_kept(
    store: FailedTaskStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Above its cap, and it says so."""
    ids = fill(store, 5)
    (tmp_path / "file").touch()

    with caplog.at_level(logging.ERROR):
        moved = a_trimmer(store, tmp_path / "file", max_count=1).trim()

    assert moved == 0
    assert left(store) == set(ids)
    assert "cannot archive failed tasks" in caplog.text


def test_what_changes_while_it_is_archived_stays(
    store: FailedTaskStore, tmp_path: Path
) -> None:
    """An operator's replay is worth more than a cap."""
    ids = fill(store, 3)

    class Slow(Archive):
        """Meanwhile somebody replays."""

        def put(self, tasks: Any) -> Path:
            path = super().put(tasks)
            store.claim(ids[:1])
            return path

    archive = Slow(tmp_path, namespace="shop", clock=lambda: NOW)
    Trimmer(store, Caps(max_count=1), archive, clock=lambda: NOW).trim()

    assert left(store) == {ids[0]}


def test_a_store_below_its_caps_is_left_alone(
    store: FailedTaskStore, tmp_path: Path
) -> None:
    """No file, no change."""
    ids = fill(store, 5)

    trimmer = a_trimmer(store, tmp_path, max_count=5, max_bytes=10**6, keep_s=DAY)
    assert trimmer.trim() == 0

    assert left(store) == set(ids)
    assert [*tmp_path.iterdir()] == []


def test_the_store_is_looked_at_now_and_then(
    store: FailedTaskStore, tmp_path: Path, clock: Clock
) -> None:
    """When something has come, then after a twentieth of a cap, or a minute."""
    looks: list[float] = []
    trimmer = a_trimmer(store, tmp_path, clock, max_count=100, max_bytes=1_000)
    trimmer.trim = lambda: looks.append(clock.now) or 0  # type: ignore[method-assign,func-returns-value]

    trimmer.after(Usage())
    assert looks == []  # who only reads pays nothing
    trimmer.after(Usage(1, 1))
    assert len(looks) == 1
    for _ in range(5):
        trimmer.after(Usage(1, 10))
    assert len(looks) == 1
    trimmer.after(Usage(1, 10))  # the sixth of a hundred
    assert len(looks) == 2
    trimmer.after(Usage(1, 51))
    assert len(looks) == 3
    trimmer.after(Usage())
    assert len(looks) == 3
    clock.now += 61
    trimmer.after(Usage())
    assert len(looks) == 4
