"""One shop that is open for a day: its folder, outside world, worker and commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self
from urllib.request import Request, urlopen

import psutil  # type: ignore[import-untyped]
from kombu import Connection

from example_project import chaos
from example_project.ledger import Effect, Reader

ROOT = Path(__file__).parents[2]
CHILDREN = 4

#: A worker that logs nothing for so long has probably nothing more to do: longer
#: than the time limits, and than the waits before a retry and another run.
QUIET_S = 2.5
FAILED_COMMAND = (
    *(sys.executable, "-m", "celery", "-A", "example_project.shop"),
    "failed",
)

#: A child that has grown by so much is recycled.
RESILIENT_FLAGS = ("--memory-recycle-mib", "48")

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0

#: A supervisor's patience with a worker that it has told to end.
DEPLOY_TIMEOUT_S = 10.0


class Tally:
    """
    What a shop did, counted from its ledger.

    Attributes:
        counts: How often each line met each effect.
        cents: Money, or a parcel's worth, that each effect came to.
    """

    def __init__(self, path: Path) -> None:
        self.counts: dict[Effect, Counter[int]] = {e: Counter() for e in Effect}
        self.cents: Counter[Effect] = Counter()
        self._reader = Reader(path)

    def read(self) -> int:
        """Count what is new; returns how many effects that is."""
        new = 0
        for entry in self._reader.new_entries():
            self.counts[entry.effect][entry.line_no] += 1
            self.cents[entry.effect] += entry.cents
            new += 1
        return new

    def lines(self, effect: Effect) -> set[int]:
        """The lines that met *effect*."""
        return set(self.counts[effect])

    def twice(self, effect: Effect) -> int:
        """How many lines met *effect* more than once."""
        return sum(1 for count in self.counts[effect].values() if count > 1)

    def doubled(self) -> int:
        """Effects of any kind that happened once more than they should."""
        return sum(
            count - 1
            for counter in self.counts.values()
            for count in counter.values()
            if count > 1
        )


class OpenShop:
    """
    A shop with its own folder, database, address service and bank.

    Args:
        kind: "plain" or "resilient".
        folder: Its own; made here.
        broker_url: Of a private server, or None for files.
    """

    def __init__(self, kind: str, folder: Path, broker_url: str | None) -> None:
        self.kind = kind
        self.folder = folder
        self.release = 1
        self.log = folder / "worker.log"
        self._broker_url = broker_url
        self._service: subprocess.Popen[bytes] | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._service_url = ""
        for name in ("queue", "exchanges", "deaths", "temporary"):
            (folder / name).mkdir(parents=True)
        self.tally = Tally(folder / "ledger.jsonl")
        self.largest_mib = 0
        self._has_deployed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def queue(self) -> str:
        """The queue of the shop's tasks."""
        return "shop" if self.kind == "resilient" else "shop-plain"

    @property
    def environment(self) -> dict[str, str]:
        """Of each of the shop's processes."""
        broker = {"SHOP_BROKER_URL": self._broker_url} if self._broker_url else {}
        # What a shop that was run by hand has set would be another shop's.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SHOP_")}
        return {
            **inherited,
            **broker,
            "SHOP_KIND": self.kind,
            "SHOP_LOG_FORMAT": "logfmt",
            "SHOP_QUEUE": self.queue,
            "SHOP_FOLDER": str(self.folder),
            "SHOP_RELEASE": str(self.release),
            "SHOP_SERVICE_URL": self._service_url,
            "SHOP_MISFORTUNES": "1",
            # What a killed process leaves behind there goes with the shop.
            "TMPDIR": str(self.folder / "temporary"),
            "DJANGO_SETTINGS_MODULE": "example_project.shop.settings",
            "C_FORCE_ROOT": "1",
        }

    def open(self) -> None:
        """Make the database, and start the outside world and the worker."""
        self._service = self._spawn(
            "example_project.service", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._service.stdout is not None
        self._service_url = f"http://127.0.0.1:{int(self._service.stdout.readline())}"
        self.run("-m", "django", "migrate", "--verbosity=0")
        self.start_worker()

    def service(self, words: str) -> None:
        """Tell the address service how it feels: "down=1", "ill=0"."""
        url = f"{self._service_url}/state?{words}"
        urlopen(Request(url, method="POST"), timeout=5).close()

    def start_worker(self) -> None:
        """Start a worker of the present release, and wait until it takes orders."""
        before = self._log_text().count("ready.")
        with self.log.open("ab") as log:
            self._worker = self._spawn(
                *("celery", "-A", "example_project.shop", "worker"),
                *("--concurrency", str(CHILDREN), "--loglevel", "INFO"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
                *(RESILIENT_FLAGS if self.kind == "resilient" else ()),
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._log_text().count("ready.") == before:
            if self._worker.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the worker did not start:\n{self._log_text()}")
            time.sleep(0.05)

    def stopping_worker(self) -> Iterator[None]:
        """Let the worker end what it runs; each step is a moment of waiting."""
        worker = self._worker
        if worker is not None:
            worker.terminate()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while worker.poll() is None and time.monotonic() < deadline:
                yield
            _end(worker)
        self._worker = None

    def take_orders(self, lines: range) -> None:
        """Send the orders of these lines of the file on their way."""
        self._call("import_orders", f"--args=[{lines.start}, {lines.stop - 1}]")

    def report_revenue(self) -> None:
        """Let the shop count its revenue, in the tables of its reports."""
        self._call("report_revenue")

    def reported_cents(self) -> int:
        """What the last report says."""
        with contextlib.closing(
            sqlite3.connect(self.folder / "reports.sqlite3")
        ) as reports:
            (cents,) = reports.execute("SELECT sum(cents) FROM revenue").fetchone()
        return int(cents)

    def _call(self, task: str, *words: str) -> None:
        name = f"example_project.shop.tasks.{task}"
        self.run("-m", "celery", "-A", "example_project.shop", "call", name, *words)

    def closing_the_day(self) -> Iterator[None]:
        """
        Wait until every message has been settled, or is lost.

        A worker that stops warm has ended what it ran and has given back what
        waited, so that an empty queue then is proof.
        """
        while True:
            yield from self.settling()
            yield from self.stopping_worker()
            self.tally.read()
            if not self._waiting():
                return
            self.start_worker()

    def settling(self) -> Iterator[None]:
        """Wait until the worker seems to have nothing more to do."""
        quiet_since, size = time.monotonic(), -1
        while time.monotonic() - quiet_since < QUIET_S:
            yield
            self.tally.read()
            self._weigh()
            is_deploying = self._deploy()
            now = self.log.stat().st_size
            if now != size or is_deploying:
                quiet_since, size = time.monotonic(), now

    def _deploy(self) -> bool:
        """
        Be the supervisor of a worker that was told to end: start the next one.

        Returns:
            Whether it has yet to end.
        """
        worker, told = self._worker, self.folder / "deployed"
        if worker is None or self._has_deployed or not told.exists():
            return False
        if worker.poll() is None:
            if time.time() - told.stat().st_mtime < DEPLOY_TIMEOUT_S:
                return True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        self._has_deployed = True
        self.start_worker()
        return False

    def _weigh(self) -> None:
        """Look how much memory the worker's children have."""
        if self._worker is None or self._worker.poll() is not None:
            return
        with contextlib.suppress(psutil.Error):  # they come and go
            for child in psutil.Process(self._worker.pid).children():
                mib = child.memory_info().rss >> 20
                self.largest_mib = max(self.largest_mib, mib)

    def run(self, *words: str) -> None:
        """
        Run Python to its end.

        Raises:
            RuntimeError: It failed; the message is what it printed.
        """
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")

    def command(self, *words: str) -> None:
        """
        Run `celery -A example_project.shop failed …` as an operator does, on this screen.

        Raises:
            RuntimeError: It failed, and has said why.
        """
        sys.stdout.flush()
        done = subprocess.run(
            [*FAILED_COMMAND, *words],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"failed {' '.join(words)}: exit {done.returncode}")

    def failed(self, *words: str) -> list[dict[str, Any]]:
        """The failed tasks that `failed list` knows, in its public JSON."""
        done = subprocess.run(
            [*FAILED_COMMAND, "list", "-o", "jsonl", "--limit", "10000", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def _waiting(self) -> int:
        """Messages on the shop's queue."""
        if self._broker_url is None:
            return sum(1 for _ in (self.folder / "queue").glob(f"*.{self.queue}.msg"))
        with Connection(self._broker_url) as connection:
            channel: Any = connection.default_channel
            try:
                return int(channel.queue_declare(self.queue, passive=True)[1])
            except connection.channel_errors:
                return 0  # Redis has no empty queues

    def logged_failure(self) -> str:
        """The record of the day's first failure, as the worker has logged it."""
        lines = self._log_text().splitlines()
        return next(it for it in lines if "event=task_failed" in it)

    def killed(self) -> list[tuple[str, int]]:
        """Step and line of each child that was killed."""
        return chaos.deaths(self.folder / "deaths")

    def close(self) -> None:
        """End every process, by its pid."""
        for process in (self._worker, self._service):
            if process is not None:
                _end(process)
        self._worker = self._service = None

    def _spawn(
        self,
        *words: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
        stderr: int | IO[bytes] = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=self.environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is for the demo, which ends them
        )

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end it with its children where it does not."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
