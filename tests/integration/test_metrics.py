"""What a worker counts, as Prometheus reads it."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually
from prometheus_client.parser import text_string_to_metric_families as parse_text
from services import free_port

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Page:
    """A worker's page of metrics."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.flags = ("--metrics-port", f"127.0.0.1:{port}")

    def text(self, accept: str = "text/plain") -> str:
        """As it is sent to somebody who accepts this."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        request = urllib.request.Request(url, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def samples(self) -> Iterator[Any]:
        """Each number."""
        for family in parse_text(self.text()):
            yield from family.samples

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the numbers of a name that have these labels."""
        return sum(
            sample.value
            for sample in self.samples()
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def by(self, name: str, label: str, **labels: str) -> dict[str, int]:
        """The same by one label, without what is zero."""
        found: Counter[str] = Counter()
        for sample in self.samples():
            if sample.name == name and labels.items() <= sample.labels.items():
                found[sample.labels[label]] += int(sample.value)
        return {value: count for value, count in found.items() if count}


OUTCOMES = "celery_resilience_task_outcomes_total"


@pytest.fixture
def page() -> Page:
    """On a port that nobody has."""
    return Page(free_port())


#: A thousand calls: how each ends, how many do, and with which outcomes.
CALLS = {
    "return": (600, {"succeeded": 1}),
    "raise": (180, {"failed": 1}),
    "skip": (100, {"skipped": 1}),
    "retry": (40, {"retried": 1, "failed": 1}),
    "retry_once": (40, {"retried": 1, "succeeded": 1}),
    "event": (20, {"succeeded": 1}),
    "kill": (20, {"failed": 1}),
}


def expected() -> Counter[str]:
    """Deliveries by outcome."""
    counts: Counter[str] = Counter()
    for calls, outcomes in CALLS.values():
        for outcome, times in outcomes.items():
            counts[outcome] += calls * times
    return counts


def test_a_thousand_tasks_are_counted_exactly(
    make_fleet: FleetMaker, page: Page
) -> None:
    """Though each child is recycled after seven tasks, and twenty are killed."""
    fleet = make_fleet("redis", worker_prefetch_multiplier=4)
    worker = fleet.worker("--max-tasks-per-child", "7", *page.flags, concurrency=4)
    assert page.sum(OUTCOMES, task="metered", outcome="failed") == 0

    send_all(fleet)
    wanted = expected()
    total = sum(wanted.values())
    eventually(
        lambda: page.sum(OUTCOMES, task="metered") >= total,
        within_s=180,
        what="all are counted",
        every_s=0.5,
    )

    assert page.by(OUTCOMES, "outcome", task="metered") == wanted
    assert page.by("celery_resilience_task_failures_total", "reason") == {
        "exception": 180,
        "retries_exhausted": 40,
        "worker_lost": 20,
    }
    assert page.by("celery_resilience_failed_tasks_operations_total", "operation") == {
        "kept": 240
    }
    runs = total - 20  # those that are killed take what they have counted along
    assert page.sum("orders_total") == 2 * runs
    assert page.sum("orders_total", how="retry") == 2 * 80
    assert page.sum("amount_eur_count") == runs
    assert page.sum("amount_eur_sum") == 12.5 * runs
    event = {"event": "idempotency.lease_lost"}
    assert page.sum("celery_resilience_events_total", **event) == 20
    exits = page.by("celery_resilience_worker_child_exits_total", "reason")
    assert exits["signal"] == 20
    assert exits["recycled"] > 100
    assert worker.stop() == 0


def send_all(fleet: Fleet) -> None:
    """Send the calls, well mixed."""
    calls = [how for how, (count, _) in CALLS.items() for _ in range(count)]
    with fleet.app.pool.acquire(block=True) as connection:
        producer = fleet.app.amqp.Producer(connection)
        for number in range(len(calls)):
            how = calls[number * 389 % len(calls)]
            fleet.send("metered", how, producer=producer, ignore_result=True)
