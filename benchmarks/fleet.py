"""The app that the benchmarks run: `celery -A benchmarks.fleet worker`."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from celery import Celery, Task
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from celery_resilience import Resilience, ResilientTask

#: What `leaking` leaves behind in its process at each run.
LEAKED_BYTES = 8 << 20

_leaked: list[bytes] = []


@cache
def engine() -> Engine:
    """The database of `querying`, one engine for each process."""
    return create_engine(os.environ["BENCH_DATABASE_URL"])


def make_app(broker_url: str, kind: str, store_url: str | None = None) -> Celery:
    """
    An app with tasks that do nothing, raise, use a session, or leak memory.

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
        app.conf.resilience_log_format = os.environ.get("BENCH_LOG_FORMAT")
        # The failures of a benchmark are as old as it likes.
        app.conf.resilience_failed_keep_days = app.conf.resilience_failed_max = None
        Resilience(app)
        base = ResilientTask

    def nothing() -> None:
        return None

    def failing() -> None:
        raise ValueError("always")

    def querying() -> None:
        with Session(engine()) as session, session.begin():
            session.execute(text("SELECT 1"))

    def leaking() -> None:
        _leaked.append(b"x" * LEAKED_BYTES)

    task: Any = app.task
    for body in (nothing, failing, querying, leaking):
        task(base=base, name=body.__name__, shared=False)(body)
    return app


if "BENCH_KIND" in os.environ:
    app = make_app(
        os.environ["BENCH_BROKER_URL"],
        os.environ["BENCH_KIND"],
        os.environ.get("BENCH_STORE_URL"),
    )
