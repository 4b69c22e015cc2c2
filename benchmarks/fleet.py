"""The app that the benchmarks run: `celery -A benchmarks.fleet worker`."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, Task

from celery_resilience import Resilience, ResilientTask


def make_app(broker_url: str, kind: str, store_url: str | None = None) -> Celery:
    """
    An app with tasks that do nothing, or raise.

    Args:
        broker_url: Of a private server.
        kind: "plain" or "resilient".
        store_url: Where failed tasks are kept.
    """
    app = Celery("bench", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_default_queue=kind,
        task_default_delivery_mode="transient",
        worker_prefetch_multiplier=64,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    base: Any = Task
    if kind == "resilient":
        app.conf.resilience_store_url = store_url
        # The failures of a benchmark are as old as it likes.
        app.conf.resilience_failed_keep_days = app.conf.resilience_failed_max = None
        Resilience(app)
        base = ResilientTask

    def nothing() -> None:
        return None

    def failing() -> None:
        raise ValueError("always")

    task: Any = app.task
    task(base=base, name="nothing", shared=False)(nothing)
    task(base=base, name="failing", shared=False)(failing)
    return app


if "BENCH_KIND" in os.environ:
    app = make_app(
        os.environ["BENCH_BROKER_URL"],
        os.environ["BENCH_KIND"],
        os.environ.get("BENCH_STORE_URL"),
    )
