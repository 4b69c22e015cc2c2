"""A failed task as a line of a raw export, and files of such lines.

The line is the envelope of its last failure with what the store holds besides, so
that an import makes the same record in a store of any kind.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

from celery_resilience.failed.envelope import FAILED, dumps, loads, wrong_fields
from celery_resilience.failed.files import put_file
from celery_resilience.failed.merge import Record, merged
from celery_resilience.failed.record import Phase, State
from celery_resilience.failed.store import Kept

SUFFIX = ".jsonl.gz"

#: The part of a line that is not the envelope.
RECORD = "record"

_TEXT, _OPTIONAL_TEXT = str, (str, type(None))
_OPTIONAL_NUMBER = (int, float, type(None))

FIELDS: Mapping[str, Any] = {
    **dict.fromkeys(("number", "replays"), int),
    **dict.fromkeys(("state",), _TEXT),
    **dict.fromkeys(
        ("phase", "token", "copy", "to_queue", "replayed_as", "note"), _OPTIONAL_TEXT
    ),
    **dict.fromkeys(("settled_at", "claimed_at"), _OPTIONAL_NUMBER),
    **dict.fromkeys(("wants_new_id", "is_forced"), bool),
    "attempts": list,
}
ATTEMPT: Mapping[str, Any] = {
    **dict.fromkeys(
        ("at", "worker", "reason", "exception", "message", "_capture"), _TEXT
    ),
    **dict.fromkeys(("pid", "runtime_s"), _OPTIONAL_NUMBER),
    **dict.fromkeys(("_replay", "_attempt"), int),
    "_failed_at": (int, float),
    "_redelivered": bool,
}


class RedactedLine(ValueError):
    """A failed task as it is shown, whose message nobody could run again."""


def dump_line(kept: Kept) -> bytes:
    """A failed task as one line."""
    record = kept.record
    assert record.document is not None
    return dumps(
        {
            **record.document,
            RECORD: {
                "state": record.state,
                "phase": record.phase,
                "token": record.token,
                "copy": kept.copy,
                "claimed_at": kept.claimed_at,
                "to_queue": kept.to_queue,
                "wants_new_id": kept.wants_new_id,
                "is_forced": kept.is_forced,
                "number": record.number,
                "replays": kept.replays,
                "replayed_as": kept.replayed_as,
                "settled_at": record.settled_at,
                "note": record.note,
                "attempts": record.attempts,
            },
        }
    )


def load_line(line: bytes) -> Kept:
    """
    A failed task from a line.

    Args:
        line: Of a raw export or an archive; an envelope from a failed queue, a
            spool or `show --raw` is a failed task that nobody has replayed.

    Raises:
        RedactedLine: It is of an export without `--raw`.
        ValueError: It is something else.
    """
    try:
        document = loads(line)
    except ValueError:
        if _is_redacted(line):
            raise RedactedLine("redacted") from None
        raise
    if document["kind"] != FAILED or not re.fullmatch("[0-9a-f]{32}", document["id"]):
        raise ValueError("not the envelope of a failed task")
    facts = document.pop(RECORD, None)
    if facts is None:
        record = merged(None, document)
        assert record is not None
        return Kept(record)
    wrong = wrong_fields(facts, FIELDS) if isinstance(facts, dict) else [RECORD]
    if not wrong:
        wrong = sorted({w for a in facts["attempts"] for w in _wrong_of_attempt(a)})
    if not wrong and not _is_consistent(facts):
        wrong = ["state"]
    if wrong:
        raise ValueError(f"a failed task with a wrong {', '.join(wrong)}")
    return Kept(
        record=Record(
            id=document["id"],
            state=State(facts["state"]),
            document=document,
            attempts=tuple(facts["attempts"]),
            number=facts["number"],
            token=facts["token"],
            phase=None if facts["phase"] is None else Phase(facts["phase"]),
            settled_at=facts["settled_at"],
            note=facts["note"],
        ),
        replays=facts["replays"],
        replayed_as=facts["replayed_as"],
        copy=facts["copy"],
        claimed_at=facts["claimed_at"],
        to_queue=facts["to_queue"],
        wants_new_id=facts["wants_new_id"],
        is_forced=facts["is_forced"],
    )


def _wrong_of_attempt(attempt: Any) -> list[str]:
    if not isinstance(attempt, dict):
        return ["attempts"]
    return [f"attempts.{name}" for name in wrong_fields(attempt, ATTEMPT)]


def _is_consistent(facts: Mapping[str, Any]) -> bool:
    """Whether state and phase are known, and belong to each other."""
    if facts["state"] not in set(State) or facts["phase"] not in {None, *Phase}:
        return False
    if facts["state"] != State.REPLAYING:
        return facts["phase"] is None
    return (
        facts["phase"] is not None
        and facts["token"] is not None
        and facts["claimed_at"] is not None
    )


def _is_redacted(line: bytes) -> bool:
    try:
        shown = json.loads(line)
    except ValueError:
        return False
    return isinstance(shown, dict) and "task_id" in shown and "kind" not in shown


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file that may be compressed, without the empty ones."""
    file.seek(0)
    is_packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not is_packed:
        yield from filter(bytes.strip, file)
        return
    with gzip.open(file) as lines:
        yield from filter(bytes.strip, lines)


class Archive:
    """
    A folder of compressed raw exports, which `failed import` reads.

    Args:
        folder: Made when it is missing, readable by its owner only.
        namespace: The app's.
        clock: Wall time, in seconds.
    """

    def __init__(
        self, folder: Path, *, namespace: str, clock: Callable[[], float]
    ) -> None:
        self._folder = folder
        self._namespace = namespace
        self._clock = clock

    def put(self, tasks: Sequence[Kept]) -> Path:
        """
        Write *tasks* to a new file.

        Raises:
            OSError: The disk does not take it; nothing is left behind.
        """
        at = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
        name = f"{self._namespace}-{at}-{uuid4().hex[:8]}{SUFFIX}".replace(":", "-")
        path = self._folder / name
        put_archive(path, tasks)
        return path


def put_archive(path: Path, tasks: Iterable[Kept]) -> int:
    """
    Write *tasks* to the new file *path*, compressed; returns how many.

    Raises:
        OSError: The disk does not take it; nothing is left behind.
    """
    return _put(path, map(dump_line, tasks), is_packed=True)


def write_lines(path: Path, lines: Iterable[bytes]) -> int:
    """
    Write *lines* to *path*, in one step; returns how many.

    Args:
        path: Compressed if it ends in ".gz".

    Raises:
        OSError: The disk does not take it; what was there is as it was.
    """
    return _put(path, lines, is_packed=path.suffix == ".gz")


def _put(path: Path, lines: Iterable[bytes], *, is_packed: bool) -> int:
    count = 0

    def write(file: BinaryIO) -> None:
        nonlocal count
        with contextlib.ExitStack() as stack:
            if is_packed:
                packed = gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0)
                file = cast(BinaryIO, stack.enter_context(packed))
            for line in lines:
                file.write(line + b"\n")
                count += 1

    put_file(path, write)
    return count
