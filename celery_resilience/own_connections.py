"""The connections of celery-resilience itself, which are no task's."""

from __future__ import annotations

from typing import Any

#: In the `info` that a pool of SQLAlchemy's keeps with such a connection.
MARK = "celery_resilience.own"


def mark(driver: Any, record: Any) -> None:
    """Listener of an engine's event "connect"."""
    record.info[MARK] = True
