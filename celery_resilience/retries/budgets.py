"""The retry budgets that this process takes from, and what its first attempts add.

A first attempt asks nobody: it is counted here, and told when a retry asks next.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from celery_resilience.deadline import answer_within
from celery_resilience.errors import StoreUnavailable
from celery_resilience.events import emit
from celery_resilience.retries.memory_store import MemoryBudgetStore
from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.store import BudgetStore, Withdrawal

logger = logging.getLogger("celery_resilience.retries")

#: Seconds that a retry waits for the store, the first time and later.
FIRST_WAIT_S = 2.0
WAIT_S = 0.5

#: Seconds for which a store that did not answer is not asked.
AWAY_S = 10.0


class Budgets:
    """
    The budgets of one app in this process.

    Args:
        store: Gives the store, None where the app has none; called at each use,
            because a process opens its own.
        options: What the app says, by the budgets' names.
        clock: The monotonic clock.
    """

    def __init__(
        self,
        store: Callable[[], BudgetStore | None],
        options: Callable[[], Mapping[str, BudgetOptions]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._options = options
        self._clock = clock
        self._local = MemoryBudgetStore(clock)
        self._firsts: Counter[str] = Counter()
        self._away_until = 0.0
        self._is_away = False
        self._has_asked = False

    def add_first(self, name: str) -> None:
        """A first attempt begins, which adds its share to the budget *name*."""
        self._firsts[name] += 1

    def withdraw(self, name: str, max_wait_s: float) -> Withdrawal:
        """
        Take one retry from the budget *name*; never raises.

        While the store is away, from one of this process's own.

        Args:
            max_wait_s: It is not promised for later than that.
        """
        options = self._options().get(name) or BudgetOptions()
        added = min(self._firsts.pop(name, 0) * options.share, options.most)
        if self._clock() >= self._away_until:
            try:
                store = self._store()
                if store is not None:
                    found = answer_within(
                        WAIT_S if self._has_asked else FIRST_WAIT_S,
                        lambda: store.withdraw(
                            name, options, added=added, max_wait_s=max_wait_s
                        ),
                    )
                    self._came_back()
                    return found
            except Exception as exc:
                # StoreUnavailable, or what a driver raises unforeseen.
                self._went_away(exc)
        return self._local.withdraw(name, options, added=added, max_wait_s=max_wait_s)

    def _came_back(self) -> None:
        self._has_asked = True
        if self._is_away:
            self._is_away = False
            logger.info("the store of retry budgets is back")
            emit("retries.store_back")

    def _went_away(self, exc: Exception) -> None:
        self._away_until = self._clock() + AWAY_S
        if self._is_away:
            return
        self._is_away = True
        why = exc if isinstance(exc, StoreUnavailable) else repr(exc)
        said = "retry budgets are this process's own while the store is away: %s"
        logger.warning(said, why)
        emit("retries.store_away", error=str(exc))
