"""The one list of metrics, and what is made from it."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import promql_parser
import pytest
import yaml

import celery_resilience
from celery_resilience import command
from celery_resilience.telemetry import dashboards
from celery_resilience.telemetry.instruments import (
    ALL,
    COUNTED_EVENTS,
    Instrument,
    Kind,
)

PACKAGE = Path(celery_resilience.__path__[0])
ROOT = Path(__file__).parents[3]

#: What Prometheus adds to names by itself.
ENDINGS = ("_total", "_bucket", "_count", "_sum")


@pytest.mark.parametrize("instrument", ALL, ids=lambda it: it.name)
def test_a_metric_is_named_as_both_worlds_ask(instrument: Instrument) -> None:
    """Without its unit for OpenTelemetry, with it for Prometheus; none is a total twice."""
    assert re.fullmatch(r"celery_resilience(\.[a-z]+(_[a-z]+)*)+", instrument.name)
    assert instrument.unit in ("s", "By", "1") or instrument.unit[0] == "{"
    assert instrument.family.endswith("_seconds") == (instrument.unit == "s")
    assert instrument.family.endswith("_bytes") == (instrument.unit == "By")
    assert not instrument.family.endswith(ENDINGS)
    assert instrument.help.endswith(".")
    assert bool(instrument.bounds) == (instrument.kind is Kind.HISTOGRAM)
    assert sorted(instrument.bounds) == list(instrument.bounds)


def test_no_name_is_twice() -> None:
    """In neither world."""
    assert len({it.name for it in ALL}) == len({it.family for it in ALL}) == len(ALL)


def test_no_label_tells_one_run_or_process_from_another() -> None:
    """Each would be a series for ever."""
    labels = {label for it in ALL for label in it.labels}

    assert not labels & {"id", "task_id", "pid", "args", "kwargs", "worker", "host"}


def test_what_is_counted_as_an_event_is_one() -> None:
    """An event that was renamed is not counted in silence."""
    told = {
        argument.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for argument in node.args[:1]
        if isinstance(argument, ast.Constant)
    }

    assert set(COUNTED_EVENTS) <= told


def test_whoever_counts_an_outcome_tells_it() -> None:
    """What the worker's last line counts, the metrics do too."""
    counting = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(r"counts\[Outcome|deliveries\.closed\(", path.read_text())
    }

    assert counting == {"settling.py", "consumer.py"}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if re.search(r"counts\[Outcome|deliveries\.closed\(", text):
            assert "emit(ENDED, ended=" in text, path


# --- what is made from it ------------------------------------------------------------


def series_of(expression: str) -> set[str]:
    """The names of series in an expression of Prometheus."""
    found = re.findall(r"\bcelery_resilience_\w+", expression)
    return set(found)


def test_each_expression_is_one_and_asks_for_what_there_is() -> None:
    """Of the dashboard and of the alerts; by the parser of their language."""
    known = {name: instrument for instrument in ALL for name in instrument.series}
    for expression in dashboards.expressions():
        promql_parser.parse(expression.replace("$__rate_interval", "5m"))
        assert series_of(expression)
        for name in series_of(expression):
            assert name in known, expression
        labels = {
            label
            for name in series_of(expression)
            for label in (*known[name].labels, "le")
        }
        asked = re.findall(r"(\w+)=~?\"", expression)
        asked += [
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", expression)
            for label in group.split(",")
        ]
        assert set(asked) <= labels, expression


@pytest.mark.parametrize("kind", list(dashboards.FILES))
def test_the_shipped_file_is_what_is_made(kind: str) -> None:
    """After a change: `celery -A shop resilience dashboards KIND` into it."""
    file = PACKAGE / "telemetry" / dashboards.FILES[kind]

    assert file.read_text() == dashboards.PRINTED[kind]()


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """Ids and places are different, and each panel has its lines."""
    found = json.loads(dashboards.grafana())

    panels = found["panels"]
    places = [(it["gridPos"]["x"], it["gridPos"]["y"]) for it in panels]
    assert len({it["id"] for it in panels}) == len(panels) == len(set(places))
    for panel in panels:
        if panel["type"] != "row":
            assert all(target["expr"] for target in panel["targets"])


def test_the_rules_are_ones_that_prometheus_loads() -> None:
    """Each has a name of its own, a duration, a severity and two sentences."""
    (group,) = yaml.safe_load(dashboards.alerts())["groups"]

    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) == len(dashboards.ALERTS)
    for rule in group["rules"]:
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_what_an_alert_says_can_be_typed() -> None:
    """Each command of ours in it is one, with options that it has."""
    groups = {"failed": command.failed, "resilience": command.resilience}
    typed = [
        text.removeprefix("celery -A YOUR_APP ")
        for alert in dashboards.ALERTS
        for text in re.split(r"[;,] ", alert.what_to_do)
        if text.startswith("celery ")
    ]

    assert len(typed) >= 10
    for text in typed:
        room, verb, *words = shlex.split(text)
        if room == "inspect":
            assert verb in ("active", "resilience_memory")
        else:
            groups[room].commands[verb].make_context(verb, words)


def test_every_metric_is_told_of() -> None:
    """In the reference, by its name in both worlds."""
    page = (ROOT / "docs/reference/metrics.md").read_text()

    assert "{metrics}" in page
