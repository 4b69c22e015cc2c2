"""What a worker's metrics ask of the app and its queues."""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from opentelemetry import metrics as otel

from celery_resilience._pools import slots_of
from celery_resilience.events import emit
from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.bootstep import OTEL_SDK, Questions, WorkerMetrics


@pytest.fixture
def app() -> Celery:
    """Consumes a and b; other queues are made when they are asked for."""
    app = Celery("unit", broker="memory://", set_as_current=False)
    app.conf.update(
        task_default_queue="a",
        task_routes=[
            {
                "foreign": "elsewhere",
                "routed": {"queue": "b"},
                "keyed": {"priority": 1},
            },
            lambda name, *_, **__: "b" if name == "by hand" else None,
        ],
    )
    for queue in ("a", "b"):
        app.amqp.queues.add(queue)
    return app


def metrics_of(app: Celery, *, address: Any = ("127.0.0.1", 1)) -> WorkerMetrics:
    """Of a worker that has not started."""
    questions = Questions(None, (), None, lambda pid: None)
    return WorkerMetrics(app, None, address=address, tasks=(), questions=questions)


def test_a_look_at_the_routes_makes_no_queue(app: Celery) -> None:
    """Celery before 5.7 would consume it after the next reconnect."""
    metrics = metrics_of(app)
    app.amqp.queues.select(["b", "a"])
    before = dict(app.amqp.queues)

    found = {
        task: metrics._queues_of(task)
        for task in ("foreign", "routed", "by hand", "plain", "keyed")
    }

    assert dict(app.amqp.queues) == before
    assert found == {
        "foreign": ["b"],  # of those that are consumed
        "routed": ["b"],
        "by hand": ["b"],
        "plain": ["a"],
        "keyed": ["a"],
    }


def test_queues_are_looked_up_at_each_question(app: Celery) -> None:
    """One that a circuit has paused at the start is asked for, and one that is added."""
    app.amqp.queues.select(["a", "b"])
    metrics = metrics_of(app)
    metrics._worker = SimpleNamespace(pool=None)
    metrics.attach()
    app.amqp.queues.deselect("b")
    emit("circuits.queue_paused", queue="b")

    (queues, *_) = metrics._probes()
    assert set(queues.ask()[i.QUEUED]) == {("a",), ("b",)}
    app.amqp.queues.select_add("c")
    app.amqp.queues.deselect("a")
    assert set(queues.ask()[i.QUEUED]) == {("b",), ("c",)}
    metrics.metrics.detach()


def test_a_worker_without_a_provider_asks_and_counts_nothing(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenTelemetry's SDK is imported by many who do not export with it."""
    importlib.import_module(OTEL_SDK)
    monkeypatch.setattr(otel, "get_meter_provider", otel.NoOpMeterProvider)
    before = set(threading.enumerate())
    metrics = metrics_of(app, address=None)
    metrics._worker = SimpleNamespace(pool=None)
    metrics.attach()
    assert metrics.is_read

    metrics.ready()

    assert not metrics.is_read
    assert set(threading.enumerate()) <= before
    emit("circuits.opened")
    assert not metrics.metrics._notes
    metrics.ended()


def test_the_slots_of_gevent_are_what_it_may_run() -> None:
    """Before Celery 5.7 it tells how many greenlets it has just now."""
    assert slots_of(SimpleNamespace(limit=8, num_processes=3)) == 8
