"""What an app may say about a retry budget."""

from __future__ import annotations

from typing import Any

import pytest

from celery_resilience.errors import ConfigurationError
from celery_resilience.retries.options import BudgetOptions, budget_options


def test_each_option_is_optional() -> None:
    """And what is said is taken."""
    assert budget_options("bank", {}) == BudgetOptions(0.1, 1.0, 100.0)
    said = {"share": 0, "per_s": 0.5, "most": 1}
    assert budget_options("bank", said) == BudgetOptions(0, 0.5, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 1.1}, "share must be a number from 0 to 1, got 1.1"),
        ({"share": True}, "got True"),
        ({"per_s": 0}, "per_s must be a number above 0"),
        ({"per_s": float("inf")}, "got inf"),
        ({"most": 0.5}, "most must be a number from 1"),
        ({"most": "9"}, "got '9'"),
        ({"shares": 1}, "unknown option shares, did you mean share?"),
    ],
)
def test_a_wrong_one_is_refused(options: dict[str, Any], said: str) -> None:
    """With the budget, the option, the value and what is accepted."""
    with pytest.raises(ConfigurationError) as refused:
        budget_options("bank", options)

    assert str(refused.value).startswith("resilience_retry_budgets: bank: ")
    assert said in str(refused.value)


def test_all_mistakes_are_told_at_once() -> None:
    """One start shows every one."""
    with pytest.raises(ConfigurationError) as refused:
        budget_options("bank", {"share": 2, "per_s": 0, "most": 0, "x": 1})

    assert len(str(refused.value).split("; ")) == 4
