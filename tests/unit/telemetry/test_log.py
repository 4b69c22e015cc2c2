"""One structured record for each failed delivery, and nothing raw in it."""

from __future__ import annotations

import json
import logging
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from unit.specimens import HOSTILE_TEXT, a_failure, a_settlement

from celery_resilience.events import emit
from celery_resilience.outcome import EVENTS, Outcome, Settlement
from celery_resilience.redaction import show_arguments
from celery_resilience.telemetry import log as module
from celery_resilience.telemetry.log import FailureLog, WorkerLog, failure_facts

FORMATS = [None, "json", "logfmt"]


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    """No log of another test, before or after."""
    if module._stop is not None:
        module._stop()
    module._stop = None
    level = module.worker_logger.level
    yield
    if module._stop is not None:
        module._stop()
    module._stop = None
    module.worker_logger.setLevel(level)


class Recorder(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged, from INFO on."""
    logger, recorder = logging.getLogger("celery_resilience"), Recorder()
    level = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.INFO)
    yield recorder.records
    logger.removeHandler(recorder)
    logger.setLevel(level)


def settlement(**changes: Any) -> Settlement:
    """A failed delivery with all its facts."""
    parts: dict[str, Any] = {
        "attempt": 2,
        "root_id": "root",
        "parent_id": "parent",
        "pid": 77,
        "run_s": 1.23456789,
        "args": "(7,)",
        "kwargs": "{'card': '***'}",
    }
    return a_settlement(**{**parts, **changes})


def hostile(text: str = HOSTILE_TEXT) -> Settlement:
    """A failed delivery in which every text is hostile."""
    return settlement(
        task=text,
        task_id=text,
        root_id=text,
        parent_id=text,
        queue=text,
        worker=text,
        args=text,
        kwargs=text,
        reason=text,
        failure=a_failure(exception=text, message=text, fingerprint=text),
    )


def controls_of(text: str) -> set[str]:
    """What of a text a terminal would obey, or that ends a line."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}


FACTS = {
    "event": "task_failed",
    "task": "shop.ship",
    "task_id": "task-1",
    "root_id": "root",
    "parent_id": "parent",
    "attempt": 2,
    "queue": "shop",
    "reason": "exception",
    "exception": "shop.errors.NoStock",
    "message": "none left",
    "runtime_s": 1.234568,
    "worker": "celery@one",
    "pid": 77,
    "args": "(7,)",
    "kwargs": "{'card': '***'}",
}


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_failure_is_one_record(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """An error of our logger, with the facts beside the text in every format."""
    FailureLog(log_format).failed(settlement())

    (record,) = records
    assert record.name == "celery_resilience.failed"
    assert record.levelno == logging.ERROR
    facts = record.failure  # type: ignore[attr-defined]
    assert {k: v for k, v in facts.items() if k != "fingerprint"} == FACTS
    assert len(facts["fingerprint"]) == 16


def test_json_is_the_facts(records: list[logging.LogRecord]) -> None:
    """On one line."""
    FailureLog("json").failed(settlement())

    (record,) = records
    facts: Any = vars(record)["failure"]
    assert json.loads(record.getMessage()) == facts
    assert "\n" not in record.getMessage()


def test_logfmt_is_the_facts_without_those_that_are_none(
    records: list[logging.LogRecord],
) -> None:
    """Name and value, quoted where it has spaces, quotes or an equals sign."""
    FailureLog("logfmt").failed(
        settlement(parent_id=None, kwargs='{"a": "b=c"}', failure=a_failure(message=""))
    )

    text = records[0].getMessage()
    pairs = dict(word.split("=", 1) for word in shlex.split(text))
    assert pairs["task"] == "shop.ship"
    assert pairs["attempt"] == "2"
    assert pairs["kwargs"] == '{"a": "b=c"}'
    assert pairs["message"] == ""
    assert 'message=""' in text
    assert "parent_id" not in pairs
    assert "task=shop.ship " in text


def test_the_sentence_says_what_failed_and_how(
    records: list[logging.LogRecord],
) -> None:
    """For those who read logs with their eyes."""
    FailureLog(None).failed(settlement())

    text = records[0].getMessage()
    assert text.startswith(
        "task failed: shop.ship[task-1] exception: shop.errors.NoStock: none left "
        "(attempt 2, queue shop after 1.235 s, group "
    )


def test_a_message_that_never_ran_is_told_too(records: list[logging.LogRecord]) -> None:
    """Without a task, an id or a runtime."""
    never = settlement(task="", task_id="", run_s=None, reason="malformed")

    for log_format in FORMATS:
        FailureLog(log_format).failed(never)

    assert len(records) == 3
    assert "(no task)[no id] malformed" in records[0].getMessage()
    assert " after " not in records[0].getMessage()
    assert json.loads(records[1].getMessage())["runtime_s"] is None
    assert "runtime_s" not in records[2].getMessage()


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_hostile_failure_is_one_line(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """No control character, no line of its own, nothing that does not encode."""
    FailureLog(log_format).failed(hostile())

    (record,) = records
    text = record.getMessage()
    assert not controls_of(text)
    text.encode()


@pytest.mark.parametrize("log_format", FORMATS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=()), max_size=40))
def test_no_text_brings_a_control_character(
    records: list[logging.LogRecord], log_format: str | None, text: str
) -> None:
    """In any of the facts; a percent sign formats nothing."""
    records.clear()
    FailureLog(log_format).failed(hostile(text + "%s %(x)d"))

    (record,) = records
    assert not controls_of(record.getMessage())
    assert "%s" in record.getMessage()


#: A pair of logfmt: a name, and a value that is quoted where it must be.
PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ ="]+)(?: |$)')


@given(st.text(max_size=30))
@example('a b="c" \\')
def test_logfmt_has_a_pair_for_each_fact(text: str) -> None:
    """No value brings a pair of its own."""
    facts = failure_facts(hostile(text))

    line = module._logfmt(facts)

    names = [name for name, value in facts.items() if value is not None]
    assert [pair[1] for pair in PAIR.finditer(line)] == names
    assert PAIR.sub("", line) == ""


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_huge_message_is_cut(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """A log shipper drops long lines."""
    FailureLog(log_format).failed(settlement(failure=a_failure(message="x" * 100_000)))

    assert len(records[0].getMessage()) < 2_000
    assert "characters cut" in records[0].getMessage()


@pytest.mark.parametrize("log_format", FORMATS)
def test_only_the_redacted_call_is_logged(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """Neither text nor facts hold a secret; a traceback is not logged."""
    shown = show_arguments([], {"password": "hunter2"})

    FailureLog(log_format).failed(
        settlement(
            kwargs=shown.kwargs,
            arguments=shown.named,
            failure=a_failure(traceback="File x: hunter2"),
        )
    )

    assert "hunter2" not in records[0].getMessage()
    assert "hunter2" not in repr(vars(records[0]))


def test_a_failure_without_a_failure_is_told(records: list[logging.LogRecord]) -> None:
    """No settlement makes the log raise."""
    for log_format in FORMATS:
        FailureLog(log_format).failed(settlement(failure=None))

    assert len(records) == 3
    assert records[0].failure["exception"] is None  # type: ignore[attr-defined]


def test_a_logger_that_is_off_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The facts are not even gathered."""
    with caplog.at_level(logging.CRITICAL, "celery_resilience.failed"):
        FailureLog("json").failed("not a settlement")  # type: ignore[arg-type]

    assert caplog.records == []


# --- attached -------------------------------------------------------------------------


def test_an_attached_log_hears_failures_only(records: list[logging.LogRecord]) -> None:
    """One record for one settlement; other outcomes are no errors."""
    FailureLog("json").attach()

    for outcome in Outcome:
        emit(EVENTS[outcome], settlement=settlement(outcome=outcome))

    assert len(records) == 1


def test_a_second_log_takes_the_place_of_the_first(
    records: list[logging.LogRecord],
) -> None:
    """A worker started twice in one process logs once, in its own format."""
    FailureLog("json").attach()
    FailureLog("logfmt").attach()

    emit(EVENTS[Outcome.FAILED], settlement=settlement())

    (record,) = records
    assert record.getMessage().startswith("event=task_failed")


# --- start and stop -------------------------------------------------------------------


class Deliveries:
    """What a worker counted."""

    received = 12
    counts: ClassVar = Counter(
        {Outcome.FAILED: 2, Outcome.SUCCEEDED: 9, Outcome.SNOOZED: 1}
    )


def test_a_start_is_one_line(records: list[logging.LogRecord]) -> None:
    """Also where the consumer reconnects."""
    log = WorkerLog(Deliveries(), lambda: "kept here, 100%", lambda: "drained")

    log.started([])
    log.started(["a door"])

    assert [record.getMessage() for record in records] == ["kept here, 100%"]
    assert records[0].levelno == logging.INFO


def test_each_weak_door_is_told(records: list[logging.LogRecord]) -> None:
    """As a warning, behind the line of the start."""
    WorkerLog(Deliveries(), lambda: "kept here", lambda: "drained").started(
        ["door a", "door 100%"]
    )

    assert [record.getMessage() for record in records[1:]] == ["door a", "door 100%"]
    assert {record.levelno for record in records[1:]} == {logging.WARNING}


def test_a_start_is_heard_where_only_warnings_are() -> None:
    """`celery worker` logs warnings by default; a level that was set stays."""
    module.worker_logger.setLevel(logging.NOTSET)
    WorkerLog(Deliveries(), lambda: "x", lambda: "drained").started([])
    assert module.worker_logger.level == logging.INFO

    module.worker_logger.setLevel(logging.ERROR)
    WorkerLog(Deliveries(), lambda: "x", lambda: "drained").started([])
    assert module.worker_logger.level == logging.ERROR


def test_a_stop_tells_what_became_of_the_deliveries(
    records: list[logging.LogRecord],
) -> None:
    """The counts add up to the deliveries."""
    WorkerLog(Deliveries(), lambda: "x", lambda: "drained").stopped()

    assert records[0].getMessage() == (
        "stopped after 0 s: 12 deliveries, 9 succeeded, 1 snoozed, 2 failed; drained"
    )


def test_the_facts_hold_no_control_character_either(
    records: list[logging.LogRecord],
) -> None:
    """A formatter that prints `record.failure` prints what is in it."""
    FailureLog("json").failed(settlement(failure=a_failure(message="a\x1b[31mb")))

    assert "\x1b" not in records[0].failure["message"]  # type: ignore[attr-defined]
