"""With `resilience_log_format`, every line of a worker is one line of facts."""

from __future__ import annotations

import json
import logging
import math
import sys
from typing import Any

import pytest
from unit.log_records import recorded

from celery_resilience.telemetry.log_format import (
    LineFormatter,
    Told,
    as_json,
    as_logfmt,
    tell,
)


def a_record(message: str, *args: Any, **attributes: Any) -> logging.LogRecord:
    """A record of an app's own."""
    exc_info = attributes.pop("exc_info", None)
    record = logging.LogRecord(
        "shop", logging.WARNING, "shop.py", 7, message, args, exc_info
    )
    record.created = 1_700_000_000.25
    vars(record).update(attributes)
    return record


def line(record: logging.LogRecord, **words: Any) -> dict[str, Any]:
    """What stands in the line of a record."""
    text = LineFormatter("json", **words).format(record)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_line_says_when_who_and_what() -> None:
    """And what is bound to it, or was given with it."""
    record = a_record("sent %d\n%s", 7, "\x1b[31m", task_id="t", order=[1, {"a": 2}])

    assert line(record) == {
        "at": "2023-11-14T22:13:20.250+00:00",
        "level": "WARNING",
        "logger": "shop",
        "process": "MainProcess",
        "message": "sent 7\n\\x1b[31m",
        "task_id": "t",
        "order": [1, {"a": 2}],
    }


def test_a_record_of_ours_is_its_facts() -> None:
    """Not a text of facts within a line of facts."""
    told = Told({"event": "worker_started", "pid": 7}, "it starts", as_json)

    shown = line(a_record("%s", told, event_name="worker_started", pid=7))

    assert (shown["event"], shown["pid"], shown["message"]) == (
        "worker_started",
        7,
        "it starts",
    )
    assert "event_name" not in shown


def test_an_exception_is_one_of_the_facts() -> None:
    """With its lines, in one line."""
    try:
        raise ValueError("no stock")
    except ValueError:
        record = a_record("it failed", exc_info=sys.exc_info())

    traceback = line(record)["traceback"]
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("ValueError: no stock")


def test_a_hidden_name_is_masked() -> None:
    """The usual ones, and those of the setting; Celery's `data` is left out."""
    record = a_record("x", password="hunter2", Pin="1234", data={"args": "hunter2"})

    shown = line(record, hidden={"pin"})

    assert (shown["password"], shown["Pin"]) == ("***", "***")
    assert "hunter2" not in json.dumps(shown)


@pytest.mark.parametrize("log_format", ["json", "logfmt"])
def test_a_hidden_name_is_masked_wherever_it_is_nested(log_format: str) -> None:
    """In mappings and lists that an app gives as facts; the rest stays as it is."""
    payload = {
        "user": 7,
        "password": "hunter2",
        "cards": [{"Pin": "hunter2", "bank": "b"}, ({"token": "hunter2"},)],
        1: {"api_key": {"a": "hunter2"}},
    }
    record = a_record("x", payload=payload)

    text = LineFormatter(log_format, hidden={"pin"}).format(record)

    assert "hunter2" not in text
    assert text.count("***") == 4
    assert payload["password"] == "hunter2"
    if log_format == "json":
        shown = json.loads(text)["payload"]
        assert shown["user"] == 7
        assert shown["cards"] == [{"Pin": "***", "bank": "b"}, [{"token": "***"}]]


class Broken(dict[str, Any]):
    """Raises when it is looked through."""

    def items(self) -> Any:
        raise RuntimeError("no items")


def test_a_nested_value_is_looked_through_within_bounds() -> None:
    """Of one within itself, or that is huge, or broken, no line is lost."""
    itself: dict[str, Any] = {"password": "hunter2"}
    itself["again"] = [itself, itself]

    shown = json.dumps(
        [
            line(a_record("x", thing=itself)),
            line(a_record("x", thing=list(range(100_000)))),
            line(a_record("x", thing=Broken(password="hunter2"))),
        ]
    )

    assert "hunter2" not in shown
    assert "Broken that raised RuntimeError" in shown
    assert len(shown) < 100_000


class Unwritable:
    """Raises when it is asked for its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "value", [object(), Unwritable(), {1, 2}, {(1, 2): 3}, b"\xff"]
)
def test_a_value_that_is_no_json_is_written_as_text(value: Any) -> None:
    """A line is never lost for what an app has put in it."""
    assert line(a_record("x", thing=value))["message"] == "x"


def test_a_value_within_itself_is_written_as_text() -> None:
    """The rest of its line stays as it is."""
    value: list[Any] = []
    value.append(value)

    assert json.loads(as_json({"a": value, "b": 1})) == {"a": "[[...]]", "b": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        ([math.nan], "[nan]"),
        ({math.inf: 1}, "{inf: 1}"),
    ],
)
def test_a_number_that_is_none_is_written_as_text(value: Any, text: str) -> None:
    """NaN is no JSON: a log's reader would drop the line."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = as_json({"a": value, "b": 1.5})

    assert json.loads(written, parse_constant=refuse) == {"a": text, "b": 1.5}


def test_a_line_of_logfmt_has_the_same_facts() -> None:
    """Whatever an app calls its attributes."""
    record = a_record("two words", **{"a b": 1})

    text = LineFormatter("logfmt").format(record)

    assert text.startswith("at=2023-11-14T22:13:20.250+00:00 level=WARNING logger=shop")
    assert ' message="two words"' in text
    assert text.endswith(" a_b=1")
    assert as_logfmt({"a": None}) == ""
    assert as_logfmt({"a": "1\n2", "b": "1\t2"}) == 'a="1\\n2" b="1\\t2"'


def test_an_apps_record_factory_loses_no_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it has set stays; `logging` would refuse to overwrite it."""
    plain = logging.getLogRecordFactory()

    def factory(*args: Any, **words: Any) -> logging.LogRecord:
        record = plain(*args, **words)
        vars(record).update(trace_id="app's", worker="app's")
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", factory)
    logger = logging.getLogger("celery_resilience.failed")
    facts = {"event": "task_failed", "trace_id": "ours", "worker": "w@h", "pid": 7}
    with recorded(logger.name) as records:
        tell(logger, logging.ERROR, facts, "it failed", "json")

    (record,) = records
    found = vars(record)
    assert json.loads(record.getMessage()) == facts
    assert (found["trace_id"], found["worker"], found["pid"]) == ("app's", "app's", 7)
    assert (found["event_name"], record.funcName) == ("task_failed", "tell")


def test_a_logger_that_is_off_makes_no_record() -> None:
    """Whoever asks."""
    logger = logging.getLogger("celery_resilience.failed")
    with recorded(logger.name, logging.CRITICAL) as records:
        tell(logger, logging.ERROR, {}, "it failed", None)

    assert records == []
