"""The collector as a process of a worker's own, as `-B` embeds beat."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from billiard.process import Process
from celery import bootsteps, platforms
from celery.utils import log as celery_log

logger = logging.getLogger("celery_resilience.failed")

#: Seconds between two passes while the failed queues are empty.
IDLE_S = 1.0


class CollectorStep(bootsteps.StartStopStep):
    """Starts a collector with the worker, and ends it with the worker."""

    label = "Resilience: collector"
    name = "celery_resilience.failed.bootstep.CollectorStep"
    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self._process: Any = None
        super().__init__(worker, **kwargs)

    def start(self, worker: Any) -> None:
        """Fork the collector, before the pool and its connections exist."""
        self._process = CollectorProcess(worker.app)
        self._process.start()

    def stop(self, worker: Any) -> None:
        """Let it finish its batch."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()

    def terminate(self, worker: Any) -> None:
        """A cold stop does not wait for tasks, but the collector is quick."""
        self.stop(worker)


class CollectorProcess(Process):
    """
    Collects until it is told to stop, or its worker is gone.

    Args:
        app: The Celery app.
    """

    def __init__(self, app: Any) -> None:
        super().__init__(name="Collector")
        self._app = app
        self._parent = os.getpid()
        self.daemon = True

    def run(self) -> None:
        """Collect until SIGTERM; a batch that was begun is finished."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        standard: Any = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
        open_files: Any = [*standard, *_logger_files()]
        platforms.close_open_fds(open_files)
        stopping = False

        def stop(*_: Any) -> None:
            nonlocal stopping
            stopping = True

        signal.signal(signal.SIGTERM, stop)
        collect_forever(self._app, lambda: stopping or os.getppid() != self._parent)


def _logger_files() -> list[Any]:
    files: Any = celery_log.iter_open_logger_fds  # type: ignore[attr-defined]
    return list(files())


def collect_forever(app: Any, should_stop: Callable[[], bool]) -> None:
    """
    Collect, and go on collecting after an error, until *should_stop*.

    Args:
        app: The Celery app.
        should_stop: Asked between batches, at least once a second.
    """
    from celery_resilience.failed.api import FailedTasks

    failed = FailedTasks(app)
    while not should_stop():
        try:
            moved = failed.collect().documents
        except Exception as exc:
            logger.warning("cannot collect: %s: %s", type(exc).__name__, exc)
            moved = 0
        if not moved:
            _wait(IDLE_S, should_stop)


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(InterruptedError):
        while time.monotonic() < end and not should_stop():
            time.sleep(0.1)
