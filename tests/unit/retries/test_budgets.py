"""The budgets of one process: what it counts, and what it does without its store."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from celery_resilience import events
from celery_resilience.errors import StoreUnavailable
from celery_resilience.retries.budgets import AWAY_S, Budgets
from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.store import Withdrawal


class Store:
    """A store that remembers what it was asked, and may be away."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, BudgetOptions, float]] = []
        self.error: Exception | None = None

    def withdraw(
        self, name: str, options: BudgetOptions, *, added: float, max_wait_s: float
    ) -> Withdrawal:
        """Grant it."""
        self.asked.append((name, options, added))
        if self.error is not None:
            raise self.error
        return Withdrawal(True, 0.5)


class Clock:
    """Stands still until it is told."""

    now = 1_000.0

    def __call__(self) -> float:
        """The monotonic clock."""
        return self.now


OPTIONS = BudgetOptions(share=0.1, per_s=0.01, most=5)


@pytest.fixture
def store() -> Store:
    """Of the fleet's budgets."""
    return Store()


@pytest.fixture
def clock() -> Clock:
    """The process's."""
    return Clock()


@pytest.fixture
def budgets(store: Store, clock: Clock) -> Budgets:
    """With options for one budget."""
    return Budgets(lambda: store, lambda: {"bank": OPTIONS}, clock=clock)


def test_first_attempts_are_told_when_a_retry_asks(
    budgets: Budgets, store: Store
) -> None:
    """Once, and none of them asks for itself."""
    for _ in range(7):
        budgets.add_first("bank")
    budgets.add_first("mail")
    assert store.asked == []

    assert budgets.withdraw("bank", 9) == Withdrawal(True, 0.5)
    budgets.withdraw("bank", 9)

    assert store.asked == [
        ("bank", OPTIONS, pytest.approx(0.7)),
        ("bank", OPTIONS, 0),
    ]


def test_more_than_can_be_saved_is_not_told(budgets: Budgets, store: Store) -> None:
    """A process may have run for a year."""
    for _ in range(1_000):
        budgets.add_first("bank")
    budgets.withdraw("bank", 9)

    assert store.asked == [("bank", OPTIONS, 5)]


def test_a_budget_of_which_nothing_is_said_has_the_defaults(
    budgets: Budgets, store: Store
) -> None:
    """A rule may name any."""
    budgets.withdraw("mail", 9)

    assert store.asked == [("mail", BudgetOptions(), 0)]


@pytest.mark.parametrize("error", [StoreUnavailable("away"), RuntimeError("driver")])
def test_without_its_store_a_process_has_budgets_of_its_own(
    budgets: Budgets,
    store: Store,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """It is asked again after a while; both are said once."""
    caplog.set_level(logging.INFO, "celery_resilience.retries")
    seen: list[str] = []
    ends = [
        events.observe(
            f"retries.store_{what}", lambda what=what, **_: seen.append(what)
        )
        for what in ("away", "back")
    ]
    store.error = error

    granted = [budgets.withdraw("bank", 0).is_granted for _ in range(6)]
    clock.now += AWAY_S
    budgets.withdraw("bank", 0)
    store.error = None
    before = len(store.asked)
    budgets.withdraw("bank", 0)
    clock.now += AWAY_S
    assert budgets.withdraw("bank", 0) == Withdrawal(True, 0.5)

    for end in ends:
        end()
    assert granted == [True] * 5 + [False]
    assert (before, len(store.asked)) == (2, 3)
    assert seen == ["away", "back"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_app_without_a_store_has_budgets_of_each_process(clock: Clock) -> None:
    """Of which nothing is said: nobody expects another."""
    budgets: Any = Budgets(lambda: None, lambda: {"bank": OPTIONS}, clock=clock)

    assert [budgets.withdraw("bank", 0).is_granted for _ in range(6)] == [
        *[True] * 5,
        False,
    ]
