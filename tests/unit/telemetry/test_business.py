"""What a run may count and observe, and what is refused."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

import pytest

from celery_resilience.delivery.facts import MAX_BYTES
from celery_resilience.errors import ConfigurationError
from celery_resilience.redaction import is_hidden
from celery_resilience.telemetry import business as module
from celery_resilience.telemetry.business import MAX_CHARS, RunCounts
from celery_resilience.telemetry.instruments import BUSINESS_BOUNDS


class Shop(StrEnum):
    """A text of a kind."""

    NORTH = "north"


@pytest.fixture
def run() -> RunCounts:
    """In an app that hides the usual names and `iban`."""
    return RunCounts(lambda name: is_hidden(name, frozenset({"iban"})))


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test has named is not known to the next."""
    monkeypatch.setattr(module, "_checked", set())
    monkeypatch.setattr(module, "_refused_values", set())


def test_a_run_adds_up_what_it_counts(run: RunCounts) -> None:
    """Labels in any order are the same."""
    run.count("orders", 1, {"shop": "a", "kind": 2})
    run.count("orders", 2.5, {"kind": 2, "shop": "a"})
    run.observe("amount", 3, {})
    run.observe("amount", 10**9, {})

    counts, observed, dropped = json.loads(json.dumps(run.fact()))
    assert counts == [["orders", [["kind", "2"], ["shop", "a"]], 3.5]]
    buckets = [[BUSINESS_BOUNDS.index(5), 1], [len(BUSINESS_BOUNDS), 1]]
    assert observed == [["amount", [], 1_000_000_003.0, buckets]]
    assert dropped == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "True"), (None, ""), (Shop.NORTH, "north"), ("x" * 500, "x" * 100)],
)
def test_a_label_is_a_short_text(run: RunCounts, value: Any, text: str) -> None:
    """Whatever is given."""
    run.count("orders", 1, {"of": value})

    assert run.fact()[0] == [["orders", (("of", text),), 1]]


@pytest.mark.parametrize(
    "name",
    [
        *("Orders", "orders-made", "", "2orders", "orders_", "x" * 65, 7, "a..b"),
        *(
            "orders_total",
            "orders.total",
            "amount_sum",
            "celery_resilience.x",
            "celery_resilience_x",
        ),
    ],
)
def test_a_bad_name_is_refused_with_what_is_accepted(run: RunCounts, name: Any) -> None:
    """Where it is written, at the first run of the task, though others were right."""
    run.count("orders", 1, {})
    for tell in (run.count, run.observe):
        with pytest.raises(ConfigurationError, match=r"metric .*(must|our own)"):
            tell(name, 1, {})


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Shop", "lower case"),
        ("a.b", "lower case"),
        ("le", "Prometheus"),
        ("password", "never shown"),
        ("iban", "never shown"),
    ],
)
def test_a_bad_label_is_refused(run: RunCounts, label: str, said: str) -> None:
    """Also one that would show what is never shown."""
    with pytest.raises(ConfigurationError, match=said):
        run.count("orders", 1, {label: "x"})


def test_too_many_labels_and_odd_values_are_refused(run: RunCounts) -> None:
    """An object as a label is a mistake of the code, not of the data."""
    with pytest.raises(ConfigurationError, match="at most 8 labels"):
        run.count("orders", 1, {f"l{n}": 1 for n in range(9)})
    with pytest.raises(ConfigurationError, match="must be a text"):
        run.count("orders", 1, {"shop": object()})
    with pytest.raises(ConfigurationError, match="an int or a float, got '1'"):
        run.count("orders", "1", {})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="got True"):
        run.observe("orders", True, {})


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf"), 10**400])
def test_a_number_that_cannot_be_added_fails_no_task(
    run: RunCounts, amount: float, caplog: pytest.LogCaptureFixture
) -> None:
    """It is dropped, counted as such, and told once."""
    for _ in range(2):
        run.count("orders", amount, {})

    assert run.fact() == [[], [], 2]
    assert caplog.text.count("is not taken") == 1


def test_what_a_run_tells_is_bounded(run: RunCounts) -> None:
    """Or its datagram would be too large, and the facts of its failure lost with it."""
    for number in range(2_000):
        run.count("orders", 1, {"customer": f"\N{GRINNING FACE}{number}" * 20})
        run.observe("amount", 1, {"customer": number})

    counts, observed, dropped = run.fact()
    assert len(counts) + len(observed) + dropped == 4_000
    assert dropped > 0
    assert len(json.dumps(run.fact())) <= MAX_CHARS < MAX_BYTES / 2
