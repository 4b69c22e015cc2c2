"""What celery-resilience adds to the start of a process that imports Celery anyway."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure

REPEATS = 15
WORKER_REPEATS = 5

PROBE = """
import sys, time
{before}
start = time.perf_counter()
{measured}
sys.stdout.write(str(time.perf_counter() - start))
"""

#: What an app has imported by the time it names a base class.
APP = "from celery import Celery, Task; Celery('x').task(lambda: None)"

#: What the `celery` command has imported by the time it looks for sub-commands.
COMMAND = """
import importlib.metadata
importlib.metadata.entry_points = lambda **_: ()
import celery.bin.celery
"""

#: A worker on the filesystem, which ends as soon as it is ready.
WORKER = """
import os, signal, time
from pathlib import Path
from celery import Celery, signals

app = Celery("bench", broker="filesystem://")
for name in ("queue", "control"):
    Path(name).mkdir(exist_ok=True)
app.conf.broker_transport_options = {{
    "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control"
}}
{ours}

@app.task
def nothing(): ...

@signals.worker_ready.connect
def on_ready(**_):
    Path("seconds").write_text(str(time.process_time()))
    os.kill(0, signal.SIGKILL)
"""

OURS = """
from celery_resilience import Resilience, ResilientTask
app.Task = ResilientTask
app.conf.resilience_store_url = "sqlite:///" + os.path.abspath("store.db")
Resilience(app)
"""


def measure() -> Iterator[Figure]:
    """Import of the package, and of its command module; the start of a worker."""
    yield _figure(
        "import over Celery's own",
        APP,
        "from celery_resilience import Resilience, ResilientTask",
        60,
    )
    yield _figure(
        "start of `celery` grows by",
        COMMAND,
        "import celery_resilience.command",
        20,
    )
    plain, ours = (min(_starts(it)) * 1e3 for it in ("", OURS))
    yield Figure(
        "start of a worker with a SQLite store, processor time",
        ours - plain,
        "ms more",
        raw=[f"plain Celery {plain:.0f} ms, ours {ours:.0f} ms"],
    )


def _starts(ours: str) -> list[float]:
    """Seconds of the main process until it is ready."""
    seconds: list[float] = []
    for _ in range(WORKER_REPEATS):
        with tempfile.TemporaryDirectory(prefix="resilience-bench-") as name:
            folder = Path(name)
            (folder / "shop.py").write_text(WORKER.format(ours=ours))
            subprocess.run(
                [sys.executable, "-m", "celery", "-A", "shop", "worker", "-c", "1"],
                cwd=folder,
                env={**os.environ, "C_FORCE_ROOT": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                start_new_session=True,
                timeout=60,
            )
            seconds.append(float((folder / "seconds").read_text()))
    return seconds


def _figure(name: str, before: str, measured: str, at_most: float) -> Figure:
    seconds = [_once(before, measured) for _ in range(REPEATS)]
    return Figure(
        name,
        min(seconds) * 1e3,
        "ms",
        at_most=at_most,
        raw=[f"min {min(seconds) * 1e3:.1f}, max {max(seconds) * 1e3:.1f}"],
    )


def _once(before: str, measured: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(before=before, measured=measured)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
