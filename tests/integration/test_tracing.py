"""Sentry and OpenTelemetry hear of each failure once, with its task, from real workers."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually
from telemetry_sink import Sink, telemetry_sink

SPAN = "b" * 16

#: Nothing listens there.
AWAY = "127.0.0.1:9"

#: What ends in an error that a process lived to tell of, and what does not.
RAISED = ("boom", "retries_spent", "system_exit")
DIED = ("killed_early", "hard_limit")


@pytest.fixture
def sink() -> Iterator[Sink]:
    """A sink of a test's own."""
    with telemetry_sink() as sink:
        yield sink


def traced_fleet(make_fleet: FleetMaker, sink: Sink, **conf: Any) -> Fleet:
    """A fleet with both libraries, set up as the how-to pages say."""
    conf.setdefault("fleet_sentry", {"dsn": sink.dsn})
    # A busy machine takes its time to start a child, which Celery tells as an error.
    conf.setdefault("worker_proc_alive_timeout", 60)
    return make_fleet(
        "redis", fleet_spans=sink.endpoint, fleet_links_sentry=True, **conf
    )


class Sent:
    """Tasks that were sent in a trace of their own each, by their names."""

    def __init__(self, fleet: Fleet, *names: str) -> None:
        self._fleet = fleet
        self.ids: dict[str, str] = {}
        self.traces: dict[str, str] = {}
        for name in names:
            self.send(name)

    def send(self, name: str, *args: Any) -> str:
        """Send one; returns its id."""
        trace = f"{len(self.ids) + 1:032x}"
        headers = {"traceparent": f"00-{trace}-{SPAN}-01"}
        self.ids[name] = self._fleet.send(name, *args, headers=headers).id
        self.traces[name] = trace
        return self.ids[name]


def test_each_failure_is_told_once_by_all(
    make_fleet: FleetMaker, sink: Sink, tmp_path: Path
) -> None:
    """One event, one ERROR span, one record; the same ids, fingerprint and trace."""
    fleet = traced_fleet(make_fleet, sink)
    worker = fleet.worker()
    sent = Sent(fleet, *RAISED, "rejected", "expected", "ignored", "skipped")
    path = tmp_path / "there"
    sent.send("boom_unless", str(path))
    # A child that is killed takes with it what it has not yet sent.
    eventually(lambda: all(sink.runs(task_id) for task_id in sent.ids.values()))
    eventually(lambda: len(sink.runs(sent.ids["retries_spent"])) == 2)
    for name in DIED:
        sent.send(name)
    sent.send("killed_once", str(tmp_path / "killed"))
    records = {
        name: fleet.record_of(sent.ids[name])
        for name in (*RAISED, *DIED, "rejected", "expected", "boom_unless")
    }
    path.touch()
    fleet.failed.replay(ids=[records["boom_unless"]["id"]])
    eventually(lambda: fleet.notes("effect"))
    eventually(lambda: len(sink.runs(sent.ids["killed_once"])) == 2)
    assert worker.stop() == 0

    for name in (*RAISED, *DIED, "rejected", "boom_unless"):
        record, trace = records[name], sent.traces[name]
        (event,) = sink.events(sent.ids[name])
        assert event["event_id"] == record["sentry_event_id"], name
        assert event["fingerprint"] == [record["fingerprint"]], name
        assert event["transaction"] == name
        assert event["tags"]["resilience.reason"] == record["reason"]
        assert event["contexts"]["trace"]["trace_id"] == trace == record["trace_id"]
        told = event["contexts"]["celery_resilience"]
        assert told["replay"] == f"celery -A fleet failed replay {record['id']}"
        assert f"group {record['fingerprint']})" in worker.text
        errors = [span for span in sink.runs(sent.ids[name]) if span.is_error]
        if name == "rejected":
            continue  # its span has ended as the instrumentor ends it
        (span,) = errors
        assert span.trace_id == trace
        assert span.attributes["celery_resilience.fingerprint"] == record["fingerprint"]
        assert span.attributes["celery_resilience.reason"] == record["reason"]
        assert span.attributes["error.type"] == record["exception"]
    # Nothing else is an event, and nothing is told in Sentry's own traces.
    others = [e for e in sink.events() if "resilience.reason" not in e["tags"]]
    assert [(e.get("logger"), e.get("logentry")) for e in others] == []
    assert len(sink.events()) == len(RAISED) + len(DIED) + 2
    assert not [kind for kind, _ in sink.items if kind == "transaction"]
    assert records["expected"]["sentry_event_id"] is None
    for name in ("expected", "killed_once", "ignored", "skipped"):
        spans = sink.runs(sent.ids[name])
        assert spans, name
        assert not [span for span in spans if span.is_error], name
    (killed,) = [s for s in sink.events() if "resilience.signal" in s["tags"]]
    assert killed["tags"]["resilience.signal"] == "SIGKILL"
    for name in DIED:
        (span,) = [s for s in sink.runs(sent.ids[name]) if s.is_error]
        assert span.parent_id == SPAN
        runtime_s = records[name]["attempts"][0]["runtime_s"]
        assert span.duration_s == pytest.approx(runtime_s, abs=0.5)
    (replay,) = [s for s in sink.runs(sent.ids["boom_unless"]) if not s.is_error]
    assert replay.links == [sent.traces["boom_unless"]]
    assert replay.trace_id != sent.traces["boom_unless"]
    assert replay.parent_id == ""


def test_secrets_are_in_no_event_and_no_span(
    make_fleet: FleetMaker, sink: Sink
) -> None:
    """By usual names, configured ones, and within an argument; arguments sent or not."""
    fleet = traced_fleet(
        make_fleet,
        sink,
        fleet_sentry={"dsn": sink.dsn, "send_default_pii": True},
        task_acks_late=False,
    )
    worker = fleet.worker(concurrency=1)
    secrets = ("hunter2-secret", "4929-1234-5678", "pin-of-a-customer")
    ids = {}
    for how in ("raise", "retry", "die"):
        arguments = (how, secrets[0], {"card_number": secrets[1]}, secrets[2])
        task_id = ids[how] = fleet.send("telltale", *arguments).id
        fleet.record_of(task_id)
        eventually(lambda i=task_id: [s for s in sink.runs(i) if s.is_error])
    assert worker.stop() == 0

    logged = [e for e in sink.events() if e.get("logger") == "shop"]
    assert len(sink.events()) - len(logged) == 3
    assert logged
    assert len([s for s in sink.spans if s.is_error]) == 3
    assert "'card_number': '***'" in str(sink.events(ids["raise"]))
    assert [s for s in sink.spans if "celery.retry.reason" in s.attributes]
    for secret in secrets:
        assert not [text for text in sink.raw if secret in text], secret


def test_children_send_their_spans_before_they_end(
    make_fleet: FleetMaker, sink: Sink
) -> None:
    """Twenty tasks with a child each: twenty spans."""
    fleet = make_fleet("redis", fleet_spans=sink.endpoint, worker_proc_alive_timeout=60)
    worker = fleet.worker("--max-tasks-per-child", "1")
    ids = [fleet.send("ok").id for _ in range(20)]
    eventually(lambda: len(fleet.notes("ok")) == 20, within_s=90)
    assert worker.stop() == 0

    assert [len(sink.runs(task_id)) for task_id in ids] == [1] * 20


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_each_pool_tells_its_failures(
    make_fleet: FleetMaker, sink: Sink, pool: str
) -> None:
    """Once, with the same fingerprint; what is done is sent before the worker ends."""
    fleet = traced_fleet(make_fleet, sink)
    worker = fleet.worker(pool=pool)
    sent = Sent(fleet, "boom", "ok")
    record = fleet.record_of(sent.ids["boom"])
    eventually(lambda: fleet.notes("ok"))
    assert worker.stop() == 0

    (event,) = sink.events()
    assert event["event_id"] == record["sentry_event_id"]
    assert event["fingerprint"] == [record["fingerprint"]]
    (span,) = sink.runs(sent.ids["boom"])
    assert span.is_error
    assert span.attributes["celery_resilience.fingerprint"] == record["fingerprint"]
    assert span.trace_id == record["trace_id"] == sent.traces["boom"]
    (done,) = sink.runs(sent.ids["ok"])
    assert not done.is_error


def test_tasks_do_not_notice_that_nobody_listens(
    make_fleet: FleetMaker, sink: Sink
) -> None:
    """They run and fail as ever, and the worker ends in time."""
    fleet = make_fleet(
        "redis",
        fleet_sentry={"dsn": f"http://key@{AWAY}/1"},
        fleet_spans=f"http://{AWAY}/v1/traces",
    )
    worker = fleet.worker(concurrency=1)
    ids = [fleet.send(name).id for name in ("boom", "killed_early", "ok")]
    assert [fleet.record_of(i)["reason"] for i in ids[:2]] == [
        "exception",
        "worker_lost",
    ]
    eventually(lambda: fleet.notes("ok"))
    started_at = time.monotonic()

    assert worker.stop() == 0
    assert time.monotonic() - started_at < 15
    assert worker.outcomes() == {"received": 3, "succeeded": 1, "failed": 2}
    lost = re.findall(r"is lost: (.*)", worker.text)
    assert re.search(r"[1-9]\d* spans", " ".join(lost)), worker.text
    assert re.search(r"[1-9]\d* events", " ".join(lost)), worker.text
