"""Every line that is written inside a task says which one."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import timeit
from collections.abc import Iterator
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app import trace
from celery.app.log import TaskFormatter
from celery.app.task import Context
from celery.utils.log import ColorFormatter
from unit.log_records import Recorder, recorded

from celery_resilience import ResilientTask, TaskContext, add_task_context
from celery_resilience.body import RUNNING
from celery_resilience.telemetry.binding import (
    NAMES,
    bind_handlers,
    bind_trace_id,
)
from celery_resilience.telemetry.log_format import LineFormatter
from celery_resilience.telemetry.log_setup import LogSetup

TRACE = "a" * 32

logger = logging.getLogger("shop.tasks")


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What the app logs, on a handler that binds."""
    with recorded("shop") as found:
        (handler,) = (it for it in logging.getLogger("shop").handlers)
        handler.addFilter(TaskContext())
        yield found


class Shop:
    """An app whose tasks a tracer runs as a worker does."""

    def __init__(self) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.task_ignore_result = True

    def task(self, body: Any, name: str = "ship", **options: Any) -> Any:
        """A resilient task."""
        options.setdefault("base", ResilientTask)
        body.__name__ = "body"  # Celery writes a function's head anew
        return self.app.task(name=name, shared=False, **options)(body)

    def run(self, name: str = "ship", **request: Any) -> None:
        """Run it, of a message with these headers."""
        headers = {
            "id": "task-1",
            "root_id": "root-1",
            "parent_id": "parent-1",
            "retries": 2,
            "delivery_info": {},
            "task": name,
            "traceparent": f"00-{TRACE}-{'b' * 16}-01",
            **request,
        }
        task = self.app.tasks[name]
        trace.build_tracer(name, task, app=self.app)(headers["id"], (), {}, headers)


@pytest.fixture
def shop() -> Shop:
    """One."""
    return Shop()


def bound(record: logging.LogRecord) -> dict[str, Any]:
    """What is bound to a record."""
    return {name: vars(record)[name] for name in NAMES if name in vars(record)}


BOUND = {
    "task_id": "task-1",
    "task_name": "ship",
    "root_id": "root-1",
    "parent_id": "parent-1",
    "attempt": 3,
    "trace_id": TRACE,
}


@pytest.mark.parametrize("base", [ResilientTask, None])
def test_a_line_inside_a_task_is_bound_to_it(
    shop: Shop, records: list[logging.LogRecord], base: Any
) -> None:
    """A plain task's too; a line outside of one to none."""
    shop.task(lambda: logger.info("packing"), base=base or shop.app.Task)

    logger.info("before")
    shop.run()
    logger.info("after")

    assert [bound(it) for it in records] == [{}, BOUND, {}]


def test_what_is_not_known_is_none(
    shop: Shop, records: list[logging.LogRecord]
) -> None:
    """So that a format that names it works for every task."""
    shop.task(lambda: logger.info("packing"))

    shop.run(root_id=None, parent_id=None, retries=0, traceparent=None)

    assert bound(records[0]) == {
        **BOUND,
        "root_id": "task-1",
        "parent_id": None,
        "attempt": 1,
        "trace_id": None,
    }


def test_a_run_may_have_a_trace_of_its_own(
    shop: Shop, records: list[logging.LogRecord]
) -> None:
    """As one of a replay has; the lines after that belong to it."""

    def body(self: Any) -> None:
        logger.info("before")
        bind_trace_id(self.request_stack.top, "c" * 32)
        logger.info("after")

    shop.task(body, bind=True)
    shop.run()

    assert [vars(it)["trace_id"] for it in records] == [TRACE, "c" * 32]


def test_a_task_within_a_task_has_its_own_lines(
    shop: Shop, records: list[logging.LogRecord]
) -> None:
    """One that is applied; one that is called is a part of its caller."""
    inner = shop.task(lambda: logger.info("inner"), name="inner")

    def body() -> None:
        logger.info("outer")
        inner.apply(task_id="inner-1")
        logger.info("outer")
        inner()
        logger.info("outer")

    shop.task(body)
    shop.run()

    ids = [vars(it)["task_id"] for it in records if it.name == "shop.tasks"]
    assert ids == ["task-1", "inner-1", "task-1", "task-1", "task-1"]


def test_a_thread_with_the_tasks_context_is_bound(
    records: list[logging.LogRecord],
) -> None:
    """As those of `asyncio.to_thread` are; another thread belongs to no task."""
    request = Context({"id": "task-1", "retries": 0})
    token = RUNNING.set((SimpleNamespace(name="ship"), request))
    try:
        asyncio.run(asyncio.to_thread(logger.info, "in another thread"))
        for run in (copy_context().run, lambda call, text: call(text)):
            thread = threading.Thread(target=run, args=(logger.info, "own thread"))
            thread.start()
            thread.join()
    finally:
        RUNNING.reset(token)

    assert [vars(it).get("task_id") for it in records] == ["task-1", "task-1", None]


def test_what_a_record_has_already_stays(
    shop: Shop, records: list[logging.LogRecord]
) -> None:
    """An app's own `extra` wins, and is no error as with a factory of records."""
    shop.task(lambda: logger.info("x", extra={"task_id": "mine"}))

    shop.run()

    assert bound(records[0]) == {**BOUND, "task_id": "mine"}


def test_a_format_may_name_what_is_missing_outside_of_a_task() -> None:
    """A filter of the app's own says what stands there."""
    record = logging.LogRecord("shop", 20, "", 0, "hello", (), None)

    assert TaskContext(missing="-").filter(record)
    assert logging.Formatter("%(task_id)s %(attempt)s %(message)s").format(record) == (
        "- - hello"
    )


def test_an_event_of_structlogs_is_bound(shop: Shop) -> None:
    """By a processor; what it has already stays."""
    events: list[Any] = []
    shop.task(
        lambda: events.append(add_task_context(None, "info", {"event": "packing"}))
    )

    shop.run()

    assert events == [{"event": "packing", **BOUND}]
    assert add_task_context(None, "info", {"event": "x"}) == {"event": "x"}


@pytest.fixture
def handler() -> Iterator[logging.Handler]:
    """A handler of a logger somewhere."""
    handler = Recorder()
    logging.getLogger("shop.somewhere").addHandler(handler)
    yield handler
    logging.getLogger("shop.somewhere").removeHandler(handler)


def test_every_handler_binds_once(handler: logging.Handler) -> None:
    """Those of loggers anywhere; before the user's own filters, which may look."""
    own = logging.Filter()
    handler.addFilter(own)

    bind_handlers()
    bind_handlers()

    first, second = handler.filters
    assert isinstance(first, TaskContext)
    assert second is own


def test_a_filter_of_the_users_own_is_enough(handler: logging.Handler) -> None:
    """It says what is missing, and ours would not."""
    own = TaskContext(missing="-")
    handler.addFilter(own)

    bind_handlers()

    assert handler.filters == [own]


def a_setup(log_format: str | None) -> LogSetup:
    """What a worker of an app without resilient tasks has."""
    return LogSetup(
        log_format, (), names_of=lambda _: ((), ()), is_ours=lambda _: False
    )


@pytest.mark.parametrize("kind", [ColorFormatter, TaskFormatter])
def test_a_ready_form_takes_the_place_of_celerys(
    handler: logging.Handler, kind: Any
) -> None:
    """And gives it back to a worker without one; a user's own formatter stays."""
    celerys = kind("%(message)s")
    handler.setFormatter(celerys)

    for _ in range(2):
        a_setup("json").apply()
        assert isinstance(handler.formatter, LineFormatter)
    a_setup("logfmt").apply()
    assert handler.formatter.instead_of is celerys
    a_setup(None).apply()
    assert handler.formatter is celerys

    own = logging.Formatter()
    handler.setFormatter(own)
    a_setup("json").apply()
    assert handler.formatter is own


def test_binding_a_line_costs_less_than_the_line() -> None:
    """Less than to make and to format its record; a task pays nothing for it."""
    bind, form = TaskContext().filter, logging.Formatter("%(asctime)s %(message)s")
    record = logging.LogRecord("shop", 20, "", 0, "hello", (), None)
    attributes = dict(vars(record))

    def bound_line() -> None:
        vars(record).clear()
        vars(record).update(attributes)
        bind(record)

    def line() -> None:
        form.format(logger.makeRecord("shop", 20, "", 0, "hello", (), None))

    def least_s(call: Any) -> float:
        times = timeit.repeat(call, time.thread_time, number=50, repeat=100)
        return float(min(times))

    token = RUNNING.set((SimpleNamespace(name="ship"), Context({"id": "task-1"})))
    try:
        assert least_s(bound_line) < least_s(line)
    finally:
        RUNNING.reset(token)
