"""The engine for SQLite and PostgreSQL, and the schema's version.

Rooms define their tables on `metadata` and call `SqlDatabase.ready` before
they use them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from threading import Lock
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    cast,
    create_engine,
    event,
    func,
    inspect,
    literal,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import Float

from celery_resilience.errors import (
    ConfigurationError,
    MissingExtra,
    SchemaMismatch,
    StoreUnavailable,
)

metadata = MetaData()

schema_versions = Table(
    "resilience_schema",
    metadata,
    Column("room", String(32), primary_key=True),
    Column("version", Integer, nullable=False),
)

#: Seconds that a statement waits for another process's lock.
LOCK_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5


class SqlDatabase:
    """
    One database, used from any process: each opens its own connections.

    Args:
        url: `sqlite:///…` or `postgresql+psycopg://…`.
        create_schema: Make missing tables on first use.
    """

    def __init__(self, url: str, *, create_schema: bool = True) -> None:
        self._url = make_url(url)
        if self._url.drivername == "postgresql":
            self._url = self._url.set(drivername="postgresql+psycopg")
        self._create_schema = create_schema
        self._engine: Engine | None = None
        self._pid = 0
        self._ready: set[str] = set()
        self._lock = Lock()

    @property
    def is_sqlite(self) -> bool:
        """SQLite is embedded: one host, one writer at a time."""
        return self._url.get_backend_name() == "sqlite"

    def ready(self, room: str, version: int, tables: list[Table]) -> None:
        """
        Make sure that *tables* are there, of *version*.

        Raises:
            SchemaMismatch: They are missing and must not be made, or are of
                another version.
            StoreUnavailable: The database did not answer.
        """
        self._own_process()
        if room in self._ready:
            return
        with self._translated():
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

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads one consistent state."""
        with (
            self._translated(),
            self._connect() as connection,
            connection.begin(),
        ):
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, or rolled back."""
        with self._translated(), self._connect() as connection:
            connection = connection.execution_options(resilience_writes=True)
            with connection.begin():
                yield connection

    def now(self) -> ColumnElement[float]:
        """
        The database's wall time in seconds, as an expression.

        SQLite is on this host, so its time is this process's.
        """
        if self.is_sqlite:
            return literal(time.time(), Float)
        return cast(func.extract("epoch", func.clock_timestamp()), Float(53))

    def insert(self, table: Table) -> Any:
        """The dialect's INSERT, which knows ON CONFLICT."""
        if self.is_sqlite:
            from sqlalchemy.dialects.sqlite import insert as sqlite_insert

            return sqlite_insert(table)
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        return postgresql_insert(table)

    def close(self) -> None:
        """Close this process's connections."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()
            self._engine = None

    def ddl(self, rooms: dict[str, tuple[int, list[Table]]]) -> str:
        """The statements that make the tables of *rooms* in this database."""
        dialect = self._url.get_dialect()()
        statements: list[str] = []
        for table in (schema_versions, *(t for _, ts in rooms.values() for t in ts)):
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
            with self._lock:
                self._engine = None
                self._ready = set()
                self._pid = os.getpid()

    def _connect(self) -> Connection:
        self._own_process()
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine.connect()

    def _make_engine(self) -> Engine:
        options: dict[str, Any] = {}
        if self.is_sqlite:
            options["connect_args"] = {
                "timeout": LOCK_TIMEOUT_S,
                "check_same_thread": False,
            }
        else:
            options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
            options.update(pool_size=2, max_overflow=4, pool_pre_ping=True)
        try:
            engine = create_engine(self._url, **options)
        except ModuleNotFoundError as exc:
            raise MissingExtra.of(
                exc.name or "the database driver", "postgres", self._shown()
            ) from exc
        if self.is_sqlite:
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
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
        for _ in range(3):
            try:
                with self._connect() as connection:
                    connection = connection.execution_options(resilience_writes=True)
                    with connection.begin():
                        metadata.create_all(connection, [schema_versions, *tables])
                        connection.execute(
                            self.insert(schema_versions)
                            .values(room=room, version=version)
                            .on_conflict_do_nothing()
                        )
                return
            except (IntegrityError, DBAPIError):
                if self._version_of(room) is not None:
                    return
        raise StoreUnavailable(f"could not create the tables of {room!r}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as exc:
            cause = exc.orig if isinstance(exc, DBAPIError) else exc
            raise StoreUnavailable(f"{self._shown()}: {cause}") from exc

    def _shown(self) -> str:
        return self._url.render_as_string(hide_password=True)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN comes too late to be IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={LOCK_TIMEOUT_S * 1000}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes then could not wait for a lock.
    writes = connection.get_execution_options().get("resilience_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def check_url(url: str) -> None:
    """
    Check that SQLAlchemy understands a store's URL.

    Raises:
        ConfigurationError: It does not.
    """
    try:
        make_url(url)
    except SQLAlchemyError as exc:
        raise ConfigurationError(f"resilience_store_url: {exc}") from exc
