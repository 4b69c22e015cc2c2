"""What a retry budget holds, and what a store of budgets promises."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from celery_resilience.retries.options import BudgetOptions


class Bucket(NamedTuple):
    """
    A budget as it is stored.

    Attributes:
        tokens: Retries that it has; below 0, so many have been promised.
        at: Wall time in seconds of the last change.
    """

    tokens: float
    at: float


class Withdrawal(NamedTuple):
    """
    What a budget says to a retry.

    Attributes:
        is_granted: It has one for it.
        wait_s: Seconds until it may run; if it is not granted, until asking again is
            worth it.
    """

    is_granted: bool
    wait_s: float


class BudgetStore(Protocol):
    """Budgets that several processes share."""

    def withdraw(
        self, name: str, options: BudgetOptions, *, added: float, max_wait_s: float
    ) -> Withdrawal:
        """
        Take one retry from the budget *name*, now or in advance.

        Args:
            added: Retries that first attempts have added since this process last asked.
            max_wait_s: It is not promised for later than that.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        ...


def withdrawn(
    bucket: Bucket | None,
    options: BudgetOptions,
    *,
    added: float,
    now: float,
    max_wait_s: float,
) -> tuple[Bucket, Withdrawal]:
    """
    A budget after a retry has asked, and what it was told.

    Args:
        bucket: None: nobody has asked for a retry before.
    """
    tokens, at = bucket or Bucket(options.most, now)
    tokens += added + max(0.0, now - at) * options.per_s
    tokens = min(tokens, options.most)
    left, at = tokens - 1, max(now, at)
    if left < -max_wait_s * options.per_s:
        return Bucket(tokens, at), Withdrawal(False, max_wait_s)
    return Bucket(left, at), Withdrawal(True, max(0.0, -left / options.per_s))
