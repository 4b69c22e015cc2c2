"""Waits for what sends telemetry, but never for long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event

from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.telemetry")


def flush_within(seconds: float, flush: Callable[[], object]) -> bool:
    """
    Call *flush* in a thread of its own, and wait for it.

    Args:
        seconds: At most; what goes on then ends with the process.

    Returns:
        Whether it has ended.
    """
    done = Event()

    def run() -> None:
        try:
            flush()
        except Exception:
            logger.exception("telemetry could not be flushed")
        finally:
            done.set()

    start_deaf(run, "telemetry-flush")
    return done.wait(seconds)
