"""A worker that cannot be set up does not start."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from unit.log_records import recorded

from celery_resilience import Resilience
from celery_resilience.errors import ConfigurationError
from celery_resilience.install import Installation, installation_of
from celery_resilience.worker import (
    ResilienceStep,
    WorkerSetup,
    do_each,
    prepare_worker,
)


@pytest.fixture
def installation() -> Installation:
    """In an app that has no worker yet."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    Resilience(app)
    return installation_of(app)


def step_of(installation: Installation) -> Any:
    """What the worker makes of our setup when it starts."""
    worker = SimpleNamespace(hostname="w@h", app=installation.app, pool_cls="solo")
    prepare_worker(installation, worker)
    steps = installation.app.steps["worker"]
    (step,) = (it for it in steps if issubclass(it, ResilienceStep))
    return step


def test_what_fails_at_the_end_keeps_nothing_from_being_done() -> None:
    """The exit code is the last of it."""
    done: list[str] = []

    def fail() -> None:
        raise OSError("the broker is away")

    with recorded("celery_resilience.worker") as records:
        do_each(partial(done.append, "closed"), fail, partial(done.append, "told"))

    assert done == ["closed", "told"]
    assert "the broker is away" in logging.Formatter().format(records[0])


def test_an_error_of_the_setup_ends_the_start(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery would swallow it, and run keyed tasks unguarded; its traceback is logged."""

    def apply(self: Any) -> None:
        raise AttributeError("no attribute 'get_global_scope'")

    monkeypatch.setattr(WorkerSetup, "check", lambda self: None)
    monkeypatch.setattr(WorkerSetup, "apply", apply)
    step = step_of(installation)

    with (
        recorded("celery_resilience.worker") as records,
        pytest.raises(ConfigurationError, match="AttributeError: no attribute 'get_gl"),
    ):
        step(None)

    (record,) = records
    assert record.levelno == logging.ERROR
    assert "in apply" in logging.Formatter().format(record)


def test_a_refusal_has_no_traceback(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sentence says what to do."""

    def check(self: Any) -> None:
        raise ConfigurationError("no failed queue")

    monkeypatch.setattr(WorkerSetup, "check", check)
    step = step_of(installation)

    with (
        recorded("celery_resilience.worker") as records,
        pytest.raises(ConfigurationError, match="no failed queue"),
    ):
        step(None)

    assert records == []


#: In a process of its own, for a worker's setup is seen in all of one.
READY = """
from types import SimpleNamespace
from celery import Celery, signals
from celery_resilience import Resilience
from celery_resilience.install import installation_of
from celery_resilience.telemetry.bootstep import WorkerMetrics
from celery_resilience.telemetry.log_worker import WorkerLog
from celery_resilience.worker import WorkerSetup

app = Celery("shop", broker="memory://", set_as_current=False)
Resilience(app)
class Worker(SimpleNamespace):
    __hash__ = object.__hash__
worker = Worker(hostname="w@h", app=app, pool_cls="solo", _process_task=None)
worker.consumer_cls = "celery.worker.consumer:Consumer"
def raises(*_):
    raise KeyError("Attempt to overwrite 'trace_id' in LogRecord")
WorkerLog.started = raises
WorkerMetrics.ready = lambda self: print("metrics are ready")
WorkerSetup(installation_of(app), worker).apply()
signals.worker_ready.send(worker)
"""


def test_a_part_of_the_start_that_fails_stops_no_other() -> None:
    """The metrics begin though the log's first line was not written; it is logged."""
    ran = subprocess.run(
        [sys.executable, "-c", READY],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ran.stdout == "metrics are ready\n", ran.stderr
    assert "a part of the worker's start failed" in ran.stderr
    assert "Attempt to overwrite 'trace_id'" in ran.stderr
