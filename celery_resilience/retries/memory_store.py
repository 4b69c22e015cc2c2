"""Budgets of one process: while the store is away, and for apps without one."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.store import Bucket, Withdrawal, withdrawn


class MemoryBudgetStore:
    """
    `BudgetStore` in this process.

    Args:
        clock: Wall time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._buckets: dict[str, Bucket] = {}

    def withdraw(
        self, name: str, options: BudgetOptions, *, added: float, max_wait_s: float
    ) -> Withdrawal:
        """Take one retry from the budget *name*, now or in advance."""
        with self._lock:
            self._buckets[name], withdrawal = withdrawn(
                self._buckets.get(name),
                options,
                added=added,
                now=self._clock(),
                max_wait_s=max_wait_s,
            )
        return withdrawal
