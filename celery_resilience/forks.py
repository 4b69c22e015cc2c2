"""What other threads hold when a process is forked, a child would wait for for ever.

It has one thread, and the locks that the others held are locked in it for good. SQLite
has some for each connection and some for the whole process. kombu has one for each
cached property of its classes, for all connections of a process
(``kombu/utils/objects.py``, kombu 5.7): a child whose main process asked for the length
of a queue as it was forked could publish nothing, and its first retry hung. Python makes
the locks of log handlers anew in a child, but not those of the streams that they write
to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

#: Seconds that a fork waits for the threads that are inside.
FORK_WAITS_S = 10.0

#: Seconds that a fork waits for our own threads, which may wait for a server.
THREADS_WAIT_S = 1.0

#: Seconds that a fork waits for all log handlers.
HANDLERS_WAIT_S = 2.0


class ForkGate:
    """
    Lets threads in, or the process fork.

    Args:
        fork_waits_s: Seconds after which it is forked all the same; who is inside then
            is waited for no more, until it has left.
    """

    def __init__(self, fork_waits_s: float = FORK_WAITS_S) -> None:
        self._fork_waits_s = fork_waits_s
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._close,
                after_in_parent=self._open,
                after_in_child=self._reset,
            )

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This process is not forked meanwhile; waits for a fork to end."""
        visit = self.enter()
        try:
            yield
        finally:
            self.leave(visit)

    def enter(self) -> object:
        """
        This process is not forked until `leave`; waits for a fork to end.

        Returns:
            What `leave` is given.
        """
        own, visits = threading.get_ident(), self._visits
        with self._changed:
            # A fork waits for a thread that is inside, which so does not wait for it.
            while self._forks and own not in visits:
                self._changed.wait()
            visits[own] = visits.get(own, 0) + 1
        return visits

    def leave(self, visit: object) -> None:
        """
        The process may be forked again.

        Args:
            visit: What `enter` returned.
        """
        own, visits = threading.get_ident(), self._visits
        # A child that was forked in between has its own.
        if visit is not visits:
            return
        with self._changed:
            visits[own] -= 1
            if not visits[own]:
                del visits[own]
                self._slow.discard(own)
                if self._forks:
                    self._changed.notify_all()

    def _close(self) -> None:
        own, slow = threading.get_ident(), self._slow
        with self._changed:
            self._forks += 1
            if not self._changed.wait_for(
                lambda: self._visits.keys() - slow <= {own}, timeout=self._fork_waits_s
            ):
                slow |= self._visits.keys() - {own}

    def _open(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._visits: dict[int, int] = {}
        self._slow: set[int] = set()
        self._forks = 0


class HandlersHeld:
    """
    Holds every log handler while the process is forked: no thread writes meanwhile.

    Attributes:
        is_on: It does.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._held: list[Any] = []
        if not hasattr(os, "register_at_fork"):
            return
        os.register_at_fork(
            before=self._hold,
            after_in_parent=self._release,
            after_in_child=self._forget,
        )

    def _hold(self) -> None:
        if not self.is_on:
            return
        end = time.monotonic() + HANDLERS_WAIT_S
        for handler in _handlers():
            lock = handler.lock
            if lock and lock.acquire(timeout=max(0.0, end - time.monotonic())):
                self._held.append(lock)

    def _release(self) -> None:
        while self._held:
            self._held.pop().release()

    def _forget(self) -> None:
        # They are another thread's in it, and Python has made new ones.
        self._held = []


def _handlers() -> set[logging.Handler]:
    known = list(logging.root.manager.loggerDict.values())
    loggers = [logging.root, *(it for it in known if isinstance(it, logging.Logger))]
    return {handler for logger in loggers for handler in logger.handlers}


# The last that is registered is the first before a fork: a thread that is waited for
# within SQLite may log.
_handlers_held = HandlersHeld()

#: SQLite's, of this process.
sqlite_gate = ForkGate()

#: That of our own threads, whatever they do. The last that is registered, it is closed
#: first: a thread that is waited for may use SQLite.
thread_gate = ForkGate(THREADS_WAIT_S)


def hold_handlers_at_forks() -> None:
    """From now on, in this process and its children."""
    _handlers_held.is_on = True
