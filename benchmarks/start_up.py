"""What importing celery-resilience adds to a process that imports Celery anyway."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.figures import Figure

REPEATS = 15

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


def measure() -> Iterator[Figure]:
    """Import of the package, and of its command module."""
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
