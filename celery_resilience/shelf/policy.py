"""Which message waits in the store, and how long nobody needs to look there.

No Celery, no I/O and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from celery_resilience.message import marks_of

#: Messages that a worker holds in its memory, running or waiting, before snoozed ones
#: go to the store.
MAX_HELD = 1_000

#: Seconds from now within which a message is due that is held all the same.
SOON_S = 3.0

#: Seconds between two looks at the store: where something waits there, where nothing
#: is known to, and the first after a worker's start.
BUSY_S = 1.0
IDLE_S = 15.0
FIRST_S = 2.0


def most_held(eta_task_limit: int | None) -> int:
    """
    Messages that a worker holds before snoozed ones go to the store.

    Args:
        eta_task_limit: Celery's `worker_eta_task_limit`, at which a worker takes
            nothing more.
    """
    return MAX_HELD if not eta_task_limit else min(MAX_HELD, eta_task_limit // 2)


def waits_s(headers: Mapping[str, Any], now: float) -> float | None:
    """
    Seconds until a message is due that was sent again by us; None: of no other.

    Args:
        headers: The message's.
        now: Wall time.
    """
    eta = headers.get("eta")
    if not isinstance(eta, str) or "sent" not in marks_of(headers):
        return None
    try:
        at = datetime.fromisoformat(eta)
    except ValueError:
        return None
    # Ours are always aware.
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - now


def look_again_in_s(next_due_s: float | None, chance: float) -> float:
    """
    Seconds until a worker looks for messages that are due.

    Args:
        next_due_s: Until the first of those that wait; None: none waits.
        chance: From 0 to 1: workers do not look at the same time.
    """
    if next_due_s is None:
        return IDLE_S * (1 + chance) / 2
    return max(min(next_due_s, IDLE_S * (1 + chance) / 2), BUSY_S * (1 + chance) / 2)
