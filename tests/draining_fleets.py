"""Fleets whose workers are ended while tasks run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fleet_runner import Fleet, Worker
from polling import eventually


def kill_group(worker: Worker, number: signal.Signals) -> None:
    """Send a signal to the worker and all its children, as many supervisors do."""
    os.killpg(worker.pid, number)


def running(fleet: Fleet, *names: str, end: Path, seconds: float = 60) -> list[str]:
    """Send a task of each name, and wait until all run; returns their ids."""
    ids = [fleet.send(name, seconds, str(end)).id for name in names]
    eventually(lambda: all(fleet.runs(id) == 1 for id in ids), what="all run")
    return ids
