"""What a run takes of SQLAlchemy 2.x, known from its own events, and how it is reset.

Imported once SQLAlchemy is in the process. The events are those of the classes, so
that every engine, pool and session of the process tells, whoever made it and when.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection, Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool, Pool

from celery_resilience.own_connections import MARK
from celery_resilience.sessions import drivers
from celery_resilience.sessions.policy import (
    NO_EFFECT,
    NOT_RETURNED,
    OPEN_TRANSACTION,
    SET,
    Action,
    DriverState,
    Effect,
    Leak,
    action_for,
    effect_of,
    left_by,
    should_ask,
)
from celery_resilience.sessions.run import Run, current
from celery_resilience.sessions.where import taken_at

logger = logging.getLogger("celery_resilience.sessions")

LIBRARY = "sqlalchemy"

#: What is written into the `info` of a pool's record, which lives as its connection.
OWNER, BACK_AT, LOOP, CHANGED, IN_MEMORY = (
    f"celery_resilience.{name}"
    for name in ("owner", "back_at", "loop", "changed", "in_memory")
)

#: Things of one run above which the dead ones, or the later ones, are forgotten.
_MANY = 500

#: Statements whose effects are remembered.
_STATEMENTS = 2_000


class Taken:
    """A connection of a pool that a run has taken and not given back."""

    __slots__ = ("at", "connection", "fairy", "where")

    def __init__(self, fairy: Any, where: str | None) -> None:
        self.fairy = weakref.ref(fairy)
        self.connection: Callable[[], Any] = _nothing
        self.where = where
        self.at = time.monotonic()


def _nothing() -> None:
    return None


class Begun:
    """A session, or a connection, that has begun a transaction in a run."""

    __slots__ = ("at", "has_connected", "is_async", "owner", "where")

    def __init__(self, owner: Any, where: str) -> None:
        self.owner = weakref.ref(owner)
        self.where = where
        self.at = time.monotonic()
        self.is_async = False
        self.has_connected = False


class Changed:
    """A connection whose session on the server a run has changed."""

    __slots__ = ("at", "effects", "engine", "info", "where")

    def __init__(self, connection: Any, where: str) -> None:
        self.info = connection.info
        self.engine = connection.engine
        self.effects: list[Effect] = []
        self.where = where
        self.at = time.monotonic()


class Notes:
    """
    What one run has taken of SQLAlchemy.

    Attributes:
        taken: By the identity of the `info` of the pool's record.
        sessions: By identity.
        connections: With transactions of their own, by identity.
        changed: Connections of which the server's session state was changed, by the
            identity of their `info`.
        is_cleaning: What is taken now is ours.
    """

    __slots__ = ("changed", "connections", "is_cleaning", "sessions", "taken")

    def __init__(self) -> None:
        self.taken: dict[int, Taken] = {}
        self.sessions: dict[int, Begun] = {}
        self.connections: dict[int, Begun] = {}
        self.changed: dict[int, Changed] = {}
        self.is_cleaning = False


def _notes() -> Notes:
    """The present run's; of a run whose body has yet to begin, where there is none."""
    run = current.get()
    if run is None:
        run = Run()
        current.set(run)
    notes: Notes | None = run.libraries.get(LIBRARY)
    if notes is None:
        _on_use()
        notes = run.libraries[LIBRARY] = Notes()
    return notes


# --- what the libraries tell ---------------------------------------------------------

#: The process that has attached, or the child that was forked since.
_owner = os.getpid()
#: The process in which SQLAlchemy was first listened to.
_first_owner = _owner

#: Connections of a parent, which stay open there and are never closed here.
_of_parents: list[Any] = []

_records: dict[int, weakref.ref[Any]] = {}
_effects: dict[str, Effect] = {}


def _remember(record: Any) -> None:
    # A child could not ask: a thread of its parent's may have been within SQLite.
    record.info[IN_MEMORY] = _is_in_memory(record.dbapi_connection)
    key = id(record)
    if key not in _records:
        _records[key] = weakref.ref(record, lambda _: _records.pop(key, None))


def _on_connect(driver: Any, record: Any) -> None:
    record.info[OWNER] = _owner
    _remember(record)
    if isinstance(driver, AdaptedConnection):
        # An asynchronous driver's, behind a synchronous face.
        record.info[LOOP] = weakref.ref(_running_loop())


def _running_loop() -> Any:
    return sys.modules["asyncio"]._get_running_loop()


def _on_checkout(driver: Any, record: Any, fairy: Any) -> None:
    info = record.info
    if MARK in info:
        return
    if info.get(OWNER, _first_owner) != _owner and not _is_copied(info, driver):
        _leave_to_parent(record, fairy)
        raise DisconnectionError("this connection is a parent process's")
    if OWNER not in info:
        info[OWNER] = _owner
        _remember(record)
    if LOOP in info and info[LOOP]() is not _running_loop():
        # Its own loop is closed, or another thread's: it could not be closed here.
        record.dbapi_connection = fairy.dbapi_connection = None
        raise DisconnectionError("this connection is another event loop's")
    notes = _notes()
    if CHANGED in info and not notes.is_cleaning and info[CHANGED] is not current.get():
        # Another run has left it so, and could not get at it when it ended.
        raise DisconnectionError("this connection has another run's session state")
    back_at = info.get(BACK_AT)
    if back_at is not None and LOOP not in info:
        raw = record.driver_connection
        library = drivers.library_of(raw)
        if (
            library != "sqlite3"
            and should_ask(
                idle_s=time.monotonic() - back_at, is_readable=drivers.is_readable(raw)
            )
            and not drivers.is_alive(raw)
        ):
            raise DisconnectionError("the server has ended this connection")
    if not notes.is_cleaning:
        notes.taken[id(info)] = Taken(fairy, taken_at(stop_at_session=True))


def _on_checkin(driver: Any, record: Any) -> None:
    record.info[BACK_AT] = time.monotonic()
    run = current.get()
    if run is not None:
        notes = run.libraries.get(LIBRARY)
        if notes is not None:
            notes.taken.pop(id(record.info), None)


def _on_session_begin(session: Any, transaction: Any) -> None:
    notes = _notes()
    if notes.is_cleaning:
        return
    begun = notes.sessions.get(id(session))
    if begun is None or begun.owner() is not session:
        _prune(notes.sessions)
        notes.sessions[id(session)] = Begun(session, taken_at() or "")
    elif transaction.parent is None:
        begun.at = time.monotonic()
        begun.where = taken_at() or ""
        begun.has_connected = False


def _prune(begun: dict[int, Begun]) -> None:
    """Forget the dead of a run that makes a great many."""
    if len(begun) > _MANY:
        for key in [key for key, one in begun.items() if one.owner() is None]:
            del begun[key]


def _on_session_connects(session: Any, transaction: Any, connection: Any) -> None:
    _sessions.add(session)
    notes = _notes()
    begun = notes.sessions.get(id(session))
    if begun is not None:
        begun.has_connected = True
        begun.is_async = connection.dialect.is_async


#: Sessions that have had a connection, for whom a fork is told.
_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def _on_statement(cursor: Any, statement: str, *parameters_and_context: Any) -> None:
    """Told to a dialect: its events cost less than those of a connection."""
    notes = _notes()
    if notes.is_cleaning:
        return
    connection = parameters_and_context[-1].root_connection
    begun = notes.connections.get(id(connection))
    if begun is None or begun.owner() is not connection:
        try:
            info = connection.info
        except NotImplementedError:
            return  # SQLAlchemy's own, which looks at a new server
        if MARK in info:
            return
        _prune(notes.connections)
        notes.connections[id(connection)] = Begun(connection, "")
        taken = notes.taken.get(id(info))
        if taken is not None:
            taken.connection = weakref.ref(connection)
    effect = _effects.get(statement)
    if effect is None:
        if len(_effects) >= _STATEMENTS:
            _effects.clear()
        effect = _effects[statement] = effect_of(statement)
    if effect is NO_EFFECT:
        return
    info = connection.info
    changed = notes.changed.get(id(info))
    if changed is None:
        changed = Changed(connection, taken_at() or "")
        notes.changed[id(info)] = changed
    if len(changed.effects) < _MANY:
        changed.effects.append(effect)
    info[CHANGED] = current.get()


def _on_error(context: Any) -> None:
    """A body was cut off in the middle of a statement, as by a soft time limit."""
    if context.sqlalchemy_exception is not None or context.connection is None:
        return
    connection = context.connection
    if connection.closed or connection.invalidated or connection.dialect.is_async:
        return
    raw = connection.connection.driver_connection
    if raw is None:
        return
    state = drivers.state_of(raw)
    # PyMySQL closes its socket then, and the server goes on.
    is_cut = state is DriverState.BUSY or (
        state is DriverState.DEAD and drivers.library_of(raw) == "pymysql"
    )
    if not is_cut:
        return
    _cancel(raw, connection.engine)
    # SQLAlchemy throws this connection away, and no other.
    context.is_disconnect = True
    context.invalidate_pool_on_disconnect = False


def _cancel(raw: Any, engine: Any) -> None:
    try:
        drivers.cancel(raw, lambda: _another_connection(engine))
    except Exception:
        logger.warning(
            "a statement could not be cancelled on its server", exc_info=True
        )


def _another_connection(engine: Any) -> Any:
    """One of the driver's own, beside the pool."""
    words, options = engine.dialect.create_connect_args(engine.url)
    return engine.dialect.connect(*words, **options)


# --- forks ---------------------------------------------------------------------------


def _leave_to_parent(record: Any, fairy: Any) -> None:
    """Forget a parent's connection without a word to its server."""
    _of_parents.append(record.dbapi_connection)
    record.dbapi_connection = None
    if fairy is not None:
        fairy.dbapi_connection = None


def _is_in_memory(driver: Any) -> bool:
    """A database of SQLite's that is this process's own copy, and nowhere else."""
    if drivers.library_of(driver) != "sqlite3":
        return False
    try:
        rows = driver.execute("PRAGMA database_list").fetchall()
    except Exception:
        return False
    return all(not row[2] for row in rows)


def _is_copied(info: dict[str, Any], driver: Any) -> bool:
    """Whether a parent's connection is this child's own, for its database is."""
    known: bool | None = info.get(IN_MEMORY)
    # One that was opened before SQLAlchemy was listened to is asked.
    return _is_in_memory(driver) if known is None else known


def _after_fork() -> None:
    """In a child: no connection of the parent's is used, closed or collected here."""
    global _owner
    _owner = os.getpid()
    try:
        for reference in list(_records.values()):
            record = reference()
            if record is None or record.dbapi_connection is None:
                continue
            if record.info.get(IN_MEMORY):
                record.info[OWNER] = _owner
                continue
            fairy = record.fairy_ref() if record.fairy_ref is not None else None
            _leave_to_parent(record, fairy)
        for session in list(_sessions):
            if session.in_transaction():
                session.invalidate()
    except Exception:
        logger.exception("what a parent has left could not be put aside")


# --- the end of a body ---------------------------------------------------------------


def end_body(notes: Notes) -> list[Leak]:
    """
    Roll back what the body has not ended, and undo what it has changed.

    Sessions stay as they are otherwise: the result, which may read from their objects,
    is stored after this.
    """
    notes.is_cleaning = True
    leaks: list[Leak] = []
    try:
        for taken in list(notes.taken.values()):
            _throw_away_broken(taken)
        for begun in list(notes.sessions.values()):
            leaks += _end_session(begun)
        for begun in list(notes.connections.values()):
            leaks += _end_connection(begun, notes)
        for taken in list(notes.taken.values()):
            leaks += _look_at_taken(taken, is_told=bool(leaks))
        for changed in list(notes.changed.values()):
            leaks += _undo(changed)
        notes.taken.clear()
        notes.connections.clear()
        notes.changed.clear()
    finally:
        notes.is_cleaning = False
    return leaks


def end_run(notes: Notes) -> None:
    """Give back what came after the body, and let sessions begin anew."""
    end_body(notes)
    notes.is_cleaning = True
    try:
        for begun in notes.sessions.values():
            session = begun.owner()
            if session is None or not (
                session.in_transaction() or len(session.identity_map) or session.new
            ):
                continue
            if begun.is_async:
                session.invalidate()
                continue
            try:
                # Since 2.0.22, of which close() may be for good.
                getattr(session, "reset", session.close)()
            except Exception:
                session.invalidate()
        notes.sessions.clear()
    finally:
        notes.is_cleaning = False


def _throw_away_broken(taken: Taken) -> None:
    """Cancel what a body was cut off in, and let nobody have its connection."""
    fairy = taken.fairy()
    if fairy is None or not fairy.is_valid:
        return
    raw = fairy.driver_connection
    action = action_for(drivers.state_of(raw))
    if action in (Action.NOTHING, Action.ROLL_BACK):
        return
    connection = taken.connection()
    if action is Action.CANCEL:
        _cancel(raw, None if connection is None else connection.engine)
    owner = fairy if connection is None or connection.closed else connection
    owner.invalidate()


def _end_session(begun: Begun) -> list[Leak]:
    session = begun.owner()
    if session is None or not session.in_transaction():
        return []
    is_pending = bool(session.new or session.dirty or session.deleted)
    try:
        if begun.is_async:
            # Its event loop does not run here.
            session.invalidate()
        else:
            session.rollback()
    except Exception:
        logger.debug("a rollback failed: the connection is dead", exc_info=True)
        session.invalidate()
    if not (is_pending or begun.has_connected):
        return []
    return [Leak(OPEN_TRANSACTION, time.monotonic() - begun.at, begun.where)]


def _end_connection(begun: Begun, notes: Notes) -> list[Leak]:
    connection = begun.owner()
    if connection is None or connection.closed or not connection.in_transaction():
        return []
    taken = notes.taken.get(id(connection.info)) if not connection.invalidated else None
    where = (taken.where if taken is not None else "") or ""
    try:
        if connection.dialect.is_async:
            connection.invalidate()
        connection.rollback()
    except Exception:
        logger.debug("a rollback failed: the connection is dead", exc_info=True)
        connection.invalidate()
        connection.rollback()
    if taken is not None and taken.where is None:
        return []  # a session's, which is told of already
    return [Leak(OPEN_TRANSACTION, time.monotonic() - begun.at, where)]


def _look_at_taken(taken: Taken, *, is_told: bool) -> list[Leak]:
    fairy = taken.fairy()
    if fairy is None or not fairy.is_valid or taken.where is None:
        return []
    connection = taken.connection()
    if connection is None:
        # Taken by `raw_connection()`, of which SQLAlchemy knows no transaction.
        if drivers.state_of(fairy.driver_connection) is not DriverState.IDLE:
            try:
                fairy.rollback()
            except Exception:
                fairy.invalidate()
    elif connection.closed or is_told:
        return []
    return [Leak(NOT_RETURNED, time.monotonic() - taken.at, taken.where)]


def _undo(changed: Changed) -> list[Leak]:
    """Undo what a run has left in the server's session, where it has left anything."""
    info, engine = changed.info, changed.engine
    if CHANGED not in info:
        return []  # the connection is another one since
    kinds = left_by(changed.effects)
    if not kinds:
        del info[CHANGED]
        return []
    if isinstance(engine.pool, NullPool):
        return []  # it went with its connection
    found = kinds
    if not engine.dialect.is_async:
        fairy = _out_of_pool(engine, info)
        if fairy is not None:
            try:
                found = _undo_in(fairy, kinds, engine.dialect.name)
            finally:
                fairy.close()
    since = time.monotonic() - changed.at
    return [Leak(kind, since, changed.where) for kind in sorted(found)]


def _out_of_pool(engine: Any, info: Any) -> Any:
    """The pool's connection with that *info*, unless another run has it by now."""
    held: list[Any] = []
    found = None
    try:
        idle = getattr(engine.pool, "checkedin", lambda: 1 - len(held))
        while idle() > 0:
            fairy = engine.raw_connection()
            if fairy.info is info:
                found = fairy
                break
            held.append(fairy)
    except Exception:
        logger.debug("a pool gave no connection", exc_info=True)
    finally:
        for fairy in held:
            fairy.close()
    return found


def _undo_in(fairy: Any, kinds: set[str], dialect: str) -> set[str]:
    """
    Undo *kinds* in one connection; returns those that were there.

    What SET has set before is not known, a listener of the user's to "connect" may have
    set it: the connection is closed, and the next one is set up by whoever does that.
    """
    raw = fairy.driver_connection
    if dialect == "sqlite" and _is_in_memory(raw):
        fairy.info.pop(CHANGED, None)
        return kinds
    try:
        if dialect == "postgresql":
            kinds = drivers.found_on_postgresql(raw, kinds)
            if SET not in kinds:
                fairy.info.pop(CHANGED, None)
                return kinds
    except Exception:
        logger.debug("session state was not undone: a new connection", exc_info=True)
    fairy.invalidate()
    return kinds


# --- attaching -------------------------------------------------------------------------

_is_attached = False
_hears_sessions = False
#: Called at the first use of each run.
_on_use: Callable[[], None] = _nothing
_told: set[str] = set()


def _harmless(listener: Callable[..., None]) -> Callable[..., None]:
    """A listener that never fails what it listens to; told of once."""

    def listen(*words: Any) -> None:
        try:
            listener(*words)
        except DisconnectionError:
            raise
        except Exception:
            if listener.__name__ not in _told:
                _told.add(listener.__name__)
                logger.exception("%s failed (told once)", listener.__name__)

    return listen


def attach(on_use: Callable[[], None] = _nothing) -> None:
    """
    Listen to every pool, engine and session of this process, once.

    Args:
        on_use: Called when a run uses one of them.
    """
    global _is_attached, _on_use
    _on_use = on_use
    if _is_attached:
        return
    _is_attached = True
    for target, name, listener in (
        (Pool, "connect", _on_connect),
        (Pool, "checkout", _on_checkout),
        (Pool, "checkin", _on_checkin),
        (Engine, "do_execute", _on_statement),
        (Engine, "do_execute_no_params", _on_statement),
        (Engine, "do_executemany", _on_statement),
        (Engine, "handle_error", _on_error),
    ):
        event.listen(target, name, _harmless(listener))
    os.register_at_fork(after_in_child=_after_fork)


def attach_sessions() -> None:
    """Listen to every session too, once; it imports the ORM."""
    global _hears_sessions
    if _hears_sessions:
        return
    _hears_sessions = True
    from sqlalchemy.orm import Session

    for name, listener in (
        ("after_transaction_create", _on_session_begin),
        ("after_begin", _on_session_connects),
    ):
        event.listen(Session, name, _harmless(listener))


def end_all_sessions() -> None:
    """End every session of this process, where all are of the one run that ends."""
    from sqlalchemy.orm import close_all_sessions

    close_all_sessions()
