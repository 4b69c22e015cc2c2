"""Budgets in Redis: a hash for each, which Redis itself forgets once it is full."""

from __future__ import annotations

from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.store import Withdrawal
from celery_resilience.stores.redis import RedisServer

ROOM = "retries"
VERSION = 1


class RedisBudgetStore:
    """
    `BudgetStore` in Redis.

    Args:
        server: Where the hashes are.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def withdraw(
        self, name: str, options: BudgetOptions, *, added: float, max_wait_s: float
    ) -> Withdrawal:
        """Take one retry from the budget *name*, in one round trip."""
        self._server.ready(ROOM, VERSION)
        words = (options.most, options.per_s, added, max_wait_s)
        granted, wait_s = self._server.run(
            ROOM, "withdraw", name, *(f"{word:.6f}" for word in words)
        )
        return Withdrawal(bool(granted), float(wait_s))
