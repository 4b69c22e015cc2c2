"""Lets a suspect run alone in its worker.

In the main process, between Celery and the pool. While no message is marked
as a suspect, a request passes with one look at a flag.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import RLock
from typing import Any

logger = logging.getLogger("celery_resilience.crashes")


def at_once(release: Callable[[], None]) -> None:
    """Hand over what may go in the thread that has found it out."""
    release()


class Gate:
    """
    Admits requests to the pool, suspects one at a time and with nobody beside them.

    A suspect waits until what runs has ended; what arrives meanwhile waits for
    the suspect. Tasks that are not resilient pass, unseen.

    Args:
        execute: Hands a request to the pool again; it comes back to `admit`.
        start: Calls what it is given, which executes one request after the other,
            where that may block: some pools let whoever hands a request over wait
            for a free slot, and free slots only when what a run ended with has
            been taken in.
    """

    def __init__(
        self,
        execute: Callable[[Any], None],
        *,
        start: Callable[[Callable[[], None]], None] = at_once,
    ) -> None:
        self._execute = execute
        self._start = start
        self._lock = RLock()
        self._running: set[Any] = set()
        self._suspects: deque[Any] = deque()
        self._others: deque[Any] = deque()
        self._alone: Any = None
        #: Chosen by `_next`, and on their way to the pool.
        self._released: set[Any] = set()
        self._is_releasing = False
        self._is_open = True

    def admit(self, request: Any) -> bool:
        """Whether *request* may go to the pool now; if not, it goes later."""
        if self._is_open and not request.runs_alone:
            self._running.add(request)
            return True
        with self._lock:
            if request in self._released:
                self._released.discard(request)
                return True
            # Closed before it looks at what runs, while `left` looks at the flag
            # after: one of the two sees the other.
            self._is_open = False
            if request.runs_alone and not self._is_busy():
                self._alone = request
                self._running.add(request)
                return True
            (self._suspects if request.runs_alone else self._others).append(request)
        self._advance()
        return False

    def left(self, request: Any) -> None:
        """*request* has ended, or was given up."""
        self._running.discard(request)
        if self._is_open:
            return
        with self._lock:
            self._released.discard(request)
            if request is self._alone:
                self._alone = None
        self._advance()

    def waiting(self) -> set[Any]:
        """What was not given to the pool yet."""
        with self._lock:
            return {*self._suspects, *self._others}

    def clear(self) -> None:
        """Forget what waits: the broker delivers it again."""
        with self._lock:
            self._suspects.clear()
            self._others.clear()
            self._is_open = self._alone is None

    def _is_busy(self) -> bool:
        return bool(self._running or self._suspects or self._others)

    def _advance(self) -> None:
        """Release what may go, unless somebody does already."""
        with self._lock:
            if self._is_releasing or not self._may_advance():
                return
            self._is_releasing = True
        self._start(self._release)

    def _may_advance(self) -> bool:
        if self._is_open or self._alone is not None:
            return False
        return not (self._suspects and self._running)

    def _release(self) -> None:
        """Execute what may go, until somebody must be waited for."""
        while (request := self._next()) is not None:
            try:
                self._execute(request)
            except Exception:
                # The pool takes nothing any more: the worker ends.
                logger.exception("%s could not be handed to the pool", request)
                self.left(request)

    def _next(self) -> Any:
        """Choose who goes next; None ends the releasing."""
        with self._lock:
            if self._may_advance():
                if self._suspects:
                    request = self._alone = self._suspects.popleft()
                elif self._others:
                    request = self._others.popleft()
                else:
                    self._is_open = True
                    request = None
                if request is not None:
                    self._running.add(request)
                    self._released.add(request)
                    return request
            self._is_releasing = False
            return None
