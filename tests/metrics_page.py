"""A worker's page of metrics, as Prometheus reads it."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parse_text

OURS = "celery_resilience"
OUTCOMES = "celery_resilience_task_outcomes_total"


class MetricsPage:
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

    def samples(self, name: str, **labels: str) -> Iterator[Any]:
        """The numbers of a name that have these labels."""
        lines = [line for line in self.text().splitlines() if line.startswith(name)]
        for family in parse_text("\n".join(lines) + "\n"):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    yield sample

    def sum(self, name: str, **labels: str) -> float:
        """Their sum."""
        return sum(sample.value for sample in self.samples(name, **labels))

    def by(self, name: str, label: str, **labels: str) -> dict[str, int]:
        """The same by one label, without what is zero."""
        found: Counter[str] = Counter()
        for sample in self.samples(name, **labels):
            found[sample.labels[label]] += int(sample.value)
        return {value: count for value, count in found.items() if count}
