"""Celery's own records hold no argument, no return value and no secret."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.app import trace
from celery.exceptions import Ignore, Retry
from celery.worker import strategy  # noqa: F401 -- makes its logger as Celery does
from celery.worker.consumer import consumer
from unit.log_records import recorded

from celery_resilience import Resilience, ResilientTask
from celery_resilience._celery_worker import quoting_lines
from celery_resilience.task import parameters_of
from celery_resilience.telemetry.log_redaction import (
    LOGGERS,
    CeleryRecords,
    filter_celerys,
)

SECRET = "hunter2's dog"


@pytest.fixture(autouse=True)
def filtered() -> Iterator[dict[str, bool]]:
    """Celery's loggers redact; what it yields says whether a line of ours tells."""
    says = {"tells": True}
    filter_celerys(
        CeleryRecords(
            lambda task: (parameters_of(task.run), ("pin",)),
            tells=lambda: says["tells"],
            is_ours=lambda task: isinstance(task, ResilientTask),
        )
    )
    yield says
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for found in [it for it in logger.filters if isinstance(it, CeleryRecords)]:
            logger.removeFilter(found)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What Celery logs."""
    with recorded("celery") as found:
        yield found


def run(
    body: Any, *args: Any, is_ours: bool = True, is_eager: bool = False, **kwargs: Any
) -> None:
    """Let Celery's tracer run a body as a worker does."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.task_ignore_result = True
    if is_ours:
        Resilience(app)
    base: Any = ResilientTask if is_ours else app.Task
    body.__name__ = "body"  # Celery writes a function's head anew
    app.task(base=base, name="pay", bind=True, shared=False)(body)
    app.finalize()
    request = {"id": "task-1", "task": "pay", "delivery_info": {}, "hostname": "h"}
    request["is_eager"] = is_eager
    tracer = trace.build_tracer("pay", app.tasks["pay"], app=app)
    tracer("task-1", args, kwargs, request)


def everything(records: list[logging.LogRecord]) -> str:
    """All that a formatter could write of records."""
    written = [logging.Formatter().format(it) for it in records]
    return "\n".join([*written, *(repr(vars(it)) for it in records)])


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_success_says_neither_arguments_nor_result(
    records: list[logging.LogRecord], is_ours: bool
) -> None:
    """In its text, and in the attribute that formatters of JSON write."""
    run(lambda self, *_, **__: {"token": SECRET}, 1, pin=SECRET, is_ours=is_ours)

    (record,) = records
    assert record.name == "celery.app.trace"
    data: Any = vars(record)["data"]
    assert (data["args"], data["kwargs"], data["return_value"]) == ("***",) * 3
    assert record.getMessage().startswith("Task pay[task-1] succeeded in ")
    assert record.getMessage().endswith("s: ***")
    assert "hunter2" not in everything(records)


def test_what_says_nothing_is_left(records: list[logging.LogRecord]) -> None:
    """An operator sees that there was none."""
    run(lambda self: None)

    data: Any = vars(records[0])["data"]
    assert (data["args"], data["kwargs"], data["return_value"]) == ("()", "{}", "None")


@pytest.mark.parametrize("secret", [SECRET, "plain-secret", "a\"b\\c'd"])
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_failure_says_no_secret(
    records: list[logging.LogRecord], is_ours: bool, secret: str
) -> None:
    """That its exception quotes: as text, as repr, in the traceback, in a cause."""

    def body(self: Any, pin: str, order: Any) -> None:
        try:
            raise KeyError(f"no {order['password']}")
        except KeyError as exc:
            raise ValueError(f"cannot take {pin}") from exc

    run(body, secret, {"password": "letmein99"}, is_ours=is_ours)

    failures = [it for it in records if it.levelno == logging.ERROR]
    assert len(failures) == 1
    text = everything(failures)
    assert "cannot take ***" in text
    assert secret not in text
    assert "letmein99" not in text
    assert "Traceback" in logging.Formatter().format(failures[0])


def test_an_exception_without_a_secret_stays_one(
    records: list[logging.LogRecord],
) -> None:
    """Error trackers take it from the record."""

    def body(self: Any, pin: str) -> None:
        raise ValueError("out of stock")

    run(body, SECRET)

    (record,) = (it for it in records if it.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


def retrying(self: Any) -> None:
    """Celery's word for a retry that has been sent."""
    raise Retry(exc=ValueError("later"), when=3)


def ignoring(self: Any) -> None:
    """Celery's word for nothing to do."""
    raise Ignore


@pytest.mark.parametrize("body", [retrying, ignoring])
def test_what_our_line_tells_is_not_told_twice(
    records: list[logging.LogRecord], filtered: dict[str, bool], body: Any
) -> None:
    """A plain task's is Celery's to tell; so is ours where our line is switched off."""
    run(body)
    assert records == []

    run(body, is_ours=False)
    assert len(records) == 1

    filtered["tells"] = False
    run(body)
    assert len(records) == 2


@pytest.mark.parametrize("body", [retrying, ignoring])
def test_celerys_line_of_what_is_applied_eagerly_stays(
    records: list[logging.LogRecord], body: Any
) -> None:
    """It is no delivery, and no line of ours tells of it."""
    run(body, is_eager=True)

    assert len(records) == 1


@pytest.mark.parametrize("message", list(quoting_lines()))
def test_a_line_that_quotes_a_message_quotes_nothing(
    records: list[logging.LogRecord], message: str
) -> None:
    """Of a message that nobody knows, everything may be secret."""
    shown = quoting_lines()[message]
    count = message.count("%s") + message.count("%r")
    args = ["fine"] * shown + [SECRET] * (count - shown)
    logger = logging.getLogger(
        "celery.pool" if "TaskPool" in message else consumer.logger.name
    )

    logger.error(message, *args)

    assert "hunter2" not in everything(records)
    assert records[0].getMessage().count("***") == count - shown
    assert records[0].getMessage().count("fine") == shown


def test_a_decoders_error_does_not_quote_the_body(
    records: list[logging.LogRecord],
) -> None:
    """Its repr would: whole."""
    try:
        bytes([255, *b"hunter2"]).decode()
    except UnicodeDecodeError as exc:
        error, info = exc, sys.exc_info()

    consumer.crit(
        consumer.MESSAGE_DECODE_ERROR, error, "text", "utf-8", "{}", "b", exc_info=info
    )

    text = logging.Formatter().format(records[0])
    assert "hunter2" not in text.replace('*b"hunter2"', "the line of the source")
    assert "invalid start byte" in text


def test_every_line_that_quotes_is_one_of_celerys() -> None:
    """A release that writes another one would be quoted from."""
    known = {
        value
        for name, value in vars(consumer).items()
        if name.isupper() and isinstance(value, str) and "body" in value
    } - {consumer.MESSAGE_REPORT}
    assert known <= quoting_lines().keys()


def test_a_second_filter_takes_the_place_of_the_first() -> None:
    """A worker that is started twice in one process redacts once."""
    for _ in range(2):
        filter_celerys(
            CeleryRecords(
                lambda _: ((), ()), tells=lambda: True, is_ours=lambda _: False
            )
        )

    for name in LOGGERS:
        filters = logging.getLogger(name).filters
        assert sum(isinstance(it, CeleryRecords) for it in filters) == 1
