"""Tasks that count what they do, and then end in the way that they are told."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Celery

from celery_resilience import Skip
from celery_resilience.events import emit


def register(app: Celery, base: Any) -> None:
    """Add them to *app*."""

    @app.task(base=base, bind=True, name="metered", shared=False, max_retries=1)
    def metered(self: Any, how: str, secret: str = "") -> str:
        self.resilience.count("orders", 2, how=how)
        self.resilience.observe("amount_eur", 12.5)
        if how == "event":
            emit("idempotency.lease_lost", claim=None)
        if how == "raise":
            raise ValueError(secret)
        if how == "retry":
            raise self.retry(countdown=0)
        if how == "retry_once" and self.request.retries == 0:
            raise self.retry(countdown=0)
        if how == "skip":
            raise Skip("nothing to do")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return how

    @app.task(base=base, bind=True, name="misnamed", shared=False)
    def misnamed(self: Any) -> None:
        self.resilience.count("Orders!")
