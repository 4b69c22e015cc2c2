"""The dashboard and the alerts that come with the metrics, made from their list.

`celery -A shop resilience dashboards grafana | alerts` prints them; the same files are
beside this one, for whoever would rather mount them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.instruments import Instrument

#: Outcomes after which a task's delivery does not come again, but for revoked ones.
LAST = 'outcome=~"succeeded|skipped|failed"'

#: Other series that are selected.
SUCCEEDED = 'outcome="succeeded"'
FAILED, RETRIED = 'outcome="failed"', 'outcome="retried"'
NEW, OPEN = 'operation="kept"', 'state="open"'

WIDTH, HEIGHT = 24, 8


def total(instrument: Instrument) -> str:
    """Prometheus's name of a counter or a gauge."""
    (name,) = instrument.series
    return name


def buckets(instrument: Instrument) -> str:
    """Prometheus's name of a histogram's buckets."""
    return instrument.series[0]


def rate(instrument: Instrument, by: str, matching: str = "") -> str:
    """What a counter gains in a second, by some labels."""
    return f"sum by ({by}) (rate({total(instrument)}{_selected(matching)}[$__rate_interval]))"


def ratio(instrument: Instrument, by: str, some: str, all: str) -> str:
    """What share of what a counter gains is of some kind."""
    return f"{rate(instrument, by, some)} / {rate(instrument, by, all)}"


def grew(instrument: Instrument, by: str, over: str, matching: str = "") -> str:
    """What a counter has gained, by some labels."""
    return f"sum by ({by}) (increase({total(instrument)}{_selected(matching)}[{over}]))"


def most(instrument: Instrument, by: str, matching: str = "", offset: str = "") -> str:
    """What the workers say most of a thing that they share, such as a queue."""
    past = f" offset {offset}" if offset else ""
    return f"max by ({by}) ({total(instrument)}{_selected(matching)}{past})"


def quantile(q: str, instrument: Instrument, by: str, over: str) -> str:
    """A quantile of a histogram, by one label."""
    return (
        f"histogram_quantile({q}, "
        f"sum by ({by}, le) (rate({buckets(instrument)}[{over}])))"
    )


def _selected(matching: str) -> str:
    return "{" + matching + "}" if matching else ""


# --- the dashboard ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Panel:
    """
    One picture.

    Attributes:
        lines: Expressions, each with its legend.
        unit: Grafana's.
        kind: "timeseries" or "stat".
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"


IN_PICTURE = "$__rate_interval"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Health",
        (
            Panel(
                "Outcomes per second",
                ((rate(i.OUTCOMES, "outcome"), "{{outcome}}"),),
                "ops",
            ),
            Panel(
                "Share that fails",
                (
                    (
                        ratio(i.OUTCOMES, "task", FAILED, LAST),
                        "{{task}}",
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "Busy, of all slots",
                (
                    (f"sum({total(i.BUSY)})", "busy"),
                    (f"sum({total(i.SLOTS)})", "slots"),
                ),
            ),
        ),
    ),
    (
        "Failed tasks",
        (
            Panel(
                "Unresolved",
                ((most(i.UNRESOLVED, "failed_queue"), "{{failed_queue}}"),),
                kind="stat",
            ),
            Panel(
                "Age of the oldest",
                ((f"max({total(i.UNRESOLVED_AGE)})", "oldest"),),
                "s",
                "stat",
            ),
            Panel(
                "Kept and replayed per second",
                ((rate(i.KEPT, "operation"), "{{operation}}"),),
                "ops",
            ),
            Panel(
                "Why they failed",
                (
                    (
                        rate(i.FAILURES, "task, reason, error_type"),
                        "{{task}} {{reason}} {{error_type}}",
                    ),
                ),
                "ops",
            ),
            Panel(
                "Waiting to be collected",
                ((most(i.UNCOLLECTED, "failed_queue"), "{{failed_queue}}"),),
            ),
            Panel(
                "Retries per task that ended",
                (
                    (
                        ratio(i.OUTCOMES, "task", RETRIED, LAST),
                        "{{task}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "How long it takes",
        (
            Panel(
                "Wait until the start, p95",
                ((quantile("0.95", i.WAIT, "queue", IN_PICTURE), "{{queue}}"),),
                "s",
            ),
            Panel(
                "Messages that wait",
                ((most(i.QUEUED, "queue"), "{{queue}}"),),
            ),
            Panel(
                "Run, p50 and p95",
                (
                    (quantile("0.5", i.RUN, "task", IN_PICTURE), "{{task}} p50"),
                    (quantile("0.95", i.RUN, "task", IN_PICTURE), "{{task}} p95"),
                ),
                "s",
            ),
            Panel(
                "Attempts, p95",
                ((quantile("0.95", i.ATTEMPTS, "task", IN_PICTURE), "{{task}}"),),
            ),
            Panel(
                "Oldest run",
                ((most(i.OLDEST_ACTIVE, "task"), "{{task}}"),),
                "s",
            ),
            Panel(
                "Since the last success",
                ((f"time() - {most(i.LAST_SUCCESS, 'task')}", "{{task}}"),),
                "s",
            ),
        ),
    ),
    (
        "Workers",
        (
            Panel(
                "Children that ended",
                (
                    (
                        rate(i.CHILD_EXITS, "reason, signal"),
                        "{{reason}} {{signal}}",
                    ),
                ),
                "ops",
            ),
            Panel(
                "Largest child",
                ((f"max({total(i.CHILD_MEMORY)})", "largest"),),
                "bytes",
            ),
            Panel(
                "Workers, and those that drain",
                (
                    (f"count({total(i.SLOTS)})", "workers"),
                    (f"sum({total(i.DRAINING)})", "drain"),
                ),
            ),
            Panel(
                "Open circuits",
                ((most(i.CIRCUIT, "circuit", OPEN), "{{circuit}}"),),
            ),
            Panel(
                "Events of the rooms",
                ((rate(i.EVENTS, "event"), "{{event}}"),),
                "ops",
            ),
            Panel(
                "Answered questions",
                ((f"min by (probe) ({total(i.PROBES)})", "{{probe}}"),),
            ),
        ),
    ),
)


def grafana() -> str:
    """The dashboard as JSON, for Grafana to import."""
    return json.dumps(dashboard(), indent=1) + "\n"


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    return {
        "uid": "celery-resilience",
        "title": "celery-resilience",
        "tags": ["celery"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                }
            ]
        },
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    number = top = 0
    for title, panels in ROWS:
        number += 1
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "gridPos": place}
        top += 1
        width = WIDTH // 3
        for at, panel in enumerate(panels):
            number += 1
            place = {
                "x": at % 3 * width,
                "y": top + at // 3 * HEIGHT,
                "w": width,
                "h": HEIGHT,
            }
            yield _drawn(panel, number, place)
        top += (len(panels) + 2) // 3 * HEIGHT


def _drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "gridPos": place,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "expr": expression, "legendFormat": legend}
            for at, (expression, legend) in enumerate(panel.lines)
        ],
    }


# --- the alerts ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alert:
    """
    One rule.

    Attributes:
        lasts: For how long it must be so.
        severity: "page" wakes somebody, "ticket" waits for the morning.
        summary: What is wrong, with the labels.
        what_to_do: Where to look first.
    """

    name: str
    expression: str
    lasts: str
    severity: str
    summary: str
    what_to_do: str


ALERTS = (
    Alert(
        "FailedTasksNew",
        f"{grew(i.KEPT, 'task', '10m', NEW)} > 0",
        "0m",
        "ticket",
        "{{ $labels.task }} has failed for good, and is kept",
        "celery -A YOUR_APP failed list --task '{{ $labels.task }}' --since 1h",
    ),
    Alert(
        "FailedTasksGrow",
        f"{most(i.UNRESOLVED, 'failed_queue')} - "
        f"{most(i.UNRESOLVED, 'failed_queue', offset='1h')} > 100",
        "10m",
        "page",
        "{{ $labels.failed_queue }} has gained {{ $value }} failed tasks in an hour",
        "celery -A YOUR_APP failed stats",
    ),
    Alert(
        "FailedTasksOld",
        f"max({total(i.UNRESOLVED_AGE)}) > 86400",
        "0m",
        "ticket",
        "a failed task has waited for a day to be replayed or discarded",
        "celery -A YOUR_APP failed stats",
    ),
    Alert(
        "FailedTasksNotCollected",
        f"{most(i.UNCOLLECTED, 'failed_queue')} > 0",
        "1h",
        "ticket",
        "failed tasks wait in {{ $labels.failed_queue }}, and nobody collects them",
        "celery -A YOUR_APP failed collect, or --collect-failed for one worker",
    ),
    Alert(
        "TaskErrorRatio",
        f"{grew(i.OUTCOMES, 'task', '15m', FAILED)} / "
        f"{grew(i.OUTCOMES, 'task', '15m', LAST)} > 0.05 and "
        f"{grew(i.OUTCOMES, 'task', '15m', LAST)} >= 20",
        "5m",
        "page",
        "{{ $value | humanizePercentage }} of {{ $labels.task }} fail",
        "celery -A YOUR_APP failed list --task '{{ $labels.task }}' --since 1h",
    ),
    Alert(
        "TaskAlwaysFails",
        f"{grew(i.OUTCOMES, 'task', '1h', FAILED)} > 0 unless "
        f"{grew(i.OUTCOMES, 'task', '1h', SUCCEEDED)} > 0",
        "15m",
        "ticket",
        "{{ $labels.task }} has failed, and not succeeded once in an hour",
        "celery -A YOUR_APP failed list --task '{{ $labels.task }}'",
    ),
    Alert(
        "RetryStorm",
        f"{grew(i.OUTCOMES, 'task', '10m', RETRIED)} > 50 and "
        f"{grew(i.OUTCOMES, 'task', '10m', RETRIED)} > "
        f"2 * {grew(i.OUTCOMES, 'task', '10m', LAST)}",
        "10m",
        "page",
        "{{ $labels.task }} is retried more than twice for each time that it ends",
        "what it depends on is away: give it a circuit",
    ),
    Alert(
        "QueueStalled",
        f"{most(i.QUEUED, 'queue')} > 0 unless {grew(i.OUTCOMES, 'queue', '10m')} > 0",
        "10m",
        "page",
        "{{ $value }} messages wait in {{ $labels.queue }}, and none is dealt with",
        "celery -A YOUR_APP inspect active; the workers' /live",
    ),
    Alert(
        "QueueWaitLong",
        f"{quantile('0.95', i.WAIT, 'queue', '10m')} > 300",
        "10m",
        "ticket",
        "tasks of {{ $labels.queue }} wait for {{ $value | humanizeDuration }}",
        "more workers, or a queue of their own for the slow ones",
    ),
    Alert(
        "TaskStuck",
        f"{most(i.OLDEST_ACTIVE, 'task')} > 3600",
        "5m",
        "ticket",
        "a run of {{ $labels.task }} has gone on for {{ $value | humanizeDuration }}",
        "celery -A YOUR_APP inspect active; a time limit",
    ),
    Alert(
        "ChildrenLost",
        f"sum(increase({total(i.CHILD_EXITS)}"
        '{reason=~"signal|memory|exit"}[15m])) > 3',
        "0m",
        "page",
        "{{ $value | humanize }} children were killed within a quarter of an hour",
        "celery -A YOUR_APP failed list --reason worker_lost; "
        "celery -A YOUR_APP inspect resilience_memory",
    ),
    Alert(
        "WorkersLost",
        f"count({total(i.SLOTS)}) < count({total(i.SLOTS)} offset 30m)",
        "10m",
        "ticket",
        "there are fewer workers than half an hour ago",
        "the supervisor, and the exit codes of the workers",
    ),
    Alert(
        "NoWorkers",
        f"absent({total(i.SLOTS)})",
        "5m",
        "page",
        "no worker tells anything",
        "the workers; Prometheus's targets",
    ),
    Alert(
        "ProbeFailed",
        f"min by (probe) ({total(i.PROBES)}) == 0",
        "10m",
        "ticket",
        "a worker has no answer from {{ $labels.probe }}: nobody knows, which is not 0",
        "the worker's log says why",
    ),
    Alert(
        "CircuitOpen",
        f"{most(i.CIRCUIT, 'circuit', OPEN)} == 1",
        "10m",
        "page",
        "circuit {{ $labels.circuit }} has been open for ten minutes",
        "celery -A YOUR_APP resilience circuits",
    ),
    Alert(
        "TelemetryDropped",
        f"sum by (signal) (increase({total(i.DROPPED)}[10m])) > 0",
        "10m",
        "ticket",
        "{{ $labels.signal }} are dropped, so that other numbers may be too low",
        "the worker's log says why",
    ),
)


def alerts() -> str:
    """The rules as YAML, for Prometheus to load."""
    return "\n".join(_rules()) + "\n"


def _rules() -> Iterator[str]:
    yield "# Made by `celery -A YOUR_APP resilience dashboards alerts`."
    yield "groups:"
    yield "  - name: celery-resilience"
    yield "    rules:"
    for alert in ALERTS:
        yield f"      - alert: Celery{alert.name}"
        yield f"        expr: {json.dumps(alert.expression)}"
        yield f"        for: {alert.lasts}"
        yield "        labels:"
        yield f"          severity: {alert.severity}"
        yield "        annotations:"
        yield f"          summary: {json.dumps(alert.summary)}"
        yield f"          description: {json.dumps(alert.what_to_do)}"


def expressions() -> Iterator[str]:
    """Each expression of the dashboard and of the alerts."""
    for _, panels in ROWS:
        for panel in panels:
            yield from (expression for expression, _ in panel.lines)
    for alert in ALERTS:
        yield alert.expression


#: What is printed by each name, and the file that holds the same.
PRINTED = {"grafana": grafana, "alerts": alerts}
FILES = {"grafana": "grafana.json", "alerts": "alerts.yml"}
