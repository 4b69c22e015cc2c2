"""Single statements: each a transaction of its own, in one round trip.

On connections of their own, for the pool of `SqlDatabase` asks a connection whether it
lives before each use, and then begins and commits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql import ClauseElement

if TYPE_CHECKING:
    from celery_resilience.stores.sql import SqlDatabase

#: How often is tried what a database gives up for another's sake.
TRIES = 10

#: Seconds that a statement waits: for the server to take a connection, and for an
#: answer or another process's lock.
CONNECT_S = 2
ANSWER_S = 5
WAITS_S = CONNECT_S + ANSWER_S


class Answer(NamedTuple):
    """
    What one statement came to.

    Attributes:
        rows: What it returned.
        changed: How many rows it changed.
    """

    rows: Sequence[Any]
    changed: int


class SqlStatements:
    """
    The statements of one database: such as may be repeated, for one whose answer was
    lost is.

    Args:
        database: Whose they are; that its schema is ready is the caller's to see to.
    """

    def __init__(self, database: SqlDatabase) -> None:
        self._database = database
        self._engine: Engine | None = None
        self._idle: list[Any] = []
        self._texts: dict[ClauseElement, str] = {}
        #: A connection is never closed in a child of the process that opened it.
        self._parents: list[Any] = []
        self._pid = os.getpid()
        self._lock = Lock()

    @property
    def engine(self) -> Engine:
        """
        What makes connections of this process.

        Raises:
            MissingExtra: The database's driver is not installed.
        """
        if self._pid != os.getpid():
            self._parents += self._idle
            self._idle = []
            self._engine = None
            self._lock = Lock()  # the parent may have held it as it forked
            self._pid = os.getpid()
        with self._lock:
            if self._engine is None:
                self._engine = self._database.statements_engine(
                    connect_s=CONNECT_S, answer_s=ANSWER_S
                )
            return self._engine

    @property
    def can_return(self) -> bool:
        """Whether an INSERT may return the row as it is then: MySQL's cannot."""
        engine = self.engine
        if engine.dialect.server_version_info is None:
            with self._database.unforked():
                connection, _ = self._take(engine)
            self._idle.append(connection)
        return engine.dialect.insert_returning

    def run(self, statement: ClauseElement, words: Mapping[str, Any]) -> Answer:
        """
        Execute a statement that is used again and again.

        Args:
            statement: With a `bindparam` for each word.

        Raises:
            StoreUnavailable: The database did not answer, or refused.
        """
        with self._database.unforked():
            return self._run(statement, words)

    def run_once(self, statement: ClauseElement) -> Answer:
        """
        Execute a statement that has its words in it.

        Raises:
            StoreUnavailable: The database did not answer, or refused.
        """
        with self._database.unforked():
            return self._run(statement, None)

    def close(self) -> None:
        """Close this process's connections."""
        if self._pid == os.getpid():
            while self._idle:
                self._idle.pop().close()

    def _run(self, statement: ClauseElement, words: Mapping[str, Any] | None) -> Answer:
        engine = self.engine
        started = time.monotonic()
        tried = 0
        while True:
            connection, was_idle = self._take(engine)
            text, values = self._compiled(engine, statement, words)
            try:
                answer = _execute(connection, text, values)
            except BaseException as raised:
                exc: Any = raised
                dbapi: Any = engine.dialect.dbapi
                is_theirs = isinstance(exc, dbapi.Error)
                is_gone = is_theirs and engine.dialect.is_disconnect(
                    exc, connection.dbapi_connection, None
                )
                # Not given back: nobody knows what it is in the midst of.
                connection.invalidate()
                if not is_theirs:
                    raise
                # Without its words: what they might explain takes another question.
                error = DBAPIError(None, None, exc)
                tried += 1
                passed_s = time.monotonic() - started
                if was_idle and is_gone and passed_s < CONNECT_S:
                    # It died while it was idle, and the others with it.
                    self.close()
                    continue
                if (
                    self._database.is_conflict(error)
                    and tried < TRIES
                    and passed_s < ANSWER_S
                ):
                    continue
                with self._database.translated():
                    raise error from exc
            self._idle.append(connection)
            return answer

    def _take(self, engine: Engine) -> tuple[Any, bool]:
        """A connection, and whether it was used before."""
        try:
            return self._idle.pop(), True
        except IndexError:
            pass
        dbapi: Any = engine.dialect.dbapi
        with self._database.translated():
            try:
                return engine.raw_connection(), False
            except dbapi.Error as exc:
                raise DBAPIError(None, None, exc) from exc

    def _compiled(
        self, engine: Engine, statement: ClauseElement, words: Mapping[str, Any] | None
    ) -> tuple[str, Mapping[str, Any]]:
        if words is None:
            compiled: Any = statement.compile(dialect=engine.dialect)
            state = compiled.construct_expanded_state()
            return state.statement, state.parameters
        text = self._texts.get(statement)
        if text is None:
            # Not before a connection has told which server it is.
            text = self._texts[statement] = str(
                statement.compile(dialect=engine.dialect)
            )
        return text, words


def _execute(connection: Any, text: str, words: Mapping[str, Any]) -> Answer:
    cursor = connection.cursor()
    cursor.execute(text, words)
    rows = cursor.fetchall() if cursor.description else ()
    count = cursor.rowcount
    cursor.close()
    return Answer(rows, count)
