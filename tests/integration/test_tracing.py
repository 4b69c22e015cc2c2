"""Sentry and OpenTelemetry hear of each failure once, with its task, from real workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import FleetMaker
from telemetry_sink import Sink, telemetry_sink


@pytest.fixture
def sink() -> Iterator[Sink]:
    """A sink of a test's own."""
    with telemetry_sink() as sink:
        yield sink


def test_try(make_fleet: FleetMaker, sink: Sink) -> None:
    """Look."""
    fleet = make_fleet(
        "redis",
        fleet_sentry={"dsn": sink.dsn, "traces_sample_rate": 1.0},
        fleet_spans=sink.endpoint,
        fleet_links_sentry=True,
    )
    worker = fleet.worker(concurrency=1)
    ids = {
        name: fleet.send(name, *args).id
        for name, args in [
            ("ok", ()),
            ("boom", ("boom", "hunter2")),
            ("killed_early", ()),
            ("hard_limit", ()),
            ("retries_spent", ()),
            ("rejected", ()),
            ("system_exit", ()),
            ("ok", ()),
        ]
    }
    for n, i in ids.items():
        if n != "ok":
            fleet.record_of(i)
    worker.stop()
    print(worker.text[-6000:])
    for kind, item in sink.items:
        print(
            "ITEM",
            kind,
            item.get("logger"),
            item.get("transaction"),
            item.get("tags"),
            item.get("fingerprint"),
            item.get("contexts", {}).get("trace"),
            item.get("contexts", {}).get("celery_resilience"),
            item.get("logentry"),
        )
    for s in sink.spans:
        print("SPAN", s)
    print("hunter2" in str(sink.raw))
    for n, i in ids.items():
        r = fleet.records().get(i)
        if r:
            print(n, r["reason"], r["trace_id"], r["sentry_event_id"], r["fingerprint"])
    assert 0
