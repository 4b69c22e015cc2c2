"""Files that hold envelopes while the broker takes nothing."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from unit.specimens import a_failed_document, a_success_document

from celery_resilience.errors import BrokerUnavailable, PublishRefused, StoreUnavailable
from celery_resilience.failed.envelope import loads, posted
from celery_resilience.failed.spool import BROKEN, SUFFIX, Spool
from celery_resilience.message import OriginalMessage


def an_envelope(task_id: str = "task-1", queue: str = "fq") -> OriginalMessage:
    """What a worker would publish."""
    return posted(a_failed_document(task_id=task_id, failed_queue=queue))


def task_ids(messages: list[OriginalMessage]) -> list[str]:
    """The tasks of envelopes."""
    return [loads(message.body)["task_id"] for message in messages]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "a" / "spool"


@pytest.fixture
def spool(folder: Path) -> Spool:
    """An empty spool."""
    return Spool(folder)


def test_an_envelope_comes_back_as_it_was_put(spool: Spool) -> None:
    """Byte for byte, for the queue that it was meant for."""
    message = an_envelope(queue="special.failed")
    taken: list[OriginalMessage] = []

    assert spool.put(message) is True
    assert spool.drain(taken.append) == 1
    assert taken == [message]


def test_the_oldest_comes_first(spool: Spool) -> None:
    """In the order in which they were put."""
    ids = [f"t{i}" for i in range(20)]
    taken: list[OriginalMessage] = []

    for task_id in ids:
        assert spool.put(an_envelope(task_id))

    assert spool.drain(taken.append) == 20
    assert task_ids(taken) == ids


def test_what_was_taken_is_gone(spool: Spool, folder: Path) -> None:
    """A second drain finds nothing."""
    spool.put(an_envelope())

    spool.drain(lambda message: None)

    assert list(folder.iterdir()) == []
    assert spool.drain(lambda message: pytest.fail("taken twice")) == 0


def test_the_same_envelope_may_be_put_twice(spool: Spool) -> None:
    """No file overwrites another."""
    message = an_envelope()
    spool.put(message)
    spool.put(message)

    assert len(spool.files()) == 2


def test_a_report_is_spooled_too(spool: Spool) -> None:
    """Outcomes of replays go the same way."""
    message = posted(a_success_document())
    taken: list[OriginalMessage] = []
    spool.put(message)

    spool.drain(taken.append)

    assert taken == [message]


def test_a_file_is_whole_before_it_has_its_name(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and flushed under another name, renamed, and the folder flushed."""
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("flush folder" if is_folder else "flush file")
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        assert Path(source).read_bytes() == body
        assert spool.files() == []
        steps.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    message = an_envelope()
    body = message.body

    spool.put(message)

    assert steps == ["flush file", "rename", "flush folder"]
    assert [path.name.endswith(SUFFIX) for path in folder.iterdir()] == [True]


def test_the_folder_is_its_owners_only(spool: Spool, folder: Path) -> None:
    """Envelopes hold what the tasks were called with."""
    spool.put(an_envelope())

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_that_is_still_written_is_left_alone(spool: Spool, folder: Path) -> None:
    """Another worker of this host may be half way."""
    folder.mkdir(parents=True)
    partial = folder / f".0-1-2{SUFFIX}"
    partial.write_bytes(b'{"half')
    other = folder / "notes.txt"
    other.write_text("not ours")

    assert spool.files() == []
    assert spool.drain(lambda message: pytest.fail("taken")) == 0
    assert partial.exists()
    assert other.exists()


def test_a_broken_file_is_set_aside(
    spool: Spool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told, kept under another name, and stops no other."""
    spool.put(an_envelope("before"))
    broken = folder / f"{'9' * 5}{SUFFIX}"
    broken.write_bytes(b"\x00garbage")
    last = folder / f"{'9' * 6}{SUFFIX}"
    last.write_bytes(an_envelope("after").body)
    taken: list[OriginalMessage] = []

    with caplog.at_level(logging.ERROR, "celery_resilience.failed"):
        count = spool.drain(taken.append)

    assert count == 2
    assert sorted(task_ids(taken)) == ["after", "before"]
    assert (folder / f"{broken.name}{BROKEN}").read_bytes() == b"\x00garbage"
    assert spool.files() == []
    assert [str(broken) in text for text in caplog.messages] == [True]


def test_a_refused_envelope_stays_and_stops_no_other(spool: Spool) -> None:
    """The refusal is told when all were tried."""
    for task_id in ("a", "b", "c"):
        spool.put(an_envelope(task_id))
    taken: list[OriginalMessage] = []

    def publish(message: OriginalMessage) -> None:
        if task_ids([message]) == ["b"]:
            raise PublishRefused("full")
        taken.append(message)

    with pytest.raises(PublishRefused, match="full"):
        spool.drain(publish)

    assert task_ids(taken) == ["a", "c"]
    assert len(spool.files()) == 1
    assert spool.drain(taken.append) == 1
    assert task_ids(taken) == ["a", "c", "b"]


@pytest.mark.parametrize("error", [BrokerUnavailable, StoreUnavailable])
def test_a_broker_that_goes_away_stops_the_drain(
    spool: Spool, error: type[Exception]
) -> None:
    """Nothing that was not taken is removed."""
    for task_id in ("a", "b", "c"):
        spool.put(an_envelope(task_id))
    tried: list[str] = []

    def publish(message: OriginalMessage) -> None:
        tried.extend(task_ids([message]))
        if len(tried) == 2:
            raise error("away")

    with pytest.raises(error):
        spool.drain(publish)

    assert tried == ["a", "b"]
    assert len(spool.files()) == 2


def test_no_folder_is_an_empty_spool(spool: Spool) -> None:
    """Before the first refusal there is none."""
    assert spool.files() == []
    assert spool.drain(lambda message: None) == 0


@pytest.fixture
def full(tmp_path: Path, folder: Path) -> Spool:
    """A spool whose folder cannot be made, as on a full or broken disk."""
    folder.parent.write_bytes(b"a file where the folder's parent should be")
    return Spool(folder)


def test_a_disk_that_takes_nothing_is_told_once(
    full: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """False, so that nothing is acknowledged; one line, not one for each failure."""
    with caplog.at_level(logging.ERROR, "celery_resilience.failed"):
        assert [full.put(an_envelope()) for _ in range(5)] == [False] * 5

    assert len(caplog.records) == 1
    assert "nothing more is acknowledged" in caplog.text


def test_a_disk_that_recovers_is_used_again(
    full: Spool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And when it is full once more, that is told once more."""
    full.put(an_envelope())
    folder.parent.unlink()
    assert full.put(an_envelope()) is True
    folder.rename(folder.with_name("moved"))
    folder.parent.joinpath("spool").write_bytes(b"")

    assert full.put(an_envelope()) is False
    assert len(caplog.records) == 2


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_what_the_disk_did_not_take_leaves_nothing_behind(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """No half file, and none that would be published though it was held as well."""

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, refuse)

    assert spool.put(an_envelope()) is False
    assert list(folder.iterdir()) == []


def test_two_drainers_take_everything_between_them(folder: Path) -> None:
    """Workers of one host share a spool: nothing is lost, nothing raises."""
    for i in range(60):
        Spool(folder).put(an_envelope(f"t{i}"))
    taken: list[OriginalMessage] = []
    errors: list[BaseException] = []

    def drain() -> None:
        try:
            Spool(folder).drain(taken.append)
        except Exception as exc:
            errors.append(exc)

    threads = [Thread(target=drain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert set(task_ids(taken)) == {f"t{i}" for i in range(60)}
    assert Spool(folder).files() == []


def test_a_broken_file_that_another_drainer_set_aside_is_no_error(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have read it, one was first."""
    folder.mkdir(parents=True)
    (folder / f"1{SUFFIX}").write_bytes(b"garbage")
    read = Path.read_bytes

    def read_and_lose(path: Path) -> bytes:
        data = read(path)
        path.unlink()
        return data

    monkeypatch.setattr(Path, "read_bytes", read_and_lose)

    assert spool.drain(lambda message: None) == 0


def test_a_file_that_cannot_be_read_stops_no_other(spool: Spool, folder: Path) -> None:
    """The outbox does not catch it either: `reconnected` would end the worker."""
    spool.put(an_envelope("a"))
    (folder / f"0{SUFFIX}").mkdir()
    taken: list[OriginalMessage] = []

    spool.drain(taken.append)

    assert task_ids(taken) == ["a"]


def test_a_folder_that_cannot_be_flushed_leaves_nothing_behind(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False says that the envelope is not here; it is held, and published twice."""
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    assert spool.put(an_envelope()) is False
    assert spool.files() == []


def test_a_file_is_its_owners_only_in_a_folder_that_was_there(
    spool: Spool, folder: Path
) -> None:
    """`resilience_spool_dir = /var/spool/shop` exists and is 0755."""
    folder.mkdir(mode=0o755, parents=True)
    before = os.umask(0o022)
    try:
        spool.put(an_envelope())
    finally:
        os.umask(before)

    assert stat.S_IMODE(spool.files()[0].stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"kind": "failed", "schema": 1, "x": {"$decimal": "x"}}'],
    ids=["nested", "decimal"],
)
def test_every_broken_file_is_set_aside(
    spool: Spool, folder: Path, data: bytes
) -> None:
    """It would stop the others for ever."""
    folder.mkdir(parents=True)
    (folder / f"1{SUFFIX}").write_bytes(data)

    assert spool.drain(lambda message: None) == 0
    assert spool.files() == []
