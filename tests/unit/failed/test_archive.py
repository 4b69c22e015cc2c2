"""Lines of a raw export: the same record on both sides, and nothing else is taken."""

from __future__ import annotations

import gzip
import io
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import (
    HOSTILE_TEXT,
    a_failed_document,
    a_failure,
    a_message,
    a_success_document,
)

from celery_resilience.failed.archive import (
    Archive,
    RedactedLine,
    dump_line,
    load_line,
    read_lines,
    write_lines,
)
from celery_resilience.failed.envelope import dumps
from celery_resilience.failed.merge import merged
from celery_resilience.failed.record import FailedTask, Phase, State
from celery_resilience.failed.rows import row_of, summary_of
from celery_resilience.failed.store import Kept


def a_kept(**changes: Any) -> Kept:
    """A failed task that is being replayed."""
    document = a_failed_document(
        failure=a_failure(message=HOSTILE_TEXT),
        message=a_message(body=b"\x00\xff\n", headers={"id": "i", "$x": {"$bytes": 1}}),
    )
    record = merged(None, document)
    assert record is not None
    record = replace(
        record, state=State.REPLAYING, phase=Phase.SENT, token="t" * 32, number=2
    )
    return replace(
        Kept(
            record,
            replays=2,
            claimed_at=5.5,
            to_queue="q",
            wants_new_id=True,
            is_forced=True,
        ),
        **changes,
    )


def line_with(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A line, changed by somebody."""
    line = json.loads(dump_line(a_kept()))
    change(line)
    return json.dumps(line).encode()


@given(
    st.sampled_from([*State]),
    st.none() | st.text(max_size=20),
    st.integers(0, 1_000),
    st.none() | st.floats(0, 1e10),
    st.booleans(),
)
def test_a_line_holds_all_of_a_failed_task(
    state: State, text: str | None, number: int, at: float | None, flag: bool
) -> None:
    """Whatever its state."""
    kept = a_kept(replayed_as=text, replays=number, wants_new_id=flag, copy=text)
    if state is not State.REPLAYING:
        record = replace(kept.record, state=state, phase=None, note=text, settled_at=at)
        kept = replace(kept, record=record, claimed_at=at)

    assert load_line(dump_line(kept)) == kept
    assert b"\n" not in dump_line(kept)


def test_an_envelope_alone_is_a_failed_task_that_nobody_replayed() -> None:
    """From a failed queue, a spool, or `show --raw` of an older release."""
    document = a_failed_document()

    assert load_line(dumps(document)) == Kept(merged(None, document))  # type: ignore[arg-type]


def test_a_redacted_line_is_told_from_garbage() -> None:
    """Its message is not in it."""
    kept = a_kept()
    row = type("Row", (), {**row_of(kept.record), "replays": 0})
    shown = FailedTask(summary_of(row), kept.record.document or {}).to_dict()

    with pytest.raises(RedactedLine):
        load_line(dumps(shown))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"garbage", "not an envelope"),
        (b"[]", "not an envelope"),
        (dumps(a_success_document()), "not the envelope of a failed task"),
        (line_with(lambda line: line.update(id="../x")), "not the envelope"),
        (line_with(lambda line: line.update(record=5)), "wrong record"),
        (line_with(lambda line: line["record"].pop("token")), "wrong token"),
        (line_with(lambda line: line["record"].update(number="2")), "wrong number"),
        (line_with(lambda line: line["record"].update(replays=-1)), "wrong replays"),
        (line_with(lambda line: line["record"].update(state="lost")), "wrong state"),
        (line_with(lambda line: line["record"].update(phase=None)), "wrong state"),
        (line_with(lambda line: line["record"].update(claimed_at=None)), "wrong state"),
        (line_with(lambda line: line["record"].update(state="resolved")), "state"),
        (line_with(lambda line: line["record"].update(attempts=[5])), "attempts"),
        (line_with(lambda line: line["record"]["attempts"][0].pop("_replay")), "_repl"),
    ],
)
def test_what_is_no_line_of_an_export_is_refused(line: bytes, said: str) -> None:
    """It says what is wrong with it."""
    with pytest.raises(ValueError, match=said) as refused:
        load_line(line)
    assert not isinstance(refused.value, RedactedLine)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    """Compressed or not; empty lines do not count."""
    path = tmp_path / name

    assert write_lines(path, [b"a", b"b"]) == 2

    with open(path, "rb") as file:
        assert [line.strip() for line in read_lines(file)] == [b"a", b"b"]
    is_packed = path.read_bytes().startswith(b"\x1f\x8b")
    assert is_packed is name.endswith(".gz")
    assert [*read_lines(io.BytesIO(b"\na\n \n"))] == [b"a\n"]
    assert [*read_lines(io.BytesIO(b""))] == []


def test_a_file_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    """An export is there whole, or as it was."""
    path = tmp_path / "x.jsonl"
    write_lines(path, [b"old"])

    def broken() -> Any:
        yield b"new"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_lines(path, broken())

    assert path.read_bytes() == b"old\n"
    assert [*tmp_path.iterdir()] == [path]


def test_an_archive_is_its_owners(tmp_path: Path) -> None:
    """It holds whole messages; every batch is a file of its own."""
    archive = Archive(tmp_path / "new", namespace="shop:eu", clock=lambda: 0.0)
    kept = a_kept()

    paths = [archive.put([kept]), archive.put([kept, kept])]

    assert [path.parent for path in paths] == [tmp_path / "new"] * 2
    assert paths[0] != paths[1]
    assert all(p.name.startswith("shop-eu-19700101T000000Z-") for p in paths)
    for path, count in zip(paths, (1, 2), strict=True):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with gzip.open(path) as lines:
            assert [load_line(line) for line in lines] == [kept] * count
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
