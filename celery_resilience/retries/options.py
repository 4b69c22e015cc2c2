"""What an app says about a retry budget, checked at start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from celery_resilience.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    """
    The options of one retry budget.

    Attributes:
        share: Retries that each first attempt adds, from 0 to 1: with 0.1, one task in
            ten may be tried again.
        per_s: Retries a second that there may be in any case, above 0.
        most: Retries that can be saved up, from 1; a new budget has so many.
    """

    share: float = 0.1
    per_s: float = 1.0
    most: float = 100.0


def _is_number(value: Any, least: float, most: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and isfinite(value)
        and least <= value <= most
    )


_CHECKS: Mapping[str, tuple[Any, str]] = {
    "share": (lambda v: _is_number(v, 0, 1), "a number from 0 to 1"),
    "per_s": (
        lambda v: _is_number(v, 0, 1_000_000) and v > 0,
        "a number above 0, at most 1 000 000",
    ),
    "most": (lambda v: _is_number(v, 1, 1_000_000), "a number from 1 to 1 000 000"),
}


def budget_options(name: str, values: Mapping[str, Any]) -> BudgetOptions:
    """
    Check the options of the budget *name*, all at once.

    Raises:
        ConfigurationError: Some are wrong; the message names each, its value and what
            is accepted.
    """
    known = [field.name for field in fields(BudgetOptions)]
    wrong: list[str] = []
    for option, value in values.items():
        if option not in known:
            near = get_close_matches(option, known, n=1)
            meant = f", did you mean {near[0]}?" if near else ""
            wrong.append(f"unknown option {option}{meant}")
        elif not _CHECKS[option][0](value):
            wrong.append(f"{option} must be {_CHECKS[option][1]}, got {value!r}")
    if wrong:
        raise ConfigurationError(
            f"resilience_retry_budgets: {name}: {'; '.join(wrong)}"
        )
    return BudgetOptions(**values)
