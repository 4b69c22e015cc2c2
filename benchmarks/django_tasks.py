"""
A Django project that the benchmarks run: `celery -A benchmarks.django_tasks worker`.

Plain, Celery's own fixup closes the connection before and after each task.
"""

from __future__ import annotations

import os
from typing import Any

import django
from celery import Celery, Task
from django.conf import settings
from sqlalchemy.engine import make_url

from celery_resilience import Resilience, ResilientTask

#: The name of the task.
TASK = "counting"


def make_app(broker_url: str, kind: str, database_url: str) -> Celery:
    """
    An app of a Django project with one task, which asks its database once.

    Args:
        broker_url: Of a private server.
        kind: "plain" or "resilient".
        database_url: Of a PostgreSQL, as SQLAlchemy has it.
    """
    url = make_url(database_url)
    # Django's own module, which Celery's fixup looks for by the variable.
    os.environ["DJANGO_SETTINGS_MODULE"] = "django.conf.global_settings"
    settings.configure(
        SECRET_KEY="none",
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": url.host,
                "PORT": url.port,
                "USER": url.username,
                "PASSWORD": url.password,
                "NAME": url.database,
                "CONN_MAX_AGE": None,
            }
        },
    )
    django.setup()
    app = Celery("bench", broker=broker_url)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_default_queue=kind,
        worker_prefetch_multiplier=64,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    base: Any = Task
    if kind == "resilient":
        Resilience(app)
        base = ResilientTask

    def counting() -> None:
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    task: Any = app.task
    task(base=base, name=TASK, shared=False)(counting)
    return app


if "BENCH_KIND" in os.environ:
    app = make_app(
        os.environ["BENCH_BROKER_URL"],
        os.environ["BENCH_KIND"],
        os.environ["BENCH_DATABASE_URL"],
    )
