"""The same numbers, as OpenTelemetry's SDK exports them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from opentelemetry import metrics as otel
from opentelemetry.sdk.metrics import Meter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from celery_resilience.events import emit
from celery_resilience.outcome import COUNTED, ENDED, Ended, Outcome
from celery_resilience.telemetry import bootstep
from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry import opentelemetry_metrics as module
from celery_resilience.telemetry.business import RunCounts
from celery_resilience.telemetry.metrics import Metrics


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """Reads what the app's MeterProvider has."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(otel, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(module, "GOOD_S", 0.0)
    yield reader
    provider.shutdown()


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    """Of a worker with the task ship."""
    made = Metrics(["ship"])
    made.attach()
    yield made
    made.detach()


def exported(reader: InMemoryMetricReader) -> dict[str, list[dict[str, Any]]]:
    """The points by the name of their metric."""
    data = reader.get_metrics_data()
    found = json.loads(data.to_json()) if data is not None else {"resource_metrics": []}
    return {
        metric["name"]: metric["data"]["data_points"]
        for resource in found["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
    }


def settle(times: int = 1) -> None:
    """Deliveries that succeed."""
    for _ in range(times):
        emit(ENDED, ended=Ended("ship", "q", Outcome.SUCCEEDED, 1, 0.2))


def test_counters_gauges_and_histograms_are_exported(
    metrics: Metrics, reader: InMemoryMetricReader
) -> None:
    """With the labels and the buckets of the one list."""
    metrics.look_at(i.SLOTS, lambda: [((), 4.0)])
    assert module.attach(metrics)

    settle(3)
    metrics.tick()

    found = exported(reader)
    (outcomes,) = found[i.OUTCOMES.name]
    assert outcomes["value"] == 3
    assert outcomes["attributes"] == {
        "task": "ship",
        "queue": "q",
        "outcome": "succeeded",
    }
    assert found[i.SLOTS.name][0]["value"] == 4
    (run,) = found[i.RUN.name]
    assert (run["count"], round(run["sum"], 3)) == (3, 0.6)
    assert run["explicit_bounds"] == list(i.RUN.bounds)


def test_what_tasks_count_is_exported_too(
    metrics: Metrics, reader: InMemoryMetricReader
) -> None:
    """A histogram of theirs as its count and its sum."""
    module.attach(metrics)
    run = RunCounts(lambda name: False)
    run.count("orders", 2, {"shop": "a"})
    run.observe("amount_eur", 12.5, {})
    emit(COUNTED, fact=run.fact())
    metrics.tick()

    found = exported(reader)
    assert found["orders"][0]["value"] == 2
    assert found["orders"][0]["attributes"] == {"shop": "a"}
    assert found["amount_eur.count"][0]["value"] == 1
    assert found["amount_eur.sum"][0]["value"] == 12.5


def test_setting_up_twice_exports_once(
    metrics: Metrics, reader: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    """A second worker in one process takes the first one's place."""
    module.attach(metrics)
    second = Metrics(["ship"])
    second.attach()
    module.attach(second)
    module.attach(second)
    settle()
    second.tick()
    metrics.tick()

    found = exported(reader)
    assert [it["value"] for it in found[i.OUTCOMES.name]] == [1]
    assert found[i.RUN.name][0]["count"] == 1
    assert "already" not in caplog.text
    second.detach()


def test_a_child_exports_nothing_of_ours(
    metrics: Metrics, reader: InMemoryMetricReader
) -> None:
    """It has a copy of the exporter, and would tell all a second time."""
    module.attach(metrics)
    settle()
    pid = os.fork()
    if pid == 0:
        os._exit(i.OUTCOMES.name in exported(reader))

    assert os.waitpid(pid, 0)[1] == 0
    assert i.OUTCOMES.name in exported(reader)


def test_without_a_provider_nothing_is_done(metrics: Metrics) -> None:
    """The API alone has nothing behind it."""
    assert module.attach(metrics) is False
    assert metrics.hears is None


def test_a_meter_that_takes_no_buckets_is_used_without(
    metrics: Metrics, reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of 1.29: its histograms have the SDK's own."""
    create = Meter.create_histogram

    def older(self: Any, name: str, unit: str = "", description: str = "") -> Any:
        return create(self, name, unit, description)

    monkeypatch.setattr(Meter, "create_histogram", older)
    module.attach(metrics)
    settle(2)
    metrics.tick()

    assert exported(reader)[i.RUN.name][0]["count"] == 2


def test_an_adapter_that_fails_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker goes on, and counts for who else reads."""

    def attach(metrics: Metrics) -> bool:
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(module, "attach", attach)
    started: list[str] = []
    monkeypatch.setattr(bootstep, "start_deaf", lambda run, name: started.append(name))
    worker = bootstep.WorkerMetrics(
        Celery("shop", broker="memory://", set_as_current=False),
        SimpleNamespace(pool=None),
        address=("127.0.0.1", 0),
        tasks=["ship"],
        questions=bootstep.Questions(None, (), None, lambda pid: None),
    )

    worker.ready()

    assert started == ["probe-queues", "metrics"]
    assert "OpenTelemetry is not told the metrics" in caplog.text
