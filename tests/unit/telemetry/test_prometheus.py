"""The page that Prometheus scrapes, read by prometheus_client's own parsers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from celery_resilience.outcome import Ended, Outcome
from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.metrics import Metrics
from celery_resilience.telemetry.prometheus import (
    OPENMETRICS,
    TEXT,
    MetricsPage,
    accepts_openmetrics,
    number_text,
)
from celery_resilience.telemetry.series import Histogram, Reading

#: Milliseconds that a scrape of 200 tasks may take.
SCRAPE_MS = 20

Parse = Callable[[str], Iterable[Any]]

FORMATS = [
    pytest.param("text/plain", TEXT, parse_text, id="text"),
    pytest.param(
        "application/openmetrics-text; version=1.0.0",
        OPENMETRICS,
        parse_openmetrics,
        id="openmetrics",
    ),
]


def page_of(*readings: Reading) -> MetricsPage:
    """A page of these."""
    return MetricsPage(lambda: readings)


def parsed(page: MetricsPage, accept: str, parse: Parse) -> dict[Any, float]:
    """The samples of a page by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse(page(accept)[1].decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(("accept", "kind", "parse"), FORMATS)
def test_both_formats_have_the_same_numbers(
    accept: str, kind: str, parse: Parse
) -> None:
    """A counter, a gauge without labels, and a histogram whose buckets add up."""
    page = page_of(
        Reading(i.DROPPED, {("spans",): 3.0}),
        Reading(i.BUSY, {(): 0.5}),
        Reading(i.ATTEMPTS, histograms={("t",): Histogram([1, 2, 0, 0, 0, 0, 1], 26)}),
    )

    assert page(accept)[0] == kind
    found = parsed(page, accept, parse)
    assert found["celery_resilience_telemetry_dropped_total", ("signal", "spans")] == 3
    assert found[("celery_resilience_worker_busy",)] == 0.5
    name, task = "celery_resilience_task_attempts", ("task", "t")
    buckets = {
        key[1][1]: value for key, value in found.items() if key[0] == name + "_bucket"
    }
    assert [*buckets.values()] == [1, 3, 3, 3, 3, 3, 4]
    assert [*buckets][0::6] == ["1.0", "+Inf"]
    assert (found[name + "_count", task], found[name + "_sum", task]) == (4, 26)


@pytest.mark.parametrize(("accept", "kind", "parse"), FORMATS)
@given(value=st.text(max_size=20))
def test_any_text_is_a_label(accept: str, kind: str, parse: Parse, value: str) -> None:
    """A task may be named like nothing else, and a queue's name came over the wire."""
    page = page_of(Reading(i.DROPPED, {(value,): 1.0}))

    ((_, (_, found)),) = parsed(page, accept, parse)
    assert found == value.encode("utf-8", "replace").decode()


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4;q=0.3,*/*;q=0.1", False),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", True),
        ("application/openmetrics-text;version=9.0.0,text/plain", False),
        ("application/openmetrics-text;q=0,text/plain", False),
    ],
)
def test_the_format_is_the_one_that_is_asked_for(accept: str, is_open: bool) -> None:
    """What a browser, curl and Prometheus ask for."""
    assert accepts_openmetrics(accept) is is_open


@given(st.floats() | st.integers(-(2**53), 2**53))
def test_a_number_is_read_as_it_was(number: float) -> None:
    """Also one that is none."""
    found = float(number_text(number))

    assert found == number or (math.isnan(found) and math.isnan(number))


def test_a_scrape_of_two_hundred_tasks_is_quick() -> None:
    """The main process waits for it: what has been written once is not made again."""
    names = [f"shop.tasks.do_this_and_that_{n}" for n in range(200)]
    metrics = Metrics(names)
    metrics.start_at_zero({name: ["celery"] for name in names})
    for name in names:
        for outcome in (Outcome.SUCCEEDED, Outcome.FAILED):
            metrics.ended(Ended(name, "celery", outcome, 1, 0.1, 0.1))
    page = MetricsPage(metrics.read)

    assert page("")[1].count(b"\n") > 10_000
    taken = []
    for _ in range(20):
        before = time.thread_time()
        page("")
        taken.append(time.thread_time() - before)
    assert min(taken) * 1_000 < SCRAPE_MS
