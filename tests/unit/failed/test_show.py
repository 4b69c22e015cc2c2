"""What is printed of failed tasks never reaches a terminal or a spreadsheet raw."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.specimens import (
    HOSTILE_TEXT,
    a_failed_document,
    a_failure,
    a_message,
    a_summary,
)

from celery_resilience.failed.console import show
from celery_resilience.failed.envelope import loads
from celery_resilience.failed.record import FailedTask, Phase, State

any_text = st.text(st.characters(exclude_categories=()), max_size=40)


class Terminal(io.StringIO):
    """A text file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def hostile_summary(text: str = HOSTILE_TEXT) -> Any:
    """A summary in which every text is hostile."""
    return a_summary(
        id=text,
        reason=text,
        task=text,
        task_id=text,
        queue=text,
        failed_queue=text,
        exception=text,
        message=text,
        fingerprint=text,
        worker=text,
        release=text,
        note=text,
    )


def a_failed_task(text: str = "plain", **changes: Any) -> FailedTask:
    """A failed task in which every text is *text*."""
    message = a_message(
        headers={"x": text},
        properties={"priority": text},
        content_type=text,
        exchange=text,
        routing_key=text,
        queue=text,
    )
    document = a_failed_document(
        message=message,
        task=text,
        failure=a_failure(exception=text, message=text, traceback=text),
        args=text,
        kwargs=text,
        arguments={text: text},
        root_id=text,
        parent_id=text,
        facts={"sentry_event_id": text, "idempotency_key": text},
        worker=text,
    )
    attempt = {**document["attempt"], "at": text, "pid": text}
    return FailedTask(
        summary=hostile_summary(text),
        document=document,
        attempts=[attempt],
        replayed_as=text,
        **changes,
    )


def controls_of(text: str, allowed: str = "\n") -> set[str]:
    """What of a text a terminal would obey."""
    return {
        c
        for c in text
        if c not in allowed
        and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c == "\u202e")
    }


# --- tables ---------------------------------------------------------------------------


def test_a_table_without_a_terminal_has_tabs() -> None:
    """One heading, then a line for each, for cut and awk."""
    out = io.StringIO()

    count = show.table([a_summary(), a_summary(id="f" * 32)], out)

    assert count == 2
    assert out.getvalue().splitlines() == [
        "ID\tFAILED (UTC)\tTASK\tREASON\tEXCEPTION\tMESSAGE",
        "01234567\t01-01 00:16:40\tshop.ship\texception\tNoStock\tnone left",
        "ffffffff\t01-01 00:16:40\tshop.ship\texception\tNoStock\tnone left",
    ]


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_an_empty_table_prints_nothing(make: Any) -> None:
    """Not even a heading."""
    out = make()

    assert show.table([], out) == 0
    assert out.getvalue() == ""


def test_a_table_on_a_terminal_is_a_grid() -> None:
    """With the same cells."""
    out = Terminal()

    assert show.table([a_summary()], out) == 1
    for cell in ("ID", "01234567", "shop.ship", "exception", "NoStock", "none left"):
        assert cell in out.getvalue()


def test_a_grid_shows_the_end_of_a_long_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells more than the beginning."""
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()

    show.table([a_summary(task=f"shop.{'deep.' * 20}ship")], out)

    limit = show.COLUMNS["TASK"][1]
    assert limit is not None
    assert f"…{'deep.' * 20}ship"[-limit + 1 :] in out.getvalue()
    assert "shop.deep" not in out.getvalue()


def test_a_grid_takes_no_markup_from_data() -> None:
    """rich's [bold] in a message is text."""
    out = Terminal()

    show.table([a_summary(message="[bold red]x[/]")], out)

    assert "[bold red]x[/]" in out.getvalue()


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_a_hostile_summary_prints_no_control_character(make: Any) -> None:
    """On one line, whatever is in it."""
    out = make()

    show.table([hostile_summary()], out)

    printed = out.getvalue()
    if make is Terminal:  # rich's own colours
        printed = printed.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not controls_of(printed, "\n\t")
    assert printed.count("\n") <= 2


@given(any_text)
def test_a_line_is_one_line(text: str) -> None:
    """Seven columns whatever the texts hold."""
    out = io.StringIO()

    show.table([hostile_summary(text)], out)

    row = out.getvalue().split("\n")[1]
    assert not controls_of(out.getvalue(), "\n\t")
    assert row.count("\t") == 5


def entry_of(capsys: pytest.CaptureFixture[str], **facts: Any) -> str:
    """A failed task in one line."""
    show.entry(a_summary(**facts))
    return capsys.readouterr().out


def test_an_id_is_shortened_to_eight_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As git does; every command takes the start of one. A line has all of it."""
    start = f"{a_summary().id} 01-01 00:16:40 shop.ship"
    assert entry_of(capsys).startswith(start)
    assert show._cells(a_summary())[0] == "01234567"


def test_a_state_is_told_where_it_is_not_unresolved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Most lists hold unresolved ones only."""
    assert "exception NoStock" in entry_of(capsys)
    assert "exception [replaying] NoStock" in entry_of(capsys, state=State.REPLAYING)


def test_a_long_message_is_shortened() -> None:
    """And ends in an ellipsis."""
    shown = show._cells(a_summary(message="x" * 200))[-1]

    assert shown == "x" * (show.MESSAGE_CHARS - 1) + "…"
    assert show._cells(a_summary(message="x" * 100))[-1] == "x" * 100


def test_a_message_without_a_task_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty cell would shift the columns for the eye."""
    assert "(no task)" in entry_of(capsys, task="")


# --- detail ---------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [False, True])
def test_a_hostile_failed_task_prints_no_control_character(
    capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    """Not in any of its fields, attempts or lines of traceback."""
    show.detail(a_failed_task(HOSTILE_TEXT), verbose=verbose)

    printed = capsys.readouterr().out
    assert not controls_of(printed)
    assert "\\x1b[31m" in printed


def test_detail_tells_what_an_operator_asks(capsys: pytest.CaptureFixture[str]) -> None:
    """Error, arguments, queue, note and traceback; more with -v."""
    show.detail(a_failed_task("abc"), verbose=False)
    brief = capsys.readouterr().out
    show.detail(a_failed_task("abc"), verbose=True)
    verbose = capsys.readouterr().out

    for field in ("task id", "error", "arguments", "queue", "worker", "note", "group"):
        assert f"  {field}" in brief
    assert "  abc" in brief.splitlines()
    assert "failure 1:" not in brief
    for field in ("ids", "exchange", "priority", "replayed as", "failure 1:"):
        assert f"  {field}" in verbose


def test_detail_leaves_out_what_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """No line for a release that nobody set."""
    found = FailedTask(summary=a_summary(), document=a_failed_document())

    show.detail(found, verbose=False)

    printed = capsys.readouterr().out
    assert "release" not in printed
    assert "note" not in printed
    assert "chord" not in printed


def test_detail_tells_how_far_a_replay_is(capsys: pytest.CaptureFixture[str]) -> None:
    """And warns where a chord's body will not run."""
    found = FailedTask(
        summary=a_summary(phase=Phase.SENT, replays=2),
        document=a_failed_document(in_chord=True, chain_length=3),
    )

    show.detail(found, verbose=False)

    printed = capsys.readouterr().out
    assert "2 (sent)" in printed
    assert "its body will not run" in printed
    assert "3 more" in printed


def test_the_stored_bytes_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Only redacted texts: no body, no header."""
    document = a_failed_document(
        args="('***',)",
        message=a_message(body=b"hunter2", headers={"h": "hunter2"}),
    )
    found = FailedTask(summary=a_summary(), document=document)

    show.detail(found, verbose=True)
    show.documents([found.to_dict()], "json")

    assert "hunter2" not in capsys.readouterr().out
    assert "aHVudGVyMg" not in json.dumps(found.to_dict())  # base64


# --- documents ------------------------------------------------------------------------


def test_json_is_a_list_or_a_single_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A single one as such where one was asked for."""
    show.documents([{"a": 1}], "json")
    assert json.loads(capsys.readouterr().out) == [{"a": 1}]
    show.documents([{"a": 1}], "json", one=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    show.documents([{"a": 1}, {"a": 2}], "json", one=True)
    assert json.loads(capsys.readouterr().out) == [{"a": 1}, {"a": 2}]
    show.documents([], "json")
    assert json.loads(capsys.readouterr().out) == []


def test_jsonl_is_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a whole document, newlines in it or not."""
    show.documents([{"a": "x\ny"}, {"a": 2}], "jsonl")

    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"a": "x\ny"}, {"a": 2}]


def test_a_raw_document_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    """`show --raw` prints the envelope as it travels."""
    document = a_failed_document(message=a_message(body=b"\xff", headers={"b": b"\0"}))

    show.documents([document], "jsonl")

    assert loads(capsys.readouterr().out) == document


@pytest.mark.parametrize("output", ["json", "jsonl"])
def test_json_prints_no_control_character(
    capsys: pytest.CaptureFixture[str], output: str
) -> None:
    """JSON writes them out."""
    show.documents([a_failed_task(HOSTILE_TEXT).to_dict()], output)

    printed = capsys.readouterr().out
    assert printed.isascii()
    assert not controls_of(printed)


def csv_of(
    capsys: pytest.CaptureFixture[str], *documents: dict[str, Any]
) -> list[dict[str, str]]:
    """Documents printed as CSV, and read by Python's reader."""
    show.documents(documents, "csv")
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_csv_has_a_heading_and_a_row_for_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nested values are JSON."""
    rows = csv_of(
        capsys,
        {"task": "x", "replays": 1, "release": None, "attempts": [1, {"e": 2}]},
        {"task": 'y,"z"', "body_kib": 2.5, "attempts": [], "in_chord": False},
    )

    assert [{name: value for name, value in row.items() if value} for row in rows] == [
        {"task": "x", "replays": "1", "attempts": '[1, {"e": 2}]'},
        {"task": 'y,"z"', "body_kib": "2.5", "attempts": "[]", "in_chord": "False"},
    ]


def test_csv_of_nothing_is_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    """Every name of the public JSON, in its order."""
    show.documents([], "csv")

    names = capsys.readouterr().out.strip().split(",")
    assert names == list(a_failed_task("x").to_dict())


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "=cmd|'/c calc'!A1"]
)
def test_csv_holds_no_formula(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A spreadsheet takes what is quoted so for a text."""
    (row,) = csv_of(capsys, {"message": text, "priority": -1})

    assert row["message"] == f"'{text}"
    assert row["priority"] == "-1"


@given(any_text)
def test_csv_prints_no_control_character_and_no_formula(text: str) -> None:
    """In any text at all."""
    cell = show._csv_cell(text)

    assert not controls_of(cell, "\n\t")
    assert not cell.startswith(show.FORMULA_SIGNS)


def test_a_hostile_failed_task_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """All of its fields."""
    document = a_failed_task(HOSTILE_TEXT).to_dict()

    show.documents([document], "csv")

    printed = capsys.readouterr().out
    assert not controls_of(printed, "\n\t")
    (row,) = csv.DictReader(io.StringIO(printed))
    assert list(row) == list(document)


# --- talk -----------------------------------------------------------------------------


def test_talk_goes_to_stderr_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Data alone is on stdout."""
    show.say(f"{HOSTILE_TEXT}\nsecond line")

    printed = capsys.readouterr()
    assert printed.out == ""
    assert not controls_of(printed.err, "\n\t")
    assert printed.err.endswith("second line\n")


def test_counts_are_printed_with_their_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names of the data are printable, and an empty one is told."""
    show.stats(
        {
            "unresolved": 3,
            "replaying": 0,
            "resolved": 1,
            "discarded": 0,
            "oldest_s": 5_400.0,
            "by_reason": {"exception": 3},
            "by_task": {HOSTILE_TEXT: 2, "": 1},
            "by_exception": {},
            "by_failed_queue": {},
        }
    )

    printed = capsys.readouterr().out
    assert not controls_of(printed)
    assert "unresolved         3" in printed
    assert "oldest          1.5h" in printed
    assert "unresolved by reason:" in printed
    assert "1  (none)" in printed
    assert "by exception" not in printed


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59, "59s"), (60, "1.0m"), (5_400, "1.5h"), (200_000, "2.3d")],
)
def test_an_age_is_shown_in_its_unit(seconds: float, shown: str) -> None:
    """As FILTERS take it."""
    assert show._age(seconds) == shown


@pytest.mark.parametrize("text", ["\n=1+1", " =1+1", "\uff1d1+1"])
def test_csv_holds_no_formula_behind_white_space(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Spreadsheets trim cells, and read full-width signs (OWASP, CSV injection)."""
    (row,) = csv_of(capsys, {"message": text})

    assert row["message"].startswith("'")
