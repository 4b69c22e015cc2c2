"""Starts of redelivered messages in a SQL database."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    String,
    delete,
    select,
)

from celery_resilience.stores.sql import SqlDatabase, table

VERSION = 1

starts = table(
    "resilience_starts",
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("namespace", String(64), nullable=False, index=True),
    Column("message", String(32), nullable=False, index=True),
    Column("worker", String(255), nullable=False),
    Column("is_alone", Boolean, nullable=False),
    Column("started_at", Float(53), nullable=False),
)

TABLES = [starts]


class SqlStartStore:
    """
    `StartStore` in a SQL database.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
    """

    def __init__(self, database: SqlDatabase, namespace: str) -> None:
        self._database = database
        self._namespace = namespace

    def unfinished(self, key: str, *, window_s: float) -> list[bool]:
        """The starts of *key* that never ended, oldest first."""
        self._ready()
        query = (
            select(starts.c.is_alone)
            .where(
                starts.c.namespace == self._namespace,
                starts.c.message == key,
                starts.c.started_at > self._database.now() - window_s,
            )
            .order_by(starts.c.number)
        )
        with self._database.reading() as connection:
            return [bool(alone) for alone in connection.execute(query).scalars()]

    def record(self, key: str, *, is_alone: bool, worker: str) -> None:
        """Remember that a run of *key* starts now in *worker*."""
        self._ready()

        def recorded(connection: Connection) -> None:
            connection.execute(
                starts.insert().values(
                    namespace=self._namespace,
                    message=key,
                    worker=worker[:255],
                    is_alone=is_alone,
                    started_at=self._database.now(),
                )
            )

        self._database.write(recorded)

    def clear(self, key: str) -> None:
        """Forget the starts of *key*: a run has ended."""
        self._ready()
        statement = delete(starts).where(
            starts.c.namespace == self._namespace, starts.c.message == key
        )
        self._database.write(lambda connection: connection.execute(statement))

    def clear_worker(self, worker: str) -> None:
        """Forget the starts in *worker*: it was asked to stop."""
        self._ready()
        statement = delete(starts).where(
            starts.c.namespace == self._namespace, starts.c.worker == worker[:255]
        )
        self._database.write(lambda connection: connection.execute(statement))

    def _ready(self) -> None:
        self._database.ready("crashes", VERSION, TABLES)
