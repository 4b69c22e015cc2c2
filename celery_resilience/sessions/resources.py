"""`resource(open, close, scope=)`: what a task or a child opens lazily, closed in time."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakSet

from celery_resilience.errors import ConfigurationError
from celery_resilience.sessions.run import Run, current

logger = logging.getLogger("celery_resilience.sessions")

Thing = TypeVar("Thing")

Scope = Literal["task", "child"]

_SCOPES = ("task", "child")


class Resource(Generic[Thing]):
    """
    Something that is opened when it is first asked for, and closed in time.

    Call it to have the thing: `client = http()`. What a parent process has opened is
    not used, nor closed, in a forked child, which opens its own.

    Args:
        open: Opens it.
        close: Closes it; what it raises is logged.
        scope: "task": each run has its own, closed when its body has ended, before the
            result is stored. "child": each process has one, which its threads share,
            closed when the process ends.
    """

    def __init__(
        self,
        open: Callable[[], Thing],
        close: Callable[[Thing], object],
        scope: Scope = "task",
    ) -> None:
        if scope not in _SCOPES:
            raise ConfigurationError(
                f'resource: scope must be "task" or "child", not {scope!r}'
            )
        for name, given in (("open", open), ("close", close)):
            if not callable(given):
                raise ConfigurationError(
                    f"resource: {name} must be callable, not {given!r}"
                )
        self._open = open
        self._close = close
        self._scope = scope
        self._lock = threading.RLock()
        self._shared: tuple[Thing] | None = None
        self._of_parents: list[Thing] = []
        _known.add(self)
        _hear_of_ends()

    def __call__(self) -> Thing:
        """The thing, opened if it is not; outside of a run, the process's."""
        run = current.get()
        if self._scope == "task" and run is not None and run.is_running:
            for resource, thing in run.resources:
                if resource is self:
                    return thing  # type: ignore[no-any-return]  # its own
            thing = self._open()
            run.resources.append((self, thing))
            return thing
        with self._lock:
            if self._shared is None:
                self._shared = (self._open(),)
                _shared.append(self)
            return self._shared[0]

    def close(self) -> None:
        """Close this process's, if it is open; the next call opens another."""
        with self._lock:
            shared, self._shared = self._shared, None
            if shared is not None:
                self._end(shared[0])

    def _after_fork(self) -> None:
        # The lock may have been held as the parent forked.
        self._lock = threading.RLock()
        if self._shared is not None:
            self._of_parents.append(self._shared[0])
            self._shared = None

    def _end(self, thing: Thing) -> None:
        try:
            self._close(thing)
        except Exception:
            logger.exception("a resource could not be closed")


#: Of this process, in the order in which they were opened.
_shared: list[Resource[Any]] = []


def close_all(run: Run) -> None:
    """Close what a run has opened, the last one first."""
    while run.resources:
        resource, thing = run.resources.pop()
        resource._end(thing)


def close_shared() -> None:
    """Close what this process has opened, the last one first."""
    while _shared:
        _shared.pop().close()


_known: WeakSet[Resource[Any]] = WeakSet()
_hears = False


def _hear_of_ends() -> None:
    """Hear of this process's end, and of forks; from the first resource on."""
    global _hears
    if not _hears:
        _hears = True
        atexit.register(close_shared)
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    _shared.clear()
    for resource in list(_known):
        resource._after_fork()
