"""What a run takes of Django's connections, and how they are kept for the next one.

Used once `django.db` is in the process. Read in Django 4.2 to 5.2.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from celery_resilience.sessions import drivers
from celery_resilience.sessions.policy import (
    ATOMIC_LEFT,
    AUTOCOMMIT_OFF,
    NO_EFFECT,
    OPEN_TRANSACTION,
    DriverState,
    Effect,
    Leak,
    effect_of,
    left_by,
    should_ask,
)
from celery_resilience.sessions.run import Run, current
from celery_resilience.sessions.where import taken_at

logger = logging.getLogger("celery_resilience.sessions")


#: Statements of one run whose effects are remembered.
_MANY = 500


class Watched:
    """
    One of Django's connections, as seen by the runs of its thread.

    It is also the wrapper of its statements (`execute_wrappers`).

    Attributes:
        wrapper: Django's, while it lives.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._effects: list[Effect] = []
        self._where = ""
        self._at: float | None = None
        self._run: Run | None = None
        self._back_at: float | None = None

    @property
    def wrapper(self) -> Any:
        """Django's, while it lives."""
        return self._wrapper()

    def __call__(
        self,
        execute: Callable[..., Any],
        sql: Any,
        params: Any,
        many: bool,
        context: Any,
    ) -> Any:
        """Execute a statement, and remember what it does to its session."""
        wrapper = context["connection"]
        run = current.get()
        if run is not None and (self._run is not run or not self._where):
            self._run, self._at = run, time.monotonic()
            self._where = taken_at() or ""
        effect = effect_of(sql) if isinstance(sql, str) else NO_EFFECT
        if effect is not NO_EFFECT and len(self._effects) < _MANY:
            self._effects.append(effect)
        try:
            return execute(sql, params, many, context)
        except BaseException:
            self._cancel(wrapper)
            raise

    def _cancel(self, wrapper: Any) -> None:
        """Cut off in the middle of a statement, as by a soft time limit."""
        raw = wrapper.connection
        if raw is None:
            return
        state = drivers.state_of(raw)
        # PyMySQL closes its socket then, and the server goes on.
        is_closed = state is DriverState.DEAD and drivers.library_of(raw) == "pymysql"
        if state is not DriverState.BUSY and not is_closed:
            return
        try:
            drivers.cancel(raw, lambda: _another_connection(wrapper))
        except Exception:
            logger.warning(
                "a statement could not be cancelled on its server", exc_info=True
            )
        try:
            wrapper.close()
        except Exception:
            logger.debug("a connection could not be closed", exc_info=True)

    # --- between runs -----------------------------------------------------------------

    def make_ready(self, now: float) -> None:
        """Close what the server has ended; a run begins."""
        wrapper = self.wrapper
        if wrapper is None or wrapper.connection is None:
            return
        if wrapper.in_atomic_block:
            self._drop(wrapper)
            return
        if wrapper.vendor == "sqlite":
            return
        idle_s = None if self._back_at is None else now - self._back_at
        readable = drivers.is_readable(wrapper.connection)
        if should_ask(idle_s=idle_s, is_readable=readable) and not drivers.is_alive(
            wrapper.connection
        ):
            wrapper.close()

    def end(self, *, keeps: bool) -> list[Leak]:
        """Undo what a run has left, and keep the connection as its settings say."""
        wrapper = self.wrapper
        if wrapper is None:
            return []
        if wrapper.connection is None:
            if not wrapper.in_atomic_block:
                return []
            self._drop(wrapper)
            return [self._leak(ATOMIC_LEFT)]
        self._back_at = time.monotonic()
        leaks = self._leaks_of(wrapper)
        if wrapper.connection is not None and not leaks:
            if keeps and not wrapper.settings_dict["OPTIONS"].get("pool"):
                wrapper.close_if_unusable_or_obsolete()
            else:
                # Back to its pool, if it has one.
                wrapper.close()
        self._effects.clear()
        self._where = ""
        return leaks

    def _leaks_of(self, wrapper: Any) -> list[Leak]:
        if wrapper.in_atomic_block:
            self._drop(wrapper)
            return [self._leak(ATOMIC_LEFT)]
        if wrapper.get_autocommit() != wrapper.settings_dict["AUTOCOMMIT"]:
            self._drop(wrapper)
            return [self._leak(AUTOCOMMIT_OFF)]
        state = drivers.state_of(wrapper.connection)
        if state is DriverState.DEAD or state is DriverState.BUSY:
            self._cancel(wrapper)
            self._drop(wrapper)
            return []
        if state in (DriverState.IN_TRANSACTION, DriverState.FAILED):
            try:
                wrapper.rollback()
            except Exception:
                self._drop(wrapper)
            return [self._leak(OPEN_TRANSACTION)]
        kinds = left_by(self._effects)
        if not kinds:
            return []
        if wrapper.vendor == "postgresql":
            kinds = drivers.found_on_postgresql(wrapper.connection, kinds)
        if kinds:
            self._drop(wrapper)
        return [self._leak(kind) for kind in sorted(kinds)]

    def _leak(self, kind: str) -> Leak:
        since = None if self._at is None else time.monotonic() - self._at
        return Leak(kind, since, self._where)

    def _drop(self, wrapper: Any) -> None:
        """Close the connection whatever it is in the middle of; the next is a new one."""
        is_sqlite = wrapper.vendor == "sqlite"
        raw = wrapper.connection
        _forget_transaction(wrapper)
        try:
            if is_sqlite and raw is not None:
                # Its database may be in memory, and nowhere else.
                raw.rollback()
                wrapper.set_autocommit(wrapper.settings_dict["AUTOCOMMIT"])
                return
            if raw is not None:
                raw.close()
            wrapper.close()
        except Exception:
            logger.debug("a connection could not be closed", exc_info=True)
            wrapper.connection = None


def _forget_transaction(wrapper: Any) -> None:
    """What Django itself forgets as it connects again (``base/base.py``, Django 5.2)."""
    wrapper.in_atomic_block = False
    wrapper.savepoint_ids = []
    wrapper.atomic_blocks = []
    wrapper.needs_rollback = False
    wrapper.closed_in_transaction = False
    wrapper.commit_on_exit = True
    wrapper.run_on_commit = []


def _another_connection(wrapper: Any) -> Any:
    """One of the driver's own, beside Django's."""
    return wrapper.Database.connect(**wrapper.get_connection_params())


# --- what Django tells ----------------------------------------------------------------


class _OfThread(threading.local):
    """The connections of one thread, or greenlet."""

    def __init__(self) -> None:
        self.watched: list[Watched] = []


_mine = _OfThread()

#: Of every thread, for a fork.
_everybodys: weakref.WeakSet[Watched] = weakref.WeakSet()


def _on_connection(connection: Any = None, **_: Any) -> None:
    try:
        if not any(one.wrapper is connection for one in _mine.watched):
            _watch(connection)
        has_pool = connection.settings_dict["OPTIONS"].get("pool")
        raw = connection.connection
        if has_pool and drivers.is_readable(raw) and not drivers.is_alive(raw):
            # The pool had it while its server ended it.
            connection.close()
            connection.connect()
    except Exception:
        logger.exception("a connection of Django's is not looked after")


def _watch(wrapper: Any) -> None:
    _on_use()
    watched = Watched(wrapper)
    _mine.watched = [one for one in _mine.watched if one.wrapper is not None]
    _mine.watched.append(watched)
    _everybodys.add(watched)
    wrapper.execute_wrappers.append(watched)


def before_body() -> None:
    """A body starts with connections that live, or with none."""
    if _mine.watched:
        now = time.monotonic()
        for watched in _mine.watched:
            watched.make_ready(now)


def end_body(*, keeps: bool) -> list[Leak]:
    """Undo what a body has left in this thread's connections."""
    leaks: list[Leak] = []
    for watched in _mine.watched:
        leaks += watched.end(keeps=keeps)
    return leaks


def has_connections() -> bool:
    """Whether this thread has ever had one."""
    return bool(_mine.watched)


# --- forks -----------------------------------------------------------------------------

#: Connections and pools of a parent, which stay open there and are never closed here.
_of_parents: list[Any] = []


def _after_fork() -> None:
    """In a child: no connection of the parent's is used, closed or collected here."""
    try:
        for watched in list(_everybodys):
            wrapper = watched.wrapper
            if wrapper is None or wrapper.connection is None:
                continue
            if wrapper.vendor == "sqlite" and wrapper.is_in_memory_db():
                continue
            _of_parents.append(wrapper.connection)
            wrapper.connection = None
            _forget_transaction(wrapper)
            pools = getattr(type(wrapper), "_connection_pools", None)
            if isinstance(pools, dict) and wrapper.alias in pools:
                _of_parents.append(pools.pop(wrapper.alias))
    except Exception:
        logger.exception("what a parent has left could not be put aside")


_is_attached = False


def _nothing() -> None:
    return None


#: Called when a connection is made.
_on_use: Callable[[], None] = _nothing


def attach(on_use: Callable[[], None] = _nothing) -> bool:
    """
    Hear of each connection of Django's, once in a process.

    Args:
        on_use: Called when one is made.

    Returns:
        Whether it is heard; not while Django is imported and has no settings yet.
    """
    global _is_attached, _on_use
    _on_use = on_use
    if _is_attached:
        return True
    from django.conf import settings

    if not settings.configured:
        return False
    _is_attached = True
    from django.db import connections
    from django.db.backends.signals import connection_created

    connection_created.connect(
        _on_connection, weak=False, dispatch_uid="celery_resilience.sessions"
    )
    for wrapper in connections.all(initialized_only=True):
        if wrapper.connection is not None:
            _watch(wrapper)
    os.register_at_fork(after_in_child=_after_fork)
    return True
