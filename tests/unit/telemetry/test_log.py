"""One structured record for each failed delivery, and nothing raw in it."""

from __future__ import annotations

import json
import logging
import re
import shlex
import threading
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from polling import eventually
from unit.log_records import recorded
from unit.specimens import HOSTILE_TEXT, a_failure, a_settlement, replay_mark

from celery_resilience.events import emit
from celery_resilience.outcome import EVENTS, Outcome, Reason, Settlement
from celery_resilience.redaction import show_arguments
from celery_resilience.telemetry import log as module
from celery_resilience.telemetry.log import FailureLog
from celery_resilience.telemetry.log_facts import failure_facts
from celery_resilience.telemetry.log_format import ATTRIBUTES, as_logfmt

FORMATS = [None, "json", "logfmt"]


#: The logs of a test, whose threads end with it.
made: list[FailureLog] = []


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    """No log of another test, before or after."""
    detach()
    yield
    detach()
    while made:
        made.pop().stopped()


def detach() -> None:
    """Nobody hears of what has ended."""
    for stop in module._stops:
        stop()
    module._stops = []


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged, from INFO on."""
    with recorded("celery_resilience") as found:
        yield found


class Clock:
    """Seconds that the test turns on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def failure_log(log_format: str | None, **more: Any) -> FailureLog:
    """A log whose clock stands still."""
    more.setdefault("storm_limit", 1_000_000)
    made.append(FailureLog(log_format, **{"clock": Clock(), **more}))
    return made[-1]


def settlement(**changes: Any) -> Settlement:
    """A failed delivery with all its facts."""
    parts: dict[str, Any] = {
        "attempt": 2,
        "root_id": "root",
        "parent_id": "parent",
        "pid": 77,
        "run_s": 1.23456789,
        "wait_s": 0.5,
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
        "args": "(7,)",
        "kwargs": "{'card': '***'}",
        "marks": replay_mark("r" * 32, "t", 3),
        "facts": {"idempotency_key": "ship:7"},
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
        facts={"idempotency_key": text, "error": text, "trace_id": text},
        failure=a_failure(
            exception=text, message=text, fingerprint=text, traceback=text
        ),
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
    "wait_s": 0.5,
    "worker": "celery@one",
    "pid": 77,
    "child_rss_mib": 41.5,
    "trace_id": "a" * 32,
    "idempotency_key": "ship:7",
    "replay": 3,
    "args": "(7,)",
    "kwargs": "{'card': '***'}",
    "traceback": "Traceback (most recent call last):\nNoStock: none left\n",
}


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_failure_is_one_record(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """An error of our logger, with the facts as attributes in every format."""
    failure_log(log_format, rss_mib_of={77: 41.5}.get).failed(settlement())

    (record,) = records
    assert record.name == "celery_resilience.failed"
    assert record.levelno == logging.ERROR
    attributes = vars(record)
    for name, value in FACTS.items():
        assert attributes[ATTRIBUTES.get(name, name)] == value
    assert len(attributes["fingerprint"]) == 16


def test_no_attribute_is_one_that_others_use() -> None:
    """Neither `logging` itself, nor structlog, in whose events ours are put."""
    names = {ATTRIBUTES.get(name, name) for name in failure_facts(settlement(), None)}
    blank = vars(logging.LogRecord("", 0, "", 0, "", (), None))

    assert not names & {*blank, "message", "asctime", "event", "exception", "stack"}


def test_json_is_the_facts(records: list[logging.LogRecord]) -> None:
    """On one line."""
    failure_log("json", rss_mib_of={77: 41.5}.get).failed(settlement())

    (record,) = records
    told = json.loads(record.getMessage())
    assert len(told.pop("fingerprint")) == 16
    assert told == FACTS
    assert "\n" not in record.getMessage()


def test_logfmt_is_the_facts_without_those_that_are_none(
    records: list[logging.LogRecord],
) -> None:
    """Name and value, quoted where it has spaces, quotes or an equals sign."""
    failure_log("logfmt").failed(
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
    failure_log(None).failed(settlement())

    text = records[0].getMessage()
    assert text.startswith(
        "task failed: shop.ship[task-1] exception: shop.errors.NoStock: none left "
        "(attempt 2, queue shop after 1.235 s, group "
    )


def test_a_message_that_never_ran_is_told_too(records: list[logging.LogRecord]) -> None:
    """Without a task, an id, a process or a runtime."""
    never = settlement(task="", task_id="", run_s=None, pid=None, reason="malformed")

    for log_format in FORMATS:
        failure_log(log_format).failed(never)

    assert len(records) == 3
    assert "(no task)[no id] malformed" in records[0].getMessage()
    assert " after " not in records[0].getMessage()
    assert json.loads(records[1].getMessage())["runtime_s"] is None
    assert "runtime_s" not in records[2].getMessage()


def test_the_key_of_a_message_is_told_where_its_run_said_none(
    records: list[logging.LogRecord],
) -> None:
    """Of a killed child, for example."""
    marks = {"key": ["ship:7", "0" * 32]}
    failure_log(None).failed(settlement(facts={}, marks=marks))

    assert vars(records[0])["idempotency_key"] == "ship:7"
    assert vars(records[0])["replay"] is None


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_hostile_failure_is_one_line(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """No control character, no line of its own, nothing that does not encode."""
    failure_log(log_format).failed(hostile())

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
    failure_log(log_format).failed(hostile(text + "%s %(x)d"))

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

    line = as_logfmt(facts)

    names = [name for name, value in facts.items() if value is not None]
    assert [pair[1] for pair in PAIR.finditer(line)] == names
    assert PAIR.sub("", line) == ""


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_huge_failure_is_cut(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """A log shipper drops long lines; a traceback keeps its two ends."""
    failure_log(log_format).failed(
        settlement(
            failure=a_failure(
                message="x" * 100_000, traceback=f"first{'y' * 70_000}last"
            )
        )
    )

    assert len(records[0].getMessage()) < 8_000
    assert "characters cut" in records[0].getMessage()
    traceback = vars(records[0])["traceback"]
    assert traceback.startswith("first")
    assert traceback.endswith("last")


@pytest.mark.parametrize("log_format", FORMATS)
def test_only_the_redacted_call_is_logged(
    records: list[logging.LogRecord], log_format: str | None
) -> None:
    """Neither text nor attributes hold a secret."""
    shown = show_arguments([], {"password": "hunter2"})

    failure_log(log_format).failed(
        settlement(kwargs=shown.kwargs, arguments=shown.named)
    )

    assert "hunter2" not in records[0].getMessage()
    assert "hunter2" not in repr(vars(records[0]))


def test_a_failure_without_a_failure_is_told(records: list[logging.LogRecord]) -> None:
    """No settlement makes the log raise."""
    for log_format in FORMATS:
        failure_log(log_format).failed(settlement(failure=None))

    assert len(records) == 3
    assert vars(records[0])["exception_type"] is None


def test_a_logger_that_is_off_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The facts are not even gathered."""
    with caplog.at_level(logging.CRITICAL, "celery_resilience"):
        failure_log("json").failed("not a settlement")  # type: ignore[arg-type]
        failure_log("json").ended("not a settlement")  # type: ignore[arg-type]

    assert caplog.records == []


def test_the_attributes_hold_no_control_character_either(
    records: list[logging.LogRecord],
) -> None:
    """A formatter that prints them prints what is in them."""
    failure_log("json").failed(settlement(failure=a_failure(message="a\x1b[31mb")))

    assert "\x1b" not in vars(records[0])["exception_message"]


# --- what comes again -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "reason", "facts", "said"),
    [
        (
            Outcome.RETRIED,
            "requests.Timeout",
            {"delay_s": 3, "error": "no answer"},
            (
                "task retried: shop.ship[task-1] in 3 s: requests.Timeout: no answer "
                "(attempt 1, queue shop)"
            ),
        ),
        (
            Outcome.RETRIED,
            None,
            {"delay_s": None},
            "task retried: shop.ship[task-1] (attempt 1, queue shop)",
        ),
        (
            Outcome.SKIPPED,
            "already paid",
            {},
            "task skipped: shop.ship[task-1]: already paid (attempt 1, queue shop)",
        ),
        (
            Outcome.SNOOZED,
            "circuit_open",
            {"delay_s": 7.5},
            (
                "task snoozed: shop.ship[task-1] for 7.5 s: circuit_open "
                "(attempt 1, queue shop)"
            ),
        ),
        (
            Outcome.REQUEUED,
            Reason.WORKER_LOST,
            {"delay_s": 2.0, "error": "signal 9 (SIGKILL)", "crashes": 1},
            (
                "task requeued: shop.ship[task-1] in 2 s: worker_lost: signal 9 "
                "(SIGKILL) (attempt 1, queue shop, crashes 1)"
            ),
        ),
        (
            Outcome.REQUEUED,
            Reason.HARD_TIME_LIMIT,
            {"delay_s": 4.0, "error": "the run passed its limit", "crashes": 2},
            (
                "task requeued: shop.ship[task-1] in 4 s: hard_time_limit: the run "
                "passed its limit (attempt 1, queue shop, crashes 2)"
            ),
        ),
    ],
)
def test_what_comes_again_or_did_nothing_is_one_line(
    records: list[logging.LogRecord],
    outcome: Outcome,
    reason: str | None,
    facts: dict[str, Any],
    said: str,
) -> None:
    """Of INFO, or a crash as a warning, with its reason, as sentence and attributes."""
    level = logging.WARNING if "crashes" in facts else logging.INFO
    failure_log(None).attach()

    ended = a_settlement(outcome=outcome, reason=reason, facts=facts)
    emit(EVENTS[outcome], settlement=ended)

    (record,) = records
    assert (record.name, record.levelno) == ("celery_resilience.outcome", level)
    assert record.getMessage() == said
    assert vars(record)["event_name"] == f"task_{outcome}"
    assert vars(record)["reason"] == reason
    assert vars(record)["delay_s"] == facts.get("delay_s")
    assert vars(record)["crashes"] == facts.get("crashes")


def test_a_date_is_no_delay(records: list[logging.LogRecord]) -> None:
    """A retry may have an ETA, which no JSON could hold."""
    ended = a_settlement(outcome=Outcome.RETRIED, facts={"delay_s": object()})
    failure_log("json").ended(ended)

    assert json.loads(records[0].getMessage())["delay_s"] is None


# --- a storm --------------------------------------------------------------------------


def told_and_summed(records: list[logging.LogRecord]) -> tuple[int, int]:
    """Failures that were told one by one, and those of the summaries."""
    more = [vars(it)["more"] for it in records if hasattr(it, "more")]
    return len(records) - len(more), sum(more)


def test_a_storm_is_told_in_full_and_then_summed_up(
    records: list[logging.LogRecord],
) -> None:
    """The first of a group within a minute, and how many more; none is lost count of."""
    clock = Clock()
    log = failure_log(None, clock=clock, storm_limit=20, storm_window_s=60)
    for number in range(500):
        log.failed(settlement(task_id=f"task-{number}"))
    assert told_and_summed(records) == (20, 0)

    log.stopped()

    assert told_and_summed(records) == (20, 480)
    summary = records[-1]
    fingerprint = a_failure().fingerprint
    assert summary.getMessage() == (
        f"... and 480 more of group {fingerprint} (shop.ship, exception), "
        "last id task-499"
    )
    assert summary.levelno == logging.ERROR
    assert vars(summary)["event_name"] == "failures_summarised"
    assert vars(summary)["fingerprint"] == fingerprint


def test_another_group_is_told_beside_a_storm(
    records: list[logging.LogRecord],
) -> None:
    """A storm hides nothing of another cause."""
    log = failure_log(None, storm_limit=1)
    for _ in range(5):
        log.failed(settlement())

    log.failed(settlement(failure=a_failure(fingerprint="another")))

    assert [vars(it)["fingerprint"] for it in records][1:] == ["another"]


def test_a_summary_comes_without_another_failure(
    records: list[logging.LogRecord],
) -> None:
    """A thread tells it when the window ends, and ends with the storm."""
    log = failure_log(None, clock=time.monotonic, storm_limit=1, storm_window_s=0.05)
    for _ in range(3):
        log.failed(settlement())

    eventually(lambda: told_and_summed(records) == (1, 2), within_s=5)
    eventually(lambda: "failure-log" not in {t.name for t in threading.enumerate()})


def test_the_thread_of_a_storm_ends_with_the_worker() -> None:
    """Though the window goes on for an hour."""
    log = failure_log(None, storm_limit=1, storm_window_s=3_600)
    with recorded("celery_resilience"):
        for _ in range(3):
            log.failed(settlement())
        assert "failure-log" in {t.name for t in threading.enumerate()}

        log.stopped()

    eventually(lambda: "failure-log" not in {t.name for t in threading.enumerate()})


def test_threads_lose_no_count(records: list[logging.LogRecord]) -> None:
    """A pool's threads settle at once."""
    log = failure_log(None, storm_limit=20, storm_window_s=3_600)

    def fail() -> None:
        for _ in range(500):
            log.failed(settlement())

    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.stopped()

    assert told_and_summed(records) == (20, 1_980)


# --- attached -------------------------------------------------------------------------


def test_an_attached_log_hears_each_outcome_once(
    records: list[logging.LogRecord],
) -> None:
    """Failures are errors; successes, and what was put back, are not told."""
    failure_log("json").attach()

    for outcome in Outcome:
        ended = settlement(outcome=outcome, reason=Reason.INTERRUPTED)
        emit(EVENTS[outcome], settlement=ended)

    assert [vars(it)["event_name"] for it in records] == [
        "task_skipped",
        "task_retried",
        "task_snoozed",
        "task_failed",
    ]


def test_a_second_log_takes_the_place_of_the_first(
    records: list[logging.LogRecord],
) -> None:
    """A worker started twice in one process logs once, in its own format."""
    failure_log("json").attach()
    failure_log("logfmt").attach()

    emit(EVENTS[Outcome.FAILED], settlement=settlement())
    emit(EVENTS[Outcome.SKIPPED], settlement=settlement(outcome=Outcome.SKIPPED))

    assert [it.getMessage().partition(" ")[0] for it in records] == [
        "event=task_failed",
        "event=task_skipped",
    ]


@pytest.mark.parametrize("ends", [["stopped"], ["exiting"], ["stopped", "exiting"]])
def test_the_end_of_a_worker_sums_up(
    records: list[logging.LogRecord], ends: list[str]
) -> None:
    """Once, whatever it ends with; also where what is stuck has to be cut off."""
    failure_log(None, storm_limit=1).attach()
    for _ in range(3):
        emit(EVENTS[Outcome.FAILED], settlement=settlement())

    for end in ends:
        emit(f"lifecycle.{end}", code=0)

    assert told_and_summed(records) == (1, 2)
