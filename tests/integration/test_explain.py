"""`celery -A shop resilience explain` for apps that have not adopted anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from django_project import Project

PLAIN = """
from celery import Celery, Task

app = Celery("shop", broker="filesystem://")


class Own(Task):
    pass


@app.task(acks_late=True, time_limit=30)
def ship():
    pass


@app.task(base=Own)
def mail():
    pass
"""

DJANGO_TASKS = """
    from celery import shared_task
    from celery_resilience import ResilientTask

    @shared_task(base=ResilientTask, acks_late=True)
    def ship(number): ...

    @shared_task
    def mail(number): ...
    """


def explain(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in the folder of the app."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "celery", "-A", "shop", "resilience", "explain"),
            *words,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_app_of_plain_celery_is_explained(tmp_path: Path) -> None:
    """As documents and as a table; nothing is sent, and no file is made."""
    (tmp_path / "shop.py").write_text(PLAIN)

    documents = explain(tmp_path, "-o", "json")
    shown = explain(tmp_path)

    assert documents.returncode == 0, documents.stderr
    found = {task["task"]: task for task in json.loads(documents.stdout)}
    assert set(found) == {"shop.mail", "shop.ship"}
    assert found["shop.ship"]["on_failure"] == {"plain": "gone", "resilient": "kept"}
    assert found["shop.ship"]["on_dead_worker"]["plain"] == "lost"
    assert (
        found["shop.mail"]["adopt"] == "class Base(ResilientTask, Own), and base=Base"
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[1].split()[:3] == ["shop.mail", "Own", "early"]
    assert {path.name for path in tmp_path.iterdir()} <= {"shop.py", "__pycache__"}


def test_a_django_project_is_explained(tmp_path: Path) -> None:
    """With the tasks of its apps, and the settings of Django's names."""
    project = Project(tmp_path / "project", tasks=DJANGO_TASKS)

    done = explain(project.folder, "-o", "json")

    assert done.returncode == 0, done.stderr
    found = {task["task"]: task for task in json.loads(done.stdout)}
    assert found["shop.tasks.ship"]["is_resilient"] is True
    assert found["shop.tasks.mail"]["adopt"] == "base=ResilientTask"
    assert found["shop.tasks.mail"]["failed_queue"] == "shop.failed"
