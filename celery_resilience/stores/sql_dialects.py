"""What SQLite, PostgreSQL and MySQL (or MariaDB) do differently, each in one class."""

from __future__ import annotations

import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Index,
    Insert,
    Integer,
    LargeBinary,
    MetaData,
    NullPool,
    Table,
    Text,
    bindparam,
    case,
    cast,
    event,
    func,
    inspect,
    literal,
    literal_column,
    text,
)
from sqlalchemy.engine import URL, ExceptionContext
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import Float

#: Seconds that a statement waits for another process's lock.
LOCK_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5

#: Seconds that MySQL has for one answer. PostgreSQL's driver knows no such limit: its
#: host has as long to answer at all, which one whose server hangs does.
ANSWER_TIMEOUT_S = 60

#: Seconds without a word after which PostgreSQL's host is asked whether it is there.
KEEPALIVE_S = 30

#: Seconds after which MySQL gives up a reader that takes no more rows: a pager.
READER_PAUSE_S = 3_600

#: Characters or bytes that MySQL needs a LONGTEXT or LONGBLOB for.
_LONG = 2**32 - 1

LongText = Text().with_variant(Text(_LONG), "mysql")
LongBinary = LargeBinary().with_variant(LargeBinary(_LONG), "mysql")

#: A name of MySQL's for "byte for byte, trailing spaces too" is unknown to MariaDB,
#: and the other way round; each reads the comment that is meant for it.
TABLE_OPTIONS: Mapping[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_row_format": "DYNAMIC",
    "mysql_default_charset": "utf8mb4",
    "mysql_collate": "/*M! utf8mb4_nopad_bin */ /*!80017 utf8mb4_0900_bin */",
}

#: The key of the `info` of a table or an index for what is said of it when it is made.
#: SQLAlchemy imports a dialect for each such word: it hears those of the one in use.
OPTIONS = "celery_resilience.options"


class SqlDialect(ABC):
    """
    One kind of database.

    Attributes:
        name: SQLAlchemy's, with which the names of its options begin.
        driver: What a URL without a driver's name means.
        library: The module of that driver.
        extra: The extra that brings it.
        is_sqlite: Embedded: one host, one writer at a time.
        has_limits: It waits for an answer only as long as it is told to.
    """

    name: str
    driver: str
    library: str = ""
    extra: str = ""
    is_sqlite = False
    has_limits = True

    @abstractmethod
    def engine_options(self) -> dict[str, Any]:
        """Arguments of `create_engine`."""

    @abstractmethod
    def now(self) -> ColumnElement[float]:
        """The database's wall time in seconds, as an expression."""

    @abstractmethod
    def insert_new(
        self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]
    ) -> bool:
        """
        Insert *rows* of *table*, in the order of their primary keys.

        Returns:
            Whether all were new. If not, those that are there already stay as they
            are, and of the others nobody knows whether they are there now.
        """

    def prepare(self, engine: Engine) -> None:  # noqa: B027 -- most need nothing
        """Listen to a new engine."""

    def statements_options(self, connect_s: int, answer_s: int) -> dict[str, Any]:
        """Arguments of `create_engine`, for statements that are each a transaction."""
        options = self.engine_options()
        limits = self.limits(connect_s, answer_s)
        return {
            "connect_args": {**options["connect_args"], **limits},
            "isolation_level": "AUTOCOMMIT",
            "poolclass": NullPool,
            "pool_reset_on_return": None,
        }

    @abstractmethod
    def limits(self, connect_s: int, answer_s: int) -> dict[str, Any]:
        """The driver's words for how long it waits."""

    def prepare_for_statements(  # noqa: B027 -- most need nothing
        self, engine: Engine, answer_s: int
    ) -> None:
        """Listen to a new engine for statements that are each a transaction."""

    @abstractmethod
    def statement_now(self) -> ColumnElement[float]:
        """The database's wall time, the same in a whole statement; or a word `now`."""

    @abstractmethod
    def upsert(
        self,
        row: Mapping[Column[Any], Any],
        is_given: ColumnElement[Any],
        changes: Mapping[Column[Any], Any],
        mark: Column[Any],
    ) -> Insert:
        """
        Insert a row, or change the one that is there if it may be had.

        The row that is there is written in any case: a statement that only reads it
        may not see what another has just inserted.

        Args:
            row: Values of the new one, the primary key among them.
            is_given: Whether the one that is there may be had.
            changes: Its new values.
            mark: The column that is 1 if the row was inserted or given, else 0.
        """

    def create(
        self, connection: Connection, metadata: MetaData, tables: Sequence[Table]
    ) -> None:
        """Make those of *tables* that are missing, with their indexes."""
        self.set_options(tables)
        metadata.create_all(connection, tables)

    def set_options(self, tables: Sequence[Table]) -> None:
        """Tell *tables* what is said of them when they are made, in this database."""
        items: list[Table | Index] = [*tables]
        items += [index for table in tables for index in table.indexes]
        for item in items:
            for name, value in item.info.get(OPTIONS, {}).items():
                if name.startswith(f"{self.name}_"):
                    item.dialect_kwargs[name] = value

    def is_conflict(self, error: DBAPIError) -> bool:
        """Whether a transaction was given up for another's sake: it may be repeated."""
        return False

    def explain(self, error: DBAPIError, engine: Engine | None) -> str | None:
        """What an error means, where the driver's text does not say it."""
        return None


class Sqlite(SqlDialect):
    """SQLite: one host, one writer at a time."""

    name = "sqlite"
    driver = "sqlite"
    is_sqlite = True

    def engine_options(self) -> dict[str, Any]:
        """Wait for other writers; SqlDatabase may be used in any thread."""
        return {"connect_args": {"timeout": LOCK_TIMEOUT_S, "check_same_thread": False}}

    def prepare(self, engine: Engine) -> None:
        """Begin transactions ourselves, and write ahead."""
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)

    def statements_options(self, connect_s: int, answer_s: int) -> dict[str, Any]:
        """A word is sent once, however often a statement has it."""
        return super().statements_options(connect_s, answer_s) | {"paramstyle": "named"}

    def limits(self, connect_s: int, answer_s: int) -> dict[str, Any]:
        """For another process's lock."""
        return {"timeout": answer_s}

    def prepare_for_statements(self, engine: Engine, answer_s: int) -> None:
        """Let a statement be there when its process is killed, not its host."""

        def set_up(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA synchronous=NORMAL")
            cursor.execute(f"PRAGMA busy_timeout={answer_s * 1000}")
            cursor.close()

        event.listen(engine, "connect", set_up)

    def statement_now(self) -> ColumnElement[float]:
        """SQLite is on this host."""
        return bindparam("now", type_=Float)

    def upsert(
        self,
        row: Mapping[Column[Any], Any],
        is_given: ColumnElement[Any],
        changes: Mapping[Column[Any], Any],
        mark: Column[Any],
    ) -> Insert:
        """By ON CONFLICT."""
        from sqlalchemy.dialects.sqlite import insert

        return _on_conflict(insert, row, is_given, changes, mark)

    def now(self) -> ColumnElement[float]:
        """SQLite is on this host, so its time is this process's."""
        return literal(time.time(), Float)

    def insert_new(
        self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]
    ) -> bool:
        """By ON CONFLICT."""
        from sqlalchemy.dialects.sqlite import insert

        statement = insert(table).on_conflict_do_nothing()
        return _insert_each(connection, statement, rows)


class Postgresql(SqlDialect):
    """PostgreSQL."""

    name = "postgresql"
    driver = "postgresql+psycopg"
    library = "psycopg"
    extra = "postgres"
    has_limits = False

    def engine_options(self) -> dict[str, Any]:
        """Notice a dead connection before it is used, and a host that has vanished."""
        return {
            "connect_args": {
                "connect_timeout": CONNECT_TIMEOUT_S,
                # libpq's own, so that a pooler need not know them.
                "keepalives_idle": KEEPALIVE_S,
                "keepalives_interval": KEEPALIVE_S // 2,
                "keepalives_count": 2,
                "tcp_user_timeout": ANSWER_TIMEOUT_S * 1000,
            },
            **_POOL,
        }

    def limits(self, connect_s: int, answer_s: int) -> dict[str, Any]:
        """It has none for an answer."""
        return {"connect_timeout": connect_s}

    def statement_now(self) -> ColumnElement[float]:
        """Not clock_timestamp(), which goes on inside a statement."""
        return cast(func.extract("epoch", func.statement_timestamp()), Float(53))

    def upsert(
        self,
        row: Mapping[Column[Any], Any],
        is_given: ColumnElement[Any],
        changes: Mapping[Column[Any], Any],
        mark: Column[Any],
    ) -> Insert:
        """By ON CONFLICT."""
        from sqlalchemy.dialects.postgresql import insert

        return _on_conflict(insert, row, is_given, changes, mark)

    def now(self) -> ColumnElement[float]:
        """It goes on inside a transaction."""
        return cast(func.extract("epoch", func.clock_timestamp()), Float(53))

    def insert_new(
        self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]
    ) -> bool:
        """By ON CONFLICT."""
        from sqlalchemy.dialects.postgresql import insert

        statement = insert(table).on_conflict_do_nothing()
        return _insert_each(connection, statement, rows)

    def is_conflict(self, error: DBAPIError) -> bool:
        """A deadlock, or a serialization failure where that is the default."""
        return getattr(error.orig, "sqlstate", None) in ("40P01", "40001")


class Mysql(SqlDialect):
    """
    MySQL from 8.0.17, and MariaDB from 10.6.

    A session of ours depends on no default of the server's: it is strict (else a
    text that is too long is cut in silence), in UTC, and READ COMMITTED (else the
    gaps between rows are locked too).
    """

    name = "mysql"
    driver = "mysql+pymysql"
    library = "pymysql"
    extra = "mysql"

    TOO_LARGE = 1153
    LOCK_TIMEOUT, DEADLOCK, DUPLICATE = 1205, 1213, 1062
    LOST = (2006, 2013)

    SESSION = (
        "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', "
        "time_zone = '+00:00', "
        # A third each, so that what is repeated ends in time.
        f"innodb_lock_wait_timeout = {LOCK_TIMEOUT_S // 3}, "
        f"lock_wait_timeout = {LOCK_TIMEOUT_S}, "
        f"net_write_timeout = {READER_PAUSE_S}"
    )

    def engine_options(self) -> dict[str, Any]:
        """A session of ours, whatever the server's defaults."""
        return {
            "connect_args": {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": ANSWER_TIMEOUT_S,
                "write_timeout": ANSWER_TIMEOUT_S,
                "charset": "utf8mb4",
                "init_command": self.SESSION,
            },
            "isolation_level": "READ COMMITTED",
            **_POOL,
        }

    def prepare(self, engine: Engine) -> None:
        """Let a list end quietly whose server has died."""
        event.listen(engine, "handle_error", _forget_unread)

    def limits(self, connect_s: int, answer_s: int) -> dict[str, Any]:
        """For each piece of an answer."""
        return {
            "connect_timeout": connect_s,
            "read_timeout": answer_s,
            "write_timeout": answer_s,
        }

    def statement_now(self) -> ColumnElement[float]:
        """As of its statement."""
        return self.now()

    def upsert(
        self,
        row: Mapping[Column[Any], Any],
        is_given: ColumnElement[Any],
        changes: Mapping[Column[Any], Any],
        mark: Column[Any],
    ) -> Insert:
        """
        By ON DUPLICATE KEY UPDATE.

        It assigns from left to right, and what comes later sees the new values.
        """
        from sqlalchemy.dialects.mysql import insert

        statement = insert(mark.table).values({**row, mark: _ONE})
        assigned: list[tuple[str, Any]] = [
            (mark.name, case((is_given, _ONE), else_=_ZERO))
        ]
        for column, value in changes.items():
            given = case((mark == _ONE, value), else_=column)
            assigned.append((column.name, given))
        return statement.on_duplicate_key_update(assigned)

    def now(self) -> ColumnElement[float]:
        """As of its statement, so that an index may be used to compare with it."""
        return literal_column("UNIX_TIMESTAMP(NOW(6))", Float(53))

    def create(
        self, connection: Connection, metadata: MetaData, tables: Sequence[Table]
    ) -> None:
        """
        One process at a time: each statement is a transaction of its own.

        Indexes are looked at too, for who made the table may have died before them.
        """
        lock = "CONCAT('resilience:', MD5(DATABASE()))"
        got = connection.execute(text(f"SELECT GET_LOCK({lock}, {LOCK_TIMEOUT_S})"))
        if got.scalar() != 1:
            raise TimeoutError("another process is making tables")
        try:
            super().create(connection, metadata, tables)
            for table in tables:
                found = inspect(connection).get_indexes(table.name)
                names = {index["name"] for index in found}
                for index in table.indexes:
                    if index.name not in names:
                        index.create(connection)
        finally:
            connection.execute(text(f"SELECT RELEASE_LOCK({lock})"))

    def insert_new(
        self, connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Not by INSERT IGNORE, which would ignore also that a text is too long."""
        try:
            connection.execute(table.insert(), rows)
        except IntegrityError as exc:
            if _code(exc) != self.DUPLICATE:
                raise
            return False
        return True

    def is_conflict(self, error: DBAPIError) -> bool:
        """A deadlock, or a lock that another transaction holds for too long."""
        return _code(error) in (self.DEADLOCK, self.LOCK_TIMEOUT)

    def explain(self, error: DBAPIError, engine: Engine | None) -> str | None:
        """
        Tell a row that is too large from a server that is away.

        The server breaks the connection then, often before its reason arrives.
        """
        code = _code(error)
        if code not in (self.TOO_LARGE, *self.LOST) or engine is None:
            return None
        if error.statement is None or not error.params:  # lost at a commit
            return None
        try:
            with engine.connect() as connection:
                query = text("SELECT @@max_allowed_packet")
                limit = int(connection.execute(query).scalar_one())
                size = _largest(error, connection)
        except OperationalError:
            return None
        if code != self.TOO_LARGE and size < limit:
            return None
        return (
            f"a row of {size / 2**20:.1f} MiB, as it is sent, is more than the "
            f"server's max_allowed_packet of {limit / 2**20:.1f} MiB: raise that; "
            "until then nothing of its batch is stored, or removed from its queue"
        )


_POOL: Mapping[str, Any] = {"pool_size": 2, "max_overflow": 4, "pool_pre_ping": True}

_DIALECTS: Mapping[str, type[SqlDialect]] = {
    "sqlite": Sqlite,
    "postgresql": Postgresql,
    "mysql": Mysql,
    "mariadb": Mysql,
}


def dialect_of(url: URL) -> tuple[SqlDialect, URL]:
    """The dialect for *url*, and the URL with its driver."""
    name, _, driver = url.drivername.partition("+")
    dialect = _DIALECTS[name]()
    if not driver:
        return dialect, url.set(drivername=dialect.driver)
    # SQLAlchemy tells MariaDB from MySQL by itself.
    name = dialect.driver.partition("+")[0]
    return dialect, url.set(drivername=f"{name}+{driver}")


_ZERO, _ONE = literal_column("0", Integer), literal_column("1", Integer)


def _on_conflict(
    insert: Any,
    row: Mapping[Column[Any], Any],
    is_given: ColumnElement[Any],
    changes: Mapping[Column[Any], Any],
    mark: Column[Any],
) -> Insert:
    table = mark.table
    statement: Insert = (
        insert(table)
        .values({**row, mark: _ONE})
        .on_conflict_do_update(
            index_elements=[*table.primary_key],
            set_={
                mark: case((is_given, _ONE), else_=_ZERO),
                **{
                    column: case((is_given, value), else_=column)
                    for column, value in changes.items()
                },
            },
        )
    )
    return statement


def _insert_each(
    connection: Connection, statement: Insert, rows: Sequence[Mapping[str, Any]]
) -> bool:
    """
    Execute *statement* for each of *rows*; psycopg waits for no answer in between.

    RETURNING would tell which were new, but needs all rows in one statement: with
    some ten thousand parameters, that takes the drivers three times as long.
    """
    options = {"preserve_rowcount": True}
    result = connection.execute(statement, rows, execution_options=options)
    return result.rowcount == len(rows)


def _code(error: DBAPIError) -> int | None:
    """The number of an error of MySQL's."""
    args = getattr(error.orig, "args", ())
    return args[0] if args and isinstance(args[0], int) else None


def _largest(error: DBAPIError, connection: Connection) -> int:
    """Bytes of the largest row that a statement of pymysql's sent."""
    sent: Any = error.params
    rows = sent if isinstance(sent, list) else [sent]
    row = max(rows, key=lambda row: sum(_length(value) for value in row))
    mogrify = getattr(connection.connection.cursor(), "mogrify", None)
    return 0 if mogrify is None else len(mogrify(error.statement, row))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, bytes | str) else 0


def _forget_unread(error: ExceptionContext) -> None:
    # pymysql (1.2) reads what is left of a result as it forgets it: from a broken
    # connection that is an AttributeError, printed by the interpreter.
    cursor = getattr(error.execution_context, "cursor", None)
    result = getattr(cursor, "_result", None)
    if error.is_disconnect and result is not None:
        result.unbuffered_active = False


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN comes too late to be IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={LOCK_TIMEOUT_S * 1000}")
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """
    Let readers and a writer not wait for each other.

    SQLite refuses at once, whatever its timeout, where several processes change a
    new file's mode together.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes then could not wait for a lock.
    writes = connection.get_execution_options().get("resilience_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
