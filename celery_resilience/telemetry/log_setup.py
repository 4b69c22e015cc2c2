"""Puts filters, and with `resilience_log_format` a formatter, where a worker logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from celery_resilience._celery_worker import is_own_formatter
from celery_resilience.telemetry.binding import bind_handlers, handlers
from celery_resilience.telemetry.log import outcome_logger
from celery_resilience.telemetry.log_format import LineFormatter
from celery_resilience.telemetry.log_redaction import (
    CeleryRecords,
    NamesOf,
    filter_celerys,
)


class LogSetup:
    """
    What a worker's processes do with every record.

    Args:
        log_format: "json" or "logfmt": handlers that write as Celery does write lines of
            that; None: they stay as they are.
        hidden: Names that are never logged, besides the usual ones.
        names_of: See `CeleryRecords`.
        is_ours: Whether a task's deliveries are settled by us.
    """

    def __init__(
        self,
        log_format: str | None,
        hidden: Collection[str],
        *,
        names_of: NamesOf,
        is_ours: Callable[[Any], bool],
    ) -> None:
        self._format = log_format
        self._hidden = frozenset(name.lower() for name in hidden)
        self._records = CeleryRecords(
            names_of,
            tells=lambda: outcome_logger.isEnabledFor(logging.INFO),
            is_ours=is_ours,
        )

    def apply(self) -> None:
        """Dress the handlers that there are now; more than once is as once."""
        filter_celerys(self._records)
        bind_handlers()
        for handler in handlers():
            present: Any = handler.formatter
            own = present.instead_of if isinstance(present, LineFormatter) else present
            if not is_own_formatter(own):
                continue
            if self._format is None:
                handler.setFormatter(own)
            else:
                handler.setFormatter(LineFormatter(self._format, self._hidden, own))
