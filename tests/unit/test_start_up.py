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
        from types import SimpleNamespace
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
