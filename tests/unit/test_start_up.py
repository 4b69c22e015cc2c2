"""What a worker's start imports: each library costs time, and memory in every child."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

#: What an app with a SQLite store has no use for.
UNUSED = [
    "pybreaker",
    "redis",
    "sqlalchemy.orm",
    "sqlalchemy.dialects.mysql",
    "sqlalchemy.dialects.postgresql",
]


@pytest.mark.parametrize("unused", UNUSED)
def test_a_library_is_imported_where_it_is_used(tmp_path: Path, unused: str) -> None:
    """Neither for its exceptions nor for another database's words."""
    source = """
        import sys
        from celery import Celery
        from celery_resilience import ResilientTask
        from celery_resilience.install import installation_of
        from celery_resilience.worker import WorkerSetup

        app = Celery("shop", broker="filesystem://", task_cls=ResilientTask)
        app.conf.resilience_store_url = f"sqlite:///{sys.argv[1]}"

        @app.task
        def ship(): ...

        installation = installation_of(app)
        installation.check_store()
        installation.failed_store().stats()
        installation.streams
        print(sys.argv[2] in sys.modules)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), str(tmp_path / "s.db"), unused],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("False\n", "")


#: What a process that only sends has no use for, but for what Celery imports itself.
WORKERS_ONLY = [
    "billiard.pool",
    "celery.app.trace",
    "celery.concurrency.asynpool",
    "celery.concurrency.solo",
    "celery.worker",
    "celery.worker.request",
    "celery_resilience.failure",
    "celery_resilience.outcome",
    "kombu.transport.virtual",
]

IMPORTS = "from celery_resilience import Resilience, ResilientTask"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", IMPORTS),
        (
            "from celery import Celery; Celery('plain').tasks",
            f"""
            {IMPORTS}

            app = Celery("shop")
            Resilience(app)

            @app.task(base=ResilientTask)
            def ship(): ...

            ship.name
            """,
        ),
    ],
    ids=["import", "app"],
)
def test_a_sender_imports_nothing_of_a_workers(before: str, after: str) -> None:
    """Neither its pools and requests, nor the transports of a broker that it has not."""
    source = f"""
import sys
{textwrap.dedent(before)}
celerys_own = set(sys.modules)
{textwrap.dedent(after)}
print(sorted(set(sys.argv[1:]) & set(sys.modules) - celerys_own))
"""
    done = subprocess.run(
        [sys.executable, "-c", source, *WORKERS_ONLY],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("[]\n", "")
