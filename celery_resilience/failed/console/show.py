"""How failed tasks are printed: nothing of their data reaches a terminal raw."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from celery_resilience.failed.envelope import dumps
from celery_resilience.failed.record import FIELDS, FailedTask, Summary
from celery_resilience.redaction import printable

CHORDS = (
    "{count} of them belong to a chord: Celery failed it with their first failure, "
    "and its body will not run"
)

#: Columns of a table, with the least and the most characters of each on a
#: terminal; the message gets what is left.
COLUMNS = {
    "ID": (8, 8),
    "FAILED (UTC)": (14, 14),
    "TASK": (12, 26),
    "REASON": (9, 30),
    "EXCEPTION": (9, 22),
    "MESSAGE": (12, None),
}

#: Characters of a task's message in a table.
MESSAGE_CHARS = 100

#: A cell that a spreadsheet would take for a formula begins with one of these,
#: perhaps behind white space (OWASP, CSV injection).
FORMULA_SIGNS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def say(text: str, end: str = "\n") -> None:
    """Talk to the operator, on stderr."""
    print(printable(text, keep_newlines=True), file=sys.stderr, end=end, flush=True)


def table(found: Iterable[Summary], file: TextIO | None = None) -> int:
    """Print a table, by rich on a terminal and plain otherwise; returns its rows."""
    file = file or sys.stdout
    rows = map(_cells, found)
    return _grid(rows, file) if file.isatty() else _lines(rows, file)


def _grid(rows: Iterable[tuple[str, ...]], file: TextIO) -> int:
    grid = Table(header_style="bold", box=None, pad_edge=False, expand=True)
    for name, (least, most) in COLUMNS.items():
        grid.add_column(
            name,
            no_wrap=True,
            min_width=least,
            max_width=most,
            ratio=None if most else 1,
        )
    for id, at, task, *others in rows:
        grid.add_row(*map(Text, (id, at, _end_of(task, COLUMNS["TASK"][1]), *others)))
    if grid.row_count:
        Console(file=file).print(grid)
    return grid.row_count


def _lines(rows: Iterable[tuple[str, ...]], file: TextIO) -> int:
    count = 0
    for count, cells in enumerate(rows, 1):
        if count == 1:
            print("\t".join(COLUMNS), file=file)
        print("\t".join(cells), file=file)
    return count


def entry(summary: Summary, key: str | None = None) -> None:
    """Print a failed task in one line, with its whole id, and its key if it has one."""
    cells = (summary.id, *_cells(summary)[1:])
    _print(" ".join(cells if key is None else (*cells, f"[key {key}]")))


def detail(found: FailedTask, *, verbose: bool) -> None:
    """Print all that is known of a failed task, redacted."""
    shown = found.to_dict()
    headline = f"{shown['task'] or '(no task)'}  {shown['state']}  {shown['reason']}"
    _print(f"{found.id}  {headline}")
    fields = [
        ("task id", shown["task_id"]),
        ("error", f"{shown['exception']}: {shown['message']}"),
        ("arguments", f"{shown['args']} {shown['kwargs']}"),
        ("queue", f"{shown['queue']} (failed queue {shown['failed_queue']})"),
        ("failed", f"first {shown['first_failed_at']}, last {shown['last_failed_at']}"),
        ("key", shown["idempotency_key"]),
        ("group", shown["fingerprint"]),
        ("worker", found.summary.worker),
        ("release", shown["release"]),
        ("replays", f"{shown['replays']}{_phase(found)}"),
        ("note", found.summary.note),
        ("chain", f"{shown['chain_length']} more" if shown["chain_length"] else None),
        ("chord", "yes: its body will not run" if shown["in_chord"] else None),
        ("body", f"{shown['body_kib']} KiB, {shown['content_type']}"),
    ]
    if verbose:
        fields += [
            ("ids", f"root {shown['root_id']}, parent {shown['parent_id']}"),
            ("exchange", f"{shown['exchange']!r}, key {shown['routing_key']!r}"),
            ("priority", shown["priority"]),
            ("trace", shown["trace_id"]),
            ("replayed as", shown["replayed_as"]),
        ]
    for name, value in fields:
        if value not in (None, ""):
            _print(f"  {name:<12}{value}")
    if verbose:
        for number, attempt in enumerate(found.attempts, 1):
            if "retried_in_s" in attempt:
                _print(
                    f"  failure {number}: {attempt['at']} {attempt['exception']}, "
                    f"tried again {attempt['retried_in_s']:g} s later"
                )
                continue
            _print(
                f"  failure {number}: {attempt['at']} {attempt['reason']} "
                f"{attempt['exception']}: {attempt['message']} "
                f"(worker {attempt['worker']}, pid {attempt['pid']}, "
                f"after {_seconds(attempt['runtime_s'])})"
            )
    if shown["traceback"]:
        _print("")
        for text in shown["traceback"].rstrip().split("\n"):
            _print(f"  {text}")
    _print("")


def stats(counted: Mapping[str, Any]) -> None:
    """Print counts."""
    for name in ("unresolved", "replaying", "resolved", "discarded"):
        _print(f"{name:<12}{counted[name]:>8}")
    if counted["oldest_s"] is not None:
        _print(f"{'oldest':<12}{_age(counted['oldest_s']):>8}")
    for name in ("by_reason", "by_task", "by_exception", "by_failed_queue"):
        if counted[name]:
            _print("")
            _print(f"unresolved {name.replace('_', ' ')}:")
            for key, count in counted[name].items():
                _print(f"{count:>8}  {key or '(none)'}")


def documents(
    found: Iterable[Mapping[str, Any]], output: str, *, one: bool = False
) -> None:
    """
    Print documents as "json", "jsonl" or "csv", one at a time.

    Args:
        one: Print a single document as such, and not as a list of one.
    """
    if output == "csv":
        _csv(found)
    elif output == "jsonl":
        for document in found:
            print(dumps(document).decode())
    else:
        whole = list(found)
        shown = whole[0] if one and len(whole) == 1 else whole
        print(json.dumps(json.loads(dumps({"shown": shown}))["shown"], indent=2))


def lines(found: Iterable[bytes]) -> None:
    """Print lines of JSON, which has no control characters."""
    for text in found:
        print(text.decode())


class Progress:
    """
    A bar on stderr, where that is a terminal.

    Args:
        what: A word for it.
        total: How many there are.
    """

    def __init__(self, what: str, total: int) -> None:
        self._bar = RichProgress(
            console=Console(stderr=True),
            disable=not sys.stderr.isatty() or total < 2,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        """So many are done."""
        self._bar.update(self._task, completed=done)


def _csv(found: Iterable[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, fieldnames=FIELDS, lineterminator="\n")
    writer.writeheader()
    for document in found:
        row = {
            name: _csv_cell(
                value
                if isinstance(value, str | int | float | None)
                else dumps_text(value)
            )
            for name, value in document.items()
        }
        writer.writerow(row)


def dumps_text(value: Any) -> str:
    """A nested value as JSON."""
    return json.dumps(value, default=str)


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value, keep_newlines=True)
    return f"'{text}" if text.lstrip().startswith(FORMULA_SIGNS) else text


def _cells(summary: Summary) -> tuple[str, ...]:
    at = datetime.fromtimestamp(summary.last_failed_at, UTC)
    state = "" if summary.state == "unresolved" else f" [{summary.state}]"
    return tuple(
        printable(text)
        for text in (
            summary.id[:8],
            f"{at:%m-%d %H:%M:%S}",
            summary.task or "(no task)",
            f"{summary.reason}{state}",
            summary.exception.rpartition(".")[2],
            _shortened(summary.message),
        )
    )


def _end_of(text: str, limit: int | None) -> str:
    """The end of a task's name tells more than its beginning."""
    if limit is None or len(text) <= limit:
        return text
    return f"…{text[1 - limit :]}"


def _shortened(text: str) -> str:
    text = text[: MESSAGE_CHARS + 1]
    return text if len(text) <= MESSAGE_CHARS else f"{text[: MESSAGE_CHARS - 1]}…"


def _phase(found: FailedTask) -> str:
    return f" ({found.summary.phase})" if found.summary.phase else ""


def _seconds(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.3g} s"


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.0f}s"


def _print(text: str) -> None:
    print(printable(text))
