"""The table of `once`, which is in the user's database: not one of our store's."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Double,
    Engine,
    Index,
    MetaData,
    String,
    Table,
    Text,
    inspect,
)
from sqlalchemy.dialects.mysql import LONGTEXT
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable

from celery_resilience.errors import ConfigurationError
from celery_resilience.idempotency.once.sql import NAME_CHARS, TABLE
from celery_resilience.stores.sql_dialects import TABLE_OPTIONS, dialect_of

#: By (namespace, created_at): keys are purged by their age.
INDEX = "resilience_once_age"
INDEXED = ("namespace", "created_at")

OPTIONS = TABLE_OPTIONS


def columns() -> list[Column[Any]]:
    """New columns, of types that Alembic finds again in each kind of database."""
    return [
        Column("key", String(64), primary_key=True),
        Column("namespace", String(64), nullable=False),
        Column("name", String(NAME_CHARS), nullable=False),
        Column("result", Text().with_variant(LONGTEXT(), "mysql", "mariadb")),
        Column("created_at", Double(), nullable=False),
    ]


def once_table(metadata: MetaData) -> Table:
    """
    The table as a part of *metadata*, the user's own.

    Their `create_all` makes it then, and Alembic's autogenerate neither misses it nor
    drops it.
    """
    table = Table(TABLE, metadata, *columns(), **OPTIONS)
    Index(INDEX, *(table.c[name] for name in INDEXED))
    return table


def create(bind: Engine | Connection) -> None:
    """
    Make the table where it is missing; another process may do so at the same time.

    Args:
        bind: An engine; or a connection, in whose transaction the table is made.

    Raises:
        ConfigurationError: Neither; or no such kind of database is known.
    """
    table = once_table(MetaData())
    if isinstance(bind, Connection):
        _create(bind, table)
        return
    if not isinstance(bind, Engine):
        raise ConfigurationError(
            "create_once_table needs an Engine or a Connection of SQLAlchemy, not a "
            f"{type(bind).__qualname__}; of an AsyncEngine, "
            "`await connection.run_sync(resilience.create_once_table)`"
        )
    try:
        with bind.begin() as connection:
            _create(connection, table)
    except DBAPIError:
        if not inspect(bind).has_table(TABLE):
            raise


def _create(connection: Connection, table: Table) -> None:
    try:
        dialect, _ = dialect_of(connection.engine.url)
    except KeyError:
        raise ConfigurationError(
            "once works in SQLite, PostgreSQL, MariaDB and MySQL, not in "
            f"{connection.dialect.name}"
        ) from None
    dialect.create(connection, table.metadata, [table])


def ddl(database: str) -> str:
    """
    The statements that make the table.

    Args:
        database: sqlite, postgresql or mysql; MariaDB takes those of MySQL.
    """
    from sqlalchemy.dialects import mysql, postgresql, sqlite

    dialects: dict[str, Any] = {
        "sqlite": sqlite,
        "postgresql": postgresql,
        "mysql": mysql,
    }
    dialect = dialects[database].dialect()
    table = once_table(MetaData())
    statements = [str(CreateTable(table).compile(dialect=dialect))]
    for index in table.indexes:
        statements.append(str(CreateIndex(index).compile(dialect=dialect)))
    return ";\n\n".join(text.strip() for text in statements) + ";\n"
