"""The alerts fire when they should and at no other time, as Prometheus's promtool sees it.

The rules are those that the command prints. A case is a story of some series, one value
a minute, and whether an alert fires at a moment of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import provide

from celery_resilience.telemetry.dashboards import ALERTS

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def promtool() -> str:
    """The path of promtool."""
    return provide("promtool")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the command's output is put into."""
    printed = subprocess.run(
        [sys.executable, "-m", "celery", "resilience", "dashboards", "alerts"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    file = tmp_path_factory.mktemp("alerts") / "rules.yml"
    file.write_bytes(printed.stdout)
    return file


def run(promtool: str, *words: str | Path) -> tuple[int, str]:
    """The exit code of promtool, and what it says."""
    done = subprocess.run(
        [promtool, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


# --- what Prometheus loads --------------------------------------------------------------


def test_prometheus_loads_the_rules(promtool: str, rules: Path) -> None:
    """Each of them, and none is there twice."""
    code, said = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", rules)

    assert code == 0, said
    assert f"SUCCESS: {len(ALERTS)} rules found" in said


@pytest.mark.parametrize(
    ("good", "bad"), [("sum by (task)", "sum by (task"), ("$labels", "$label")]
)
def test_a_rule_that_is_none_would_be_seen(
    promtool: str, rules: Path, tmp_path: Path, good: str, bad: str
) -> None:
    """Its expression and the text of its annotations are parsed."""
    broken = tmp_path / "rules.yml"
    broken.write_text(rules.read_text().replace(good, bad, 1))

    code, said = run(promtool, "check", "rules", broken)

    assert code != 0, said


def test_the_examples_prometheus_loads_its_configuration(
    promtool: str, tmp_path: Path
) -> None:
    """With the files that the compose file mounts, the rules among them."""
    for mount in COMPOSE["services"]["prometheus"]["volumes"]:
        source, target, _ = mount.split(":")
        assert Path(target).parent == Path("/etc/prometheus")
        text = (ROOT / source).read_text()
        (tmp_path / Path(target).name).write_text(
            text.replace("/etc/prometheus", str(tmp_path))
        )

    code, said = run(promtool, "check", "config", tmp_path / "prometheus.yml")

    assert code == 0, said
    assert "1 rule files found" in said
    assert f"SUCCESS: {len(ALERTS)} rules found" in said


# --- when they fire ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """
    Whether one alert fires at a moment.

    Attributes:
        alert: Its name, without Celery.
        story: What is special about the series.
        series: Their values at each minute, in promtool's notation, by their names
            without the library's.
        at_min: The moment, in minutes from the first values.
        summary: What the alert says; "" where it does not fire.
        labels: What it is labelled with, besides its severity.
    """

    alert: str
    story: str
    series: Mapping[str, str]
    at_min: int
    summary: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Its name among the tests."""
        return f"{self.alert}, {self.story}"

    def as_tests(self, rules: Path) -> dict[str, Any]:
        """A file of tests for promtool."""
        test = {
            "interval": "1m",
            "input_series": [
                {"series": f"celery_resilience_{series}", "values": values}
                for series, values in self.series.items()
            ],
            "alert_rule_test": [
                {
                    "alertname": f"Celery{self.alert}",
                    "eval_time": f"{self.at_min}m",
                    "exp_alerts": self._expected(),
                }
            ],
        }
        return {
            "rule_files": [str(rules)],
            "evaluation_interval": "1m",
            "tests": [test],
        }

    def _expected(self) -> list[dict[str, Any]]:
        if not self.summary:
            return []
        (alert,) = (alert for alert in ALERTS if alert.name == self.alert)
        what_to_do = re.sub(
            r"\{\{ \$labels\.(\w+) \}\}",
            lambda found: self.labels[found[1]],
            alert.what_to_do,
        )
        return [
            {
                "exp_labels": {**self.labels, "severity": alert.severity},
                "exp_annotations": {
                    "summary": self.summary,
                    "description": what_to_do,
                },
            }
        ]


OUTCOMES = "task_outcomes_total"
PAID = f'{OUTCOMES}{{task="pay",queue="shop",outcome="succeeded"}}'
SKIPPED = f'{OUTCOMES}{{task="pay",queue="shop",outcome="skipped"}}'
FAILED_2 = f'{OUTCOMES}{{task="pay",queue="old",outcome="failed"}}'
FAILED = f'{OUTCOMES}{{task="pay",queue="shop",outcome="failed"}}'
RETRIED = f'{OUTCOMES}{{task="pay",queue="shop",outcome="retried"}}'
MAILED = f'{OUTCOMES}{{task="mail",queue="mails",outcome="succeeded"}}'
KEPT = 'failed_tasks_operations_total{operation="kept",task="pay"}'
REPLAYED = 'failed_tasks_operations_total{operation="replay_succeeded",task="pay"}'
UNRESOLVED = 'failed_tasks_unresolved{failed_queue="shop.failed",instance="1"}'
UNRESOLVED_2 = 'failed_tasks_unresolved{failed_queue="shop.failed",instance="2"}'
AGE = 'failed_tasks_oldest_age_seconds{instance="1"}'
AGE_2 = 'failed_tasks_oldest_age_seconds{instance="2"}'
UNCOLLECTED = 'failed_tasks_messages{failed_queue="shop.failed",instance="1"}'
UNCOLLECTED_2 = 'failed_tasks_messages{failed_queue="shop.failed",instance="2"}'
QUEUED = 'queue_messages{queue="shop",instance="1"}'
QUEUED_2 = 'queue_messages{queue="shop",instance="2"}'
WAITED_300 = 'task_wait_duration_seconds_bucket{task="pay",queue="shop",le="300"}'
WAITED_1800 = 'task_wait_duration_seconds_bucket{task="pay",queue="shop",le="1800"}'
WAITED = 'task_wait_duration_seconds_bucket{task="pay",queue="shop",le="+Inf"}'
OLDEST = 'task_oldest_active_age_seconds{task="pay",instance="1"}'
OLDEST_2 = 'task_oldest_active_age_seconds{task="pay",instance="2"}'
SIGNALLED = 'worker_child_exits_total{reason="signal",signal="SIGKILL"}'
FILLED = 'worker_child_exits_total{reason="memory",signal="SIGKILL"}'
EXITED = 'worker_child_exits_total{reason="exit",signal=""}'
RECYCLED = 'worker_child_exits_total{reason="recycled",signal=""}'
LIMITED = 'worker_child_exits_total{reason="time_limit",signal="SIGKILL"}'
STOPPED = 'worker_child_exits_total{reason="stopped",signal=""}'
SLOTS, SLOTS_2 = 'worker_slots{instance="1"}', 'worker_slots{instance="2"}'
PROBE = 'probe_success{probe="store",instance="1"}'
PROBE_2 = 'probe_success{probe="store",instance="2"}'
OPEN = 'circuit_state{circuit="bank",state="open",instance="1"}'
OPEN_2 = 'circuit_state{circuit="bank",state="open",instance="2"}'
HALF_OPEN = 'circuit_state{circuit="bank",state="half-open",instance="1"}'
DROPPED = 'telemetry_dropped_total{signal="spans"}'

PAY, SHOP = {"task": "pay"}, {"queue": "shop"}
FAILED_QUEUE, BANK = {"failed_queue": "shop.failed"}, {"circuit": "bank"}

NEW = "pay has failed for good, and is kept"
MORE = "shop.failed has gained 150 failed tasks in an hour"
OLD = "a failed task has waited for a day to be replayed or discarded"
ALONE = "failed tasks wait in shop.failed, and nobody collects them"
RATIO, ALL = "10% of pay fail", "100% of pay fail"
ALWAYS = "pay has failed, and not succeeded once in an hour"
STORM = "pay is retried more than twice for each time that it ends"
STALLED = "5 messages wait in shop, and none is dealt with"
LONG = "tasks of shop wait for 8m 7s"
STUCK = "a run of pay has gone on for 1h 6m 0s"
CHILDREN = "45 children were killed within a quarter of an hour"
FOUR = "4 children were killed within a quarter of an hour"
FEWER = "there are fewer workers than half an hour ago"
NONE = "no worker tells anything"
SILENT = "a worker has no answer from store: nobody knows, which is not 0"
CIRCUIT = "circuit bank has been open for ten minutes"
LOST = "spans are dropped, so that other numbers may be too low"

CASES = (
    Case("FailedTasksNew", "a first one", {KEPT: "0x5 1x20"}, 6, NEW, PAY),
    Case("FailedTasksNew", "one more", {KEPT: "7x5 8x20"}, 10, NEW, PAY),
    Case("FailedTasksNew", "no more", {KEPT: "7x30"}, 20),
    Case("FailedTasksNew", "none lately", {KEPT: "0x5 1x30"}, 25),
    Case("FailedTasksNew", "replays", {KEPT: "7x30", REPLAYED: "0+1x30"}, 20),
    Case("FailedTasksNew", "a new worker", {KEPT: "7x5 0x20"}, 10),
    Case(
        "FailedTasksGrow",
        "as two workers see it",
        {UNRESOLVED: "10x60 160x40", UNRESOLVED_2: "5x60 150x40"},
        71,
        MORE,
        FAILED_QUEUE,
    ),
    Case("FailedTasksGrow", "just now", {UNRESOLVED: "0x60 150x40"}, 70),
    Case("FailedTasksGrow", "by a hundred", {UNRESOLVED: "0x60 100x40"}, 75),
    Case("FailedTasksGrow", "many for long", {UNRESOLVED: "150x100"}, 75),
    Case(
        "FailedTasksGrow",
        "by less than two workers say together",
        {UNRESOLVED: "0x60 60x40", UNRESOLVED_2: "0x60 60x40"},
        75,
    ),
    Case("FailedTasksOld", "over a day", {AGE: "86401x9", AGE_2: "0x9"}, 0, OLD),
    Case("FailedTasksOld", "a day, twice told", {AGE: "50000x9", AGE_2: "50000x9"}, 5),
    Case("FailedTasksOld", "a day", {AGE: "86400x9"}, 5),
    Case(
        "FailedTasksNotCollected",
        "for an hour",
        {UNCOLLECTED: "1x70", UNCOLLECTED_2: "0x70"},
        60,
        ALONE,
        FAILED_QUEUE,
    ),
    Case("FailedTasksNotCollected", "for less", {UNCOLLECTED: "1x70"}, 59),
    Case("FailedTasksNotCollected", "not at all", {UNCOLLECTED: "0x70"}, 65),
    Case("FailedTasksNotCollected", "once", {UNCOLLECTED: "1x30 0 1x40"}, 65),
    Case(
        "TaskErrorRatio",
        "a tenth, whatever is retried",
        {FAILED: "0+2x40", PAID: "0+9x40", SKIPPED: "0+9x40", RETRIED: "0+99x40"},
        25,
        RATIO,
        PAY,
    ),
    Case(
        "TaskErrorRatio",
        "three of thirty, of two queues",
        {
            FAILED: "0+0.1x40",
            FAILED_2: "0+0.1x40",
            PAID: "0+0.8x40",
            SKIPPED: "0+1x40",
        },
        25,
        RATIO,
        PAY,
    ),
    Case("TaskErrorRatio", "twenty, and for 5 min", {FAILED: "0+2x40"}, 15, ALL, PAY),
    Case("TaskErrorRatio", "all of 15", {FAILED: "0+1x40", RETRIED: "0+9x40"}, 25),
    Case("TaskErrorRatio", "5 %", {FAILED: "0+1x40", PAID: "0+19x40"}, 12),
    Case("TaskErrorRatio", "4 %", {FAILED: "0+1x40", PAID: "0+24x40"}, 25),
    Case("TaskErrorRatio", "just now", {FAILED: "0+2x40"}, 14),
    Case(
        "TaskErrorRatio",
        "another's runs do not count",
        {FAILED: "0+1x40", MAILED: "0+99x40"},
        25,
    ),
    Case(
        "TaskAlwaysFails",
        "since an hour ago",
        {FAILED: "0+1x99", PAID: "0x5 5x99"},
        90,
        ALWAYS,
        PAY,
    ),
    Case(
        "TaskAlwaysFails",
        "for 15 min, while another succeeds",
        {FAILED: "0+1x90", MAILED: "0+1x90"},
        16,
        ALWAYS,
        PAY,
    ),
    Case("TaskAlwaysFails", "at first", {FAILED: "0+1x90", PAID: "5x90"}, 15),
    Case("TaskAlwaysFails", "not always", {FAILED: "0+9x90", PAID: "0+1x90"}, 75),
    Case("TaskAlwaysFails", "not lately", {FAILED: "0x5 5x99", PAID: "5x99"}, 90),
    Case("TaskAlwaysFails", "retries", {FAILED: "5x90", RETRIED: "0+1x90"}, 75),
    Case(
        "RetryStorm", "over twice", {RETRIED: "0+10x40", PAID: "0+4x40"}, 16, STORM, PAY
    ),
    Case("RetryStorm", "at first", {RETRIED: "0+10x40", PAID: "0+4x40"}, 15),
    Case("RetryStorm", "twice", {RETRIED: "0+10x40", PAID: "0+5x40"}, 30),
    Case("RetryStorm", "few", {RETRIED: "0+4.5x40", PAID: "0+2x40"}, 30),
    Case(
        "RetryStorm",
        "however a task ends",
        {RETRIED: "0+10x40", PAID: "0+2x40", SKIPPED: "0+2x40", FAILED: "0+2x40"},
        30,
    ),
    Case(
        "QueueStalled",
        "as two workers see it",
        {QUEUED: "5x40", QUEUED_2: "3x40", PAID: "0+1x10 10x40"},
        35,
        STALLED,
        SHOP,
    ),
    Case("QueueStalled", "from the start", {QUEUED: "5x40"}, 10, STALLED, SHOP),
    Case(
        "QueueStalled",
        "while another flows",
        {QUEUED: "5x40", MAILED: "0+1x40"},
        25,
        STALLED,
        SHOP,
    ),
    Case("QueueStalled", "for less", {QUEUED: "5x40"}, 9),
    Case("QueueStalled", "flows", {QUEUED: "5x40", PAID: "0+1x40"}, 25),
    Case("QueueStalled", "is tried", {QUEUED: "5x40", RETRIED: "0+1x40"}, 25),
    Case("QueueStalled", "is empty", {QUEUED: "0x40", PAID: "7x40"}, 25),
    Case(
        "QueueWaitLong",
        "two of 35 wait for more",
        {WAITED_300: "0+33x40", WAITED_1800: "0+35x40", WAITED: "0+35x40"},
        11,
        LONG,
        SHOP,
    ),
    Case(
        "QueueWaitLong",
        "at first",
        {WAITED_300: "0+33x40", WAITED_1800: "0+35x40", WAITED: "0+35x40"},
        10,
    ),
    Case(
        "QueueWaitLong",
        "one in fifty",
        {WAITED_300: "0+49x40", WAITED_1800: "0+50x40", WAITED: "0+50x40"},
        30,
    ),
    Case(
        "TaskStuck",
        "in one of two workers",
        {OLDEST: "0+60x90", OLDEST_2: "60x90"},
        66,
        STUCK,
        PAY,
    ),
    Case("TaskStuck", "for an hour", {OLDEST: "0+60x90"}, 65),
    Case("TaskStuck", "for less", {OLDEST: "3600x90"}, 70),
    Case(
        "ChildrenLost",
        "in three ways",
        {SIGNALLED: "0+1x30", FILLED: "0+1x30", EXITED: "0+1x30"},
        20,
        CHILDREN,
    ),
    Case("ChildrenLost", "four at once", {SIGNALLED: "0x5 4x30"}, 6, FOUR),
    Case("ChildrenLost", "three", {SIGNALLED: "0x5 3x30"}, 14),
    Case("ChildrenLost", "long ago", {SIGNALLED: "0x5 9x40"}, 30),
    Case(
        "ChildrenLost",
        "by design",
        {RECYCLED: "0+9x30", LIMITED: "0+9x30", STOPPED: "0+9x30"},
        20,
    ),
    Case(
        "WorkersLost", "one of two", {SLOTS: "4x90", SLOTS_2: "4x40 stale"}, 51, FEWER
    ),
    Case("WorkersLost", "just now", {SLOTS: "4x90", SLOTS_2: "4x40 stale"}, 50),
    Case("WorkersLost", "none", {SLOTS: "4x90", SLOTS_2: "4x90"}, 55),
    Case("WorkersLost", "one more", {SLOTS: "4x90", SLOTS_2: "_x40 4x50"}, 55),
    Case("NoWorkers", "from the start", {}, 5, NONE),
    Case("NoWorkers", "any more", {SLOTS: "4x10 stale"}, 20, NONE),
    Case("NoWorkers", "just now", {SLOTS: "4x10 stale"}, 15),
    Case("NoWorkers", "but one", {SLOTS: "4x40", SLOTS_2: "4x10 stale"}, 20),
    Case(
        "ProbeFailed",
        "in one of two workers",
        {PROBE: "1x40", PROBE_2: "0x40"},
        10,
        SILENT,
        {"probe": "store"},
    ),
    Case("ProbeFailed", "for less", {PROBE: "1x40", PROBE_2: "0x40"}, 9),
    Case("ProbeFailed", "in none", {PROBE: "1x40", PROBE_2: "1x40"}, 30),
    Case(
        "CircuitOpen",
        "in one of two workers",
        {OPEN: "1x40", OPEN_2: "0x40"},
        10,
        CIRCUIT,
        BANK,
    ),
    Case("CircuitOpen", "in both", {OPEN: "1x40", OPEN_2: "1x40"}, 10, CIRCUIT, BANK),
    Case("CircuitOpen", "for less", {OPEN: "1x40"}, 9),
    Case("CircuitOpen", "is probed", {OPEN: "0x40", HALF_OPEN: "1x40"}, 30),
    Case(
        "TelemetryDropped",
        "again and again",
        {DROPPED: "0+1x40"},
        11,
        LOST,
        {"signal": "spans"},
    ),
    Case("TelemetryDropped", "at first", {DROPPED: "0+1x40"}, 10),
    Case("TelemetryDropped", "once", {DROPPED: "0x5 1x40"}, 20),
    Case("TelemetryDropped", "no more", {DROPPED: "7x40"}, 30),
)


def told(promtool: str, rules: Path, folder: Path) -> dict[str, str]:
    """What promtool says of each case, by its name; one run for all."""
    names: dict[str, str] = {}
    for number, case in enumerate(CASES):
        file = folder / f"{number}.yml"
        file.write_text(json.dumps(case.as_tests(rules)))
        names[str(file)] = str(case)
    _, said = run(promtool, "test", "rules", *names)
    _, *parts = re.split(r"^Unit Testing: +(\S+)\n", said, flags=re.MULTILINE)
    return {
        names[file]: verdict.strip()
        for file, verdict in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture(scope="module")
def verdicts(
    promtool: str, rules: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What promtool says of each case."""
    return told(promtool, rules, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", [str(case) for case in CASES])
def test_an_alert_fires_or_does_not(verdicts: dict[str, str], name: str) -> None:
    """With its labels, and with what it tells whoever it wakes."""
    assert verdicts[name] == "SUCCESS"


@pytest.mark.parametrize("name", [alert.name for alert in ALERTS])
def test_each_alert_is_seen_to_fire_and_not_to(name: str) -> None:
    """A new one gets cases, too."""
    firing = {bool(case.summary) for case in CASES if case.alert == name}

    assert firing == {True, False}
