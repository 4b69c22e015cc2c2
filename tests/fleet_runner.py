"""Runs real workers of the test app in subprocesses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import warm_python
from apps.fleet import make_app
from celery import Celery
from celery.result import AsyncResult
from polling import eventually
from services import exit_code, kill_group

from celery_resilience import FailedTasks

APPS = Path(__file__).parent / "apps"
CELERY = [sys.executable, "-m", "celery"]


class Fleet:
    """
    One app on one broker, with workers that the test starts and ends.

    Attributes:
        app: To send tasks with.
        folder: The working directory of the workers.
    """

    def __init__(
        self, folder: Path, conf: dict[str, Any], *, is_plain: bool = False
    ) -> None:
        self.folder = folder
        self.conf = conf
        self.is_plain = is_plain
        self.app: Celery = make_app(conf, is_plain=is_plain)
        self.ledger = folder / "ledger.jsonl"
        self.workers: list[Worker] = []
        folder.mkdir(parents=True, exist_ok=True)

    def worker(self, *flags: str, **options: Any) -> Worker:
        """Start a worker and wait until it is ready."""
        worker = Worker(self, *flags, name=f"w{len(self.workers)}", **options)
        self.workers.append(worker)
        worker.start()
        return worker

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Send a task by its name."""
        return self.app.tasks[name].apply_async(args, **options)

    def notes(self, event: str | None = None) -> list[list[Any]]:
        """The ledger's lines, of one event or all; not one that is being written."""
        if not self.ledger.exists():
            return []
        written, _, _ = self.ledger.read_text().rpartition("\n")
        lines = [json.loads(line) for line in written.splitlines()]
        return [line for line in lines if event is None or line[0] == event]

    def runs(self, task_id: str) -> int:
        """How often a task's body has started."""
        return sum(
            1
            for line in self.notes()
            if line[1:2] == [task_id] and line[0] in self.app.tasks
        )

    @property
    def failed(self) -> FailedTasks:
        """The app's failed tasks."""
        return FailedTasks(self.app)

    def records(self, **words: Any) -> dict[str, Any]:
        """The failed tasks by task id, as public JSON."""
        words.setdefault("state", "all")
        found = self.failed.list(limit=None, **words)
        return {record.to_dict()["task_id"]: record.to_dict() for record in found}

    def record_of(self, task_id: str, within_s: float = 30) -> dict[str, Any]:
        """One failed task, once it is kept."""
        return eventually(
            lambda: self.records().get(task_id),
            within_s=within_s,
            what=f"a record of {task_id}",
            every_s=0.2,
        )

    def command(
        self, *words: str, kill_at: str = "", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `celery -A fleet_worker …` to its end."""
        options.setdefault("timeout", 120)
        return warm_python.run(
            [*CELERY, "-A", "fleet_worker", *words],
            cwd=self.folder,
            env=self.environment(**sabotage_environment(kill_at)),
            **options,
        )

    @contextlib.contextmanager
    def start_commands(
        self, *commands: tuple[str, ...]
    ) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Run several `celery -A fleet_worker …` at once."""
        processes = [
            warm_python.popen(
                [*CELERY, "-A", "fleet_worker", *words],
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for words in commands
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process that uses the app."""
        return {
            **os.environ,
            # A test may put an app of its own into the folder.
            "PYTHONPATH": f"{self.folder}:{APPS}",
            "PYTHONUNBUFFERED": "1",
            "C_FORCE_ROOT": "1",
            "FLEET_CONF": json.dumps(self.conf),
            "FLEET_LEDGER": str(self.ledger),
            "FLEET_PLAIN": "1" if self.is_plain else "",
            **more,
        }

    def close(self) -> None:
        """End every worker, by its pid."""
        for worker in self.workers:
            worker.kill()
        self.app.close()


class Worker:
    """A worker in a process group of its own."""

    def __init__(
        self,
        fleet: Fleet,
        *flags: str,
        name: str,
        pool: str = "prefork",
        concurrency: int = 2,
        kill_at: str = "",
    ) -> None:
        self.fleet = fleet
        self.name = name
        self.log = fleet.folder / f"{name}.log"
        self.pid_file = fleet.folder / f"{name}.pid"
        self.process: subprocess.Popen[bytes] | None = None
        #: One for each start since the last kill; not reaped, see `exit_code`.
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = sabotage_environment(kill_at)
        self._command = [
            *CELERY,
            *("-A", "fleet_worker", "worker"),
            *("--hostname", f"{name}@test"),
            *("--pool", pool),
            *("--concurrency", str(concurrency)),
            *("--loglevel", "INFO"),
            "--without-gossip",
            "--without-mingle",
            *flags,
        ]

    def start(self, *, ready: bool = True) -> None:
        """Start it, for the first time or again."""
        before = self.text.count("ready.")
        with open(self.log, "ab") as log:
            self.process = warm_python.popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.fleet.folder,
                env=self.fleet.environment(**self._environment),
                start_new_session=True,
            )
        self._processes.append(self.process)
        self.pid_file.write_text(str(self.process.pid))
        if ready:
            eventually(
                lambda: self.text.count("ready.") > before or not self.is_alive,
                within_s=60,
                what=f"{self.name} is ready",
            )
            assert self.text.count("ready.") > before, self.text

    @property
    def pid(self) -> int:
        """The main process."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """The main process has not ended."""
        return self.process is not None and exit_code(self.process) is None

    @property
    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def children(self) -> list[int]:
        """The pids of the pool's processes."""
        return [child.pid for child in psutil.Process(self.pid).children()]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process."""
        os.kill(self.pid, number)

    def stop(self, within_s: float = 60) -> int:
        """Stop it warm; returns its exit code."""
        if self.is_alive:
            self.signal(signal.SIGTERM)
        return self.wait(within_s)

    def wait(self, within_s: float = 60) -> int:
        """Wait until it has ended; returns its exit code."""
        process = self.process
        assert process is not None
        (code,) = eventually(
            lambda: () if (code := exit_code(process)) is None else (code,),
            within_s=within_s,
            what=f"{self.name} has ended",
        )
        return code

    def kill(self) -> None:
        """Kill it with its children, and those that its former starts have left."""
        for process in self._processes:
            kill_group(process)
        self._processes.clear()

    def outcomes(self) -> Counter[str]:
        """What it said when it stopped, "received" included."""
        lines = re.findall(r"stopped after .*?: (\d+) deliveries(.*)", self.text)
        counts: Counter[str] = Counter()
        for received, outcomes in lines:
            counts["received"] += int(received)
            for number, outcome in re.findall(r"(\d+) (\w+)", outcomes):
                counts[outcome] += int(number)
        return counts


def sabotage_environment(kill_at: str) -> dict[str, str]:
    """Let a process die at one point; see `apps/sabotage.py`."""
    return {
        "FLEET_SABOTAGE": "sabotage",
        "FLEET_KILL_AT": kill_at,
        # Claims of a killed command are sent by others sooner than in a minute.
        "FLEET_STALE_S": "2",
    }


@contextlib.contextmanager
def fleet_on(
    folder: Path, conf: dict[str, Any], *, is_plain: bool = False
) -> Iterator[Fleet]:
    """A fleet for the length of a block."""
    fleet = Fleet(folder, conf, is_plain=is_plain)
    try:
        yield fleet
    finally:
        fleet.close()
