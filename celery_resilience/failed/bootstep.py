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

from billiard.context import Process
from celery import bootsteps, platforms
from celery.utils import log as celery_log
from kombu.utils.compat import detect_environment

from celery_resilience.failed.collector import BATCH

logger = logging.getLogger("celery_resilience.failed")

#: Seconds between two passes, but where one has moved a whole batch: each costs a
#: connection and a transaction, so that the worker beside it would feel many.
PAUSE_S = 1.0

#: Seconds between two looks at whether the collector lives.
LOOK_S = 1.0

#: Seconds until another one is started, doubled up to the last; a collector that
#: has lived longer than that begins anew.
RESTART_S = 1.0
MAX_RESTART_S = 60.0

#: Seconds that a collector has for its batch when the worker stops.
STOP_S = 5.0


class CollectorStep(bootsteps.StartStopStep):
    """Runs a collector beside the worker, as long as the worker lives."""

    label = "Resilience: collector"
    name = "celery_resilience.failed.bootstep.CollectorStep"
    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self._keeper: CollectorKeeper | None = None
        self._timer: Any = None
        self._entry: Any = None
        super().__init__(worker, **kwargs)

    def start(self, worker: Any) -> None:
        """Fork the collector, before the pool and its connections exist."""
        self._keeper = CollectorKeeper(
            lambda: CollectorProcess(worker.app), clock=time.monotonic
        )
        self._keeper.look()
        self._timer = worker.timer
        self._entry = self._timer.call_repeatedly(LOOK_S, self._keeper.look)

    def stop(self, worker: Any) -> None:
        """Let it finish its batch, if its store takes it in time."""
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None
        if self._keeper is not None:
            self._keeper.stop()

    def terminate(self, worker: Any) -> None:
        """A cold stop does not wait for tasks, but the collector is quick."""
        self.stop(worker)


class CollectorKeeper:
    """
    Starts a collector, and another one when it has ended.

    Args:
        make: Makes a process that can be started.
        clock: Monotonic seconds.
    """

    def __init__(self, make: Callable[[], Any], *, clock: Callable[[], float]) -> None:
        self._make = make
        self._clock = clock
        self._process: Any = None
        self._started_at = 0.0
        self._due_at = 0.0
        self._wait_s = RESTART_S
        self._is_stopped = False

    @property
    def _may_start(self) -> bool:
        """A copy of this process would run its greenlets too, once there are some."""
        return not self._started_at or detect_environment() == "default"

    def look(self) -> None:
        """Start one where there is none and it is time; called every second or so."""
        if self._process is not None and not self._process.is_alive():
            self._ended(self._process)
        if self._process is None and not self._is_stopped and self._may_start:
            now = self._clock()
            if now >= self._due_at:
                self._started_at = now
                self._process = self._make()
                self._process.start()

    def stop(self) -> None:
        """End it: at first by asking, then by force; what it took is not lost."""
        self._is_stopped = True
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        # Not `join`: it would look at a pipe that the collector has closed with all
        # that it had inherited, and then wait without a limit.
        _wait(STOP_S, lambda: not process.is_alive())
        if process.is_alive():
            logger.warning(
                "the collector did not end within %.0f s, and is killed: what it "
                "was collecting is collected later",
                STOP_S,
            )
            os.kill(process.pid, signal.SIGKILL)
            _wait(STOP_S, lambda: not process.is_alive())

    def _ended(self, process: Any) -> None:
        now = self._clock()
        if now - self._started_at > MAX_RESTART_S:
            self._wait_s = RESTART_S
        logger.error(
            "the collector (pid %s) ended with exit code %s; %s",
            process.pid,
            process.exitcode,
            f"another one starts in {self._wait_s:.0f} s"
            if self._may_start
            else "start the worker again, or `celery -A app failed collect`",
        )
        self._process = None
        self._due_at = now + self._wait_s
        self._wait_s = min(self._wait_s * 2, MAX_RESTART_S)


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
        if detect_environment() == "default":
            # Else there are those of the loop that this process runs in too.
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
    repeat(lambda: failed.collect().documents, should_stop, pause=_wait)


def repeat(
    collect: Callable[[], int],
    should_stop: Callable[[], bool],
    *,
    pause: Callable[[float, Callable[[], bool]], None],
) -> None:
    """
    Make passes, also after one that failed, until *should_stop*.

    Args:
        collect: Makes one; returns how many documents it moved.
        should_stop: Asked between passes, and by *pause*.
        pause: Waits so many seconds, or until *should_stop*.
    """
    while not should_stop():
        try:
            moved = collect()
        except Exception as exc:
            logger.warning("cannot collect: %s: %s", type(exc).__name__, exc)
            moved = 0
        if moved < BATCH:
            pause(PAUSE_S, should_stop)


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(InterruptedError):
        while time.monotonic() < end and not should_stop():
            time.sleep(0.1)
