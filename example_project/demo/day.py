"""What a shop's day came to, counted from its ledger. No I/O."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from example_project.chaos import AFTERNOON, MORNING
from example_project.demo.open_shop import Tally
from example_project.ledger import Effect

#: Every order line of the file.
LINES = range(MORNING.start, AFTERNOON.stop)


@dataclass(frozen=True, slots=True)
class Day:
    """
    What became of the orders of one day.

    Attributes:
        shipped: Orders that were shipped.
        paid_only: Charged, and never shipped.
        unpaid: Accepted, and never charged.
        gone: Never accepted, and not kept as failed either.
        kept: Failed tasks that can be looked at and run again.
        charged_twice: Customers of whom the money for one order was taken twice.
        mailed_twice: Customers who have two apologies for one order.
        unearned_cents: Money that was taken, and no parcel was sent for it.
        killed: Children that were killed.
        largest_mib: The largest that a child of the worker was seen.
    """

    shipped: int
    paid_only: int
    unpaid: int
    gone: int
    kept: int
    charged_twice: int
    mailed_twice: int
    unearned_cents: int
    killed: int
    largest_mib: int

    @property
    def lost(self) -> int:
        """Orders that nobody will hear of again."""
        return self.paid_only + self.unpaid + self.gone


def day_of(tally: Tally, *, kept: Iterable[int], killed: int, largest_mib: int) -> Day:
    """
    Count a day.

    Args:
        tally: From the ledger.
        kept: Lines with a failed task that can be run again.
        killed: Children that were killed.
        largest_mib: Of a child of the worker.
    """
    safe = set(kept)
    accepted, charged, shipped = map(
        tally.lines, (Effect.ACCEPTED, Effect.CHARGED, Effect.SHIPPED)
    )
    return Day(
        shipped=len(shipped),
        paid_only=len(charged - shipped - safe),
        unpaid=len(accepted - charged - safe),
        gone=len(set(LINES) - accepted - safe),
        kept=len(safe),
        charged_twice=tally.twice(Effect.CHARGED),
        mailed_twice=tally.twice(Effect.APOLOGISED),
        unearned_cents=tally.cents[Effect.CHARGED] - tally.cents[Effect.SHIPPED],
        killed=killed,
        largest_mib=largest_mib,
    )


@dataclass(frozen=True, slots=True)
class Sum:
    """
    The end of the resilient day.

    Attributes:
        orders: Lines in the file.
        shipped: Orders that were shipped, each once.
        refused: Failed tasks that were discarded with their reason.
        unresolved: Failed tasks that wait for somebody.
        doubled: Effects that happened once more than they should.
        charged_cents, shipped_cents: Money taken, and its worth in parcels.
        reported_cents: Money in the shop's revenue report.
    """

    orders: int
    shipped: int
    refused: int
    unresolved: int
    doubled: int
    charged_cents: int
    shipped_cents: int
    reported_cents: int

    @property
    def is_even(self) -> bool:
        """Every order was shipped once or refused, and nobody paid for nothing."""
        return (
            self.shipped + self.refused == self.orders
            and self.unresolved == 0
            and self.doubled == 0
            and self.charged_cents == self.shipped_cents == self.reported_cents
        )


def line_of(failed_task: Mapping[str, Any]) -> int:
    """
    The order line that a failed task was about.

    The first task of an order's chain is called by its line, and is the root of the
    others.
    """
    for name in ("root_id", "task_id"):
        if match := re.fullmatch(r"line-(\d+)", failed_task[name] or ""):
            return int(match[1])
    what = " ".join(
        str(failed_task[name]) for name in ("task", "reason", "exception", "message")
    )
    raise ValueError(f"no order line in failed task {failed_task['id']}: {what}")


def refusals(discarded: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Why orders were refused, most frequent first; what differs is written as …"""
    reasons = Counter(_general(task) for task in discarded)
    return dict(reasons.most_common())


def _general(task: Mapping[str, Any]) -> str:
    if task["reason"] == "worker_lost":
        return "it kills every process that looks at it"
    return re.sub(r"'[^']*'|B-\d+|(?<=field )\w+|(?<=line )\d+", "…", task["message"])
