"""Export, import and prune, between stores of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.conftest import Backend
from unit.failed.test_store import snapshot, with_every_state
from unit.specimens import a_failed_document, fresh_name

from celery_resilience.errors import ConfigurationError
from celery_resilience.failed.archive import dump_line, load_line, read_lines
from celery_resilience.failed.envelope import dumps
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.sql_store import SqlFailedTaskStore
from celery_resilience.failed.store import FailedTaskStore
from celery_resilience.failed.transfer import import_lines, prune
from celery_resilience.stores.sql import SqlDatabase


@pytest.fixture
def store(backend: Backend) -> FailedTaskStore:
    """An empty store, of each kind."""
    return backend.failed(fresh_name("shop"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[FailedTaskStore]:
    """A store of another kind than most."""
    database = SqlDatabase(f"sqlite:///{tmp_path}/o.sqlite3")
    yield SqlFailedTaskStore(database, "other")
    database.close()


def test_an_import_makes_the_same_records(
    store: FailedTaskStore, other: FailedTaskStore
) -> None:
    """In a store of another kind and back; again, it changes nothing."""
    ids = list(with_every_state(store).values())
    lines = [dump_line(kept) for kept in store.kept(ids)]
    before = snapshot(store)

    report = import_lines(other, lines, dry_run=False)
    assert (report.imported, report.known) == (6, 0)
    assert snapshot(other) == before
    report = import_lines(other, lines, dry_run=False)
    assert (report.imported, report.known) == (0, 6)
    assert snapshot(other) == before

    again = [dump_line(kept) for kept in other.kept(ids)]
    assert again == lines
    assert prune(store, ids, archive=None) == 3
    store.reopen(ids)
    assert prune(store, ids, archive=None) == 3
    assert import_lines(store, again, dry_run=False).imported == 6
    assert snapshot(store) == before


def test_a_dry_run_takes_nothing_in(
    store: FailedTaskStore, other: FailedTaskStore
) -> None:
    """It says what would be new."""
    with_every_state(store)
    ids = [summary.id for summary in store.list(Filter(state=None))]
    lines = [dump_line(kept) for kept in store.kept(ids)]
    import_lines(other, lines[:2], dry_run=False)

    report = import_lines(other, lines, dry_run=True)

    assert (report.imported, report.known) == (4, 2)
    assert other.count(Filter(state=None)) == 2


def test_a_redacted_export_is_refused(
    store: FailedTaskStore, other: FailedTaskStore
) -> None:
    """By the number of its line, with what would do."""
    document = a_failed_document()
    store.keep([document])
    (found,) = store.get_many([document["id"]])

    with pytest.raises(ConfigurationError, match=r"line 2 is redacted.*export --raw"):
        import_lines(other, [dumps(document), dumps(found.to_dict())], dry_run=True)


def test_a_broken_line_is_refused(other: FailedTaskStore) -> None:
    """By its number."""
    with pytest.raises(ConfigurationError, match="line 1: not an envelope"):
        import_lines(other, [b"x"], dry_run=False)


def test_what_is_pruned_is_in_the_archive(
    store: FailedTaskStore, tmp_path: Path
) -> None:
    """All of it; a replay under way is neither archived nor pruned."""
    by_name = with_every_state(store)
    ids = list(by_name.values())
    resting = [by_name[name] for name in ("unresolved", "resolved", "discarded")]
    before = list(store.kept(resting))
    path = tmp_path / "pruned.jsonl.gz"

    assert prune(store, ids, archive=path) == 3

    assert store.known(ids) == {*ids} - {*resting}
    with open(path, "rb") as file:
        found = [load_line(line) for line in read_lines(file)]
    assert [kept.record for kept in found] == [kept.record for kept in before]


def test_an_archive_is_not_overwritten(store: FailedTaskStore, tmp_path: Path) -> None:
    """It may be all that is left of what was pruned before."""
    ids = list(with_every_state(store).values())
    path = tmp_path / "pruned.jsonl.gz"
    path.write_text("old")

    with pytest.raises(ConfigurationError, match="is there already"):
        prune(store, ids, archive=path)

    assert path.read_text() == "old"
    assert store.known(ids) == {*ids}


def test_what_cannot_be_archived_is_not_pruned(
    store: FailedTaskStore, tmp_path: Path
) -> None:
    """The disk is asked first."""
    ids = list(with_every_state(store).values())
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match="file"):
        prune(store, ids, archive=tmp_path / "file" / "x.gz")

    assert store.known(ids) == {*ids}
