"""The engine for every SQL database, and the schema's version.

Rooms define their tables with `table` and call `SqlDatabase.ready` before they use
them. What one kind of database does differently is in `sql_dialects.py`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql import ColumnElement

from celery_resilience import own_connections
from celery_resilience.chance import between
from celery_resilience.errors import (
    MissingExtra,
    SchemaMismatch,
    StoreUnavailable,
)
from celery_resilience.forks import sqlite_gate
from celery_resilience.stores.sql_dialects import (
    LOCK_TIMEOUT_S,
    OPTIONS,
    TABLE_OPTIONS,
    LongBinary,
    LongText,
    SqlDialect,
    dialect_of,
)
from celery_resilience.stores.sql_statements import TRIES, SqlStatements

__all__ = ["OPTIONS", "LongBinary", "LongText", "SqlDatabase", "metadata", "table"]

Result = TypeVar("Result")

metadata = MetaData()


#: Before 2.1 SQLAlchemy refuses a table's storage parameters. They only save time.
_KNOWS_STORAGE = tuple(map(int, sqlalchemy.__version__.split(".")[:2])) >= (2, 1)


def table(name: str, *columns: Any, **options: Any) -> Table:
    """A table of a room's, which compares texts alike in every database."""
    if not _KNOWS_STORAGE:
        options.pop("postgresql_with", None)
    info = {OPTIONS: {**TABLE_OPTIONS, **options}}
    return Table(name, metadata, *columns, info=info)


schema_versions = table(
    "resilience_schema",
    Column("room", String(32), primary_key=True),
    Column("version", Integer, nullable=False),
)


class SqlDatabase:
    """
    One database, used from any process: each opens its own connections.

    Args:
        url: `sqlite:///…`, `postgresql+psycopg://…` or `mysql+pymysql://…`.
        create_schema: Make missing tables on first use.

    Attributes:
        statements: What is said in one round trip, outside any transaction.
    """

    def __init__(self, url: str, *, create_schema: bool = True) -> None:
        self._dialect, self._url = dialect_of(make_url(url))
        self._create_schema = create_schema
        self._engine: Engine | None = None
        #: A connection is never closed in a child of the process that opened it.
        self._parents: list[Engine | None] = []
        self._pid = os.getpid()
        self._ready: set[str] = set()
        self._lock = Lock()
        self.statements = SqlStatements(self)

    @property
    def dialect(self) -> SqlDialect:
        """What this kind of database does differently."""
        return self._dialect

    @property
    def is_sqlite(self) -> bool:
        """SQLite is embedded: one host, one writer at a time."""
        return self._dialect.is_sqlite

    def ready(self, room: str, version: int, tables: list[Table]) -> None:
        """
        Make sure that *tables* are there, of *version*.

        Raises:
            SchemaMismatch: They are missing and must not be made, or are of
                another version.
            StoreUnavailable: The database did not answer.
        """
        if self.is_ready(room):
            return
        with self.translated():
            found = self._version_of(room)
            if found is None and self._create_schema:
                self._create(room, version, tables)
                found = self._version_of(room)
        if found is None:
            raise SchemaMismatch(
                f"the tables of {room!r} are missing in {self._shown()} and "
                "resilience_create_schema is False: run "
                "`celery -A app resilience schema --sql` and apply what it prints"
            )
        if found != version:
            raise SchemaMismatch(
                f"the tables of {room!r} in {self._shown()} are of version {found}, "
                f"this release of celery-resilience knows version {version}: "
                + (
                    "upgrade celery-resilience here"
                    if found > version
                    else "upgrade the tables"
                )
            )
        self._ready.add(room)

    def is_ready(self, room: str) -> bool:
        """Whether this process knows that the tables of *room* are there."""
        self._own_process()
        return room in self._ready

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads one consistent state."""
        with (
            self.translated(),
            self._connect() as connection,
            connection.begin(),
        ):
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, or rolled back."""
        with self.translated(), self._transaction() as connection:
            yield connection

    def write(self, work: Callable[[Connection], Result]) -> Result:
        """
        What *work* returns for a transaction, which is committed then.

        Args:
            work: Called again, in a new transaction, where the database gave one up
                in favour of another's.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        with self.translated():
            for tried in range(1, TRIES + 1):
                try:
                    with self._transaction() as connection:
                        return work(connection)
                except DBAPIError as exc:
                    if not self._dialect.is_conflict(exc) or tried == TRIES:
                        raise
                    if time.monotonic() > deadline:
                        raise
                time.sleep(between(0, min(0.3, 0.005 * 2**tried)))
        raise AssertionError("the last try returns or raises")

    def now(self) -> ColumnElement[float]:
        """The database's wall time in seconds, as an expression."""
        return self._dialect.now()

    def insert_new(
        self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]
    ) -> bool:
        """
        Insert *rows* of *table*, in the order of their primary keys.

        Returns:
            Whether all were new. If not, those that are there already stay as they
            are, and of the others nobody knows whether they are there now.
        """
        return self._dialect.insert_new(connection, table, rows)

    def statements_engine(self, *, connect_s: int, answer_s: int) -> Engine:
        """
        An engine whose statements are each a transaction, for `SqlStatements`.

        Args:
            connect_s: Seconds for making a connection.
            answer_s: Seconds for an answer, where the driver knows such a limit, and
                for another process's lock.
        """
        options = self._dialect.statements_options(connect_s, answer_s)
        engine = self._make_engine(options)
        self._dialect.prepare_for_statements(engine, answer_s)
        return engine

    def unforked(self) -> AbstractContextManager[None]:
        """Where this process is not forked meanwhile, if the database is within it."""
        return sqlite_gate.inside() if self.is_sqlite else contextlib.nullcontext()

    def is_conflict(self, error: DBAPIError) -> bool:
        """Whether a statement was given up for another's sake: it may be repeated."""
        return self._dialect.is_conflict(error)

    def close(self) -> None:
        """Close this process's connections."""
        self.statements.close()
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
            self._engine = None

    def ddl(self, rooms: dict[str, tuple[int, list[Table]]]) -> str:
        """The statements that make the tables of *rooms* in this database."""
        dialect = self._url.get_dialect()()
        statements: list[str] = []
        tables = [schema_versions, *(t for _, ts in rooms.values() for t in ts)]
        self._dialect.set_options(tables)
        for table in tables:
            statements.append(str(CreateTable(table).compile(dialect=dialect)).strip())
            for index in sorted(table.indexes, key=lambda i: str(i.name)):
                statements.append(
                    str(CreateIndex(index).compile(dialect=dialect)).strip()
                )
        for room, (version, _) in rooms.items():
            statements.append(
                "INSERT INTO resilience_schema (room, version) "
                f"VALUES ('{room}', {version})"
            )
        return ";\n\n".join(statements) + ";\n"

    def _own_process(self) -> None:
        """A forked child never uses its parent's connections."""
        if self._pid != os.getpid():
            # The parent's lock may have been held as it forked.
            self._lock = Lock()
            self._parents.append(self._engine)
            self._engine = None
            self._ready = set()
            self._pid = os.getpid()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._connect() as connection:
            connection = connection.execution_options(resilience_writes=True)
            with connection.begin():
                yield connection

    def load(self) -> None:
        """
        Make the engine, which connects when it is used.

        Raises:
            MissingExtra: The database's driver is not installed.
        """
        self._open()

    def _open(self) -> Engine:
        self._own_process()
        with self._lock:
            if self._engine is None:
                self._engine = self._make_engine()
            return self._engine

    @contextlib.contextmanager
    def _connect(self) -> Iterator[Connection]:
        with self.unforked(), self._open().connect() as connection:
            yield connection

    def _make_engine(self, options: Mapping[str, Any] | None = None) -> Engine:
        options = self._dialect.engine_options() if options is None else options
        try:
            engine = create_engine(self._url, **options)
        except ModuleNotFoundError as exc:
            library = exc.name or "the database driver"
            if library != self._dialect.library:
                raise MissingExtra(f"{self._shown()} needs {library}") from exc
            raise MissingExtra.of(library, self._dialect.extra, self._shown()) from exc
        self._dialect.prepare(engine)
        event.listen(engine, "connect", own_connections.mark)
        return engine

    def _version_of(self, room: str) -> int | None:
        with self._connect() as connection, connection.begin():
            if not inspect(connection).has_table(schema_versions.name):
                return None
            found = connection.execute(
                select(schema_versions.c.version).where(schema_versions.c.room == room)
            ).scalar()
        return None if found is None else int(found)

    def _create(self, room: str, version: int, tables: list[Table]) -> None:
        """Make the tables; another process may do so at the same time."""
        row = {"room": room, "version": version}
        cause: Exception | None = None
        for _ in range(3):
            try:
                with self._transaction() as connection:
                    self._dialect.create(
                        connection, metadata, [schema_versions, *tables]
                    )
                    self._dialect.insert_new(connection, schema_versions, [row])
                return
            except (DBAPIError, TimeoutError) as exc:
                if self._version_of(room) is not None:
                    return
                cause = exc
        why = cause.orig if isinstance(cause, DBAPIError) else cause
        raise StoreUnavailable(
            f"could not create the tables of {room!r} in {self._shown()}: {why}"
        ) from cause

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """
        Say in words of ours what SQLAlchemy raises.

        Raises:
            StoreUnavailable: The database did not answer, or refused.
        """
        try:
            yield
        except SQLAlchemyError as exc:
            cause: Any = exc
            if isinstance(exc, DBAPIError):
                cause = self._dialect.explain(exc, self._engine) or exc.orig
            raise StoreUnavailable(f"{self._shown()}: {cause}") from exc
        except UnicodeError as exc:  # the driver's own, of a text that it cannot encode
            raise StoreUnavailable(f"{self._shown()}: {exc}") from exc

    def _shown(self) -> str:
        return self._url.render_as_string(hide_password=True)
