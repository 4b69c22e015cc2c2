"""A Django project of three files in a folder, and the processes of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import warm_python
from polling import eventually
from services import kill_group

Done = subprocess.CompletedProcess[str]

MANAGE = """
    import os, sys
    from django.core.management import execute_from_command_line

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
    execute_from_command_line(sys.argv)
    """

SETTINGS = """
    import json, os
    from pathlib import Path

    FOLDER = Path(__file__).parent.parent
    SECRET_KEY = "none"
    USE_TZ = True
    INSTALLED_APPS = ["shop", "celery_resilience.django"]
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3", "NAME": FOLDER / "shop.sqlite3"
        }
    }
    CELERY_BROKER_URL = "filesystem://"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(FOLDER / "queue"),
        "data_folder_out": str(FOLDER / "queue"),
        "control_folder": str(FOLDER / "control"),
    }
    CELERY_RESILIENCE_STORE_URL = f"sqlite:///{FOLDER}/failed.sqlite3"
    globals().update(json.loads(os.environ.get("SHOP_SETTINGS", "{}")))
    """

PACKAGE = "from .celery import app as celery_app"

APP = """
    import os
    from celery import Celery

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
    app = Celery("shop")
    app.config_from_object("django.conf:settings", namespace="CELERY")
    app.autodiscover_tasks()
    """

TASKS = """
    from celery import shared_task
    from django.conf import settings
    from celery_resilience import ResilientTask

    @shared_task(base=ResilientTask)
    def ship(number):
        address = settings.FOLDER / "address"
        with open(settings.FOLDER / "shipped", "a") as shipped:
            shipped.write(f"{number} to {address.read_text()}\\n")
    """


class Project:
    """
    The Django project "shop", on the filesystem broker and an SQLite store.

    Args:
        folder: Where its `manage.py` is put.
        sources: Other sources than those above, by the name of the module in `shop/`.
    """

    def __init__(self, folder: Path, **sources: str) -> None:
        self.folder = folder
        for name in ("shop", "queue"):
            (folder / name).mkdir(parents=True)
        (folder / "manage.py").write_text(textwrap.dedent(MANAGE))
        files = {
            "__init__": PACKAGE,
            "settings": SETTINGS,
            "celery": APP,
            "tasks": TASKS,
            **sources,
        }
        for name, source in files.items():
            self.write(name, source)

    def write(self, name: str, source: str) -> None:
        """Give the project another module."""
        (self.folder / "shop" / f"{name}.py").write_text(textwrap.dedent(source))

    def failed_messages(self) -> int:
        """Failed tasks that nobody has collected yet."""
        return sum(1 for _ in (self.folder / "queue").glob("*.shop.failed.msg"))

    def start(
        self, *command: str, settings: dict[str, Any] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start Python in the project's folder; *settings* beat those of the file."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return warm_python.popen(
            [sys.executable, *command],
            imported=warm_python.DJANGO,
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "",
                "C_FORCE_ROOT": "1",
                "SHOP_SETTINGS": json.dumps(settings or {}),
            },
            **options,
        )

    def python(self, *command: str, **options: Any) -> Done:
        """Run Python to its end."""
        return ended(self.start(*command, **options))

    def manage(self, *words: str, **options: Any) -> Done:
        """Run `manage.py …` to its end."""
        return self.python("manage.py", *words, **options)

    def script(self, source: str, **options: Any) -> Done:
        """Run a script as `manage.py` would: the project's settings are there."""
        begin = (
            "import os, django\n"
            "os.environ.setdefault('DJANGO_SETTINGS_MODULE', 'shop.settings')\n"
            "django.setup()\n"
        )
        (self.folder / "script.py").write_text(begin + textwrap.dedent(source))
        return self.python("script.py", **options)

    @contextlib.contextmanager
    def worker(
        self, *flags: str, settings: dict[str, Any] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """A prefork worker, unless *flags* say another, ended when the block is."""
        log = self.folder / "worker.log"
        words = ("worker", "--concurrency", "1", "--without-mingle", *flags)
        with open(log, "a") as file:
            process = self.start(
                *("-m", "celery", "-A", "shop", *words, "--loglevel", "INFO"),
                settings=settings,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            eventually(
                lambda: "ready." in log.read_text() or process.poll() is not None,
                what="the worker is ready",
            )
            assert "ready." in log.read_text(), log.read_text()
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            kill_group(process)


def ended(process: subprocess.Popen[str], within_s: float = 60) -> Done:
    """Wait for a process, and keep what it said."""
    try:
        out, err = process.communicate(timeout=within_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
