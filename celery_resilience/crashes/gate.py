"""Lets a suspect run alone in its worker.

In the main process, between Celery and the pool. While no message is marked
as a suspect, a request passes with one look at a flag.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import RLock
from typing import Any


class Gate:
    """
    Admits requests to the pool, suspects one at a time and with nobody beside them.

    A suspect waits until what runs has ended; what arrives meanwhile waits for
    the suspect. Tasks that are not resilient pass, unseen.

    Args:
        execute: Hands a request to the pool again; it comes back to `admit`.
    """

    def __init__(self, execute: Callable[[Any], None]) -> None:
        self._execute = execute
        self._lock = RLock()
        self._running: set[Any] = set()
        self._suspects: deque[Any] = deque()
        self._others: deque[Any] = deque()
        self._alone: Any = None
        self._released: Any = None
        self._is_open = True

    def admit(self, request: Any) -> bool:
        """Whether *request* may go to the pool now; if not, it goes later."""
        if self._is_open and not request.runs_alone:
            self._running.add(request)
            return True
        with self._lock:
            if self._released is request:
                self._released = None
                self._running.add(request)
                return True
            self._is_open = False
            (self._suspects if request.runs_alone else self._others).append(request)
            self._advance()
            return False

    def left(self, request: Any) -> None:
        """*request* has ended, or was given up."""
        self._running.discard(request)
        if self._is_open:
            return
        with self._lock:
            if request is self._alone:
                self._alone = None
            self._advance()

    def clear(self) -> None:
        """Forget what waits: the broker delivers it again."""
        with self._lock:
            self._suspects.clear()
            self._others.clear()
            self._is_open = self._alone is None

    def _advance(self) -> None:
        while self._alone is None and not self._is_open:
            if self._suspects:
                if self._running:
                    return
                self._alone = self._suspects.popleft()
                self._release(self._alone)
            elif self._others:
                self._release(self._others.popleft())
            else:
                self._is_open = True

    def _release(self, request: Any) -> None:
        self._released = request
        self._execute(request)
