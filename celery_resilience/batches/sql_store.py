"""Places in a SQL database: a row for each task and stream."""

from __future__ import annotations

from sqlalchemy import (
    Column,
    Connection,
    Float,
    LargeBinary,
    String,
    delete,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from celery_resilience.batches.store import KEEP_FINISHED_S, KEEP_S
from celery_resilience.stores.sql import SqlDatabase, table

VERSION = 1

checkpoints = table(
    "resilience_checkpoints",
    Column("namespace", String(64), primary_key=True),
    Column("task_id", String(255), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("place", LargeBinary, nullable=False),
    Column("expires_at", Float(53), nullable=False, index=True),
)

TABLES = [checkpoints]

#: Rows past their time that the end of a task removes.
PURGED = 100


class SqlCheckpointStore:
    """
    `CheckpointStore` in a SQL database.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
    """

    def __init__(self, database: SqlDatabase, namespace: str) -> None:
        self._database = database
        self._namespace = namespace

    def load(self, task_id: str, name: str) -> bytes | None:
        """The place that was saved last, or None."""
        self._ready()
        query = select(checkpoints.c.place).where(
            *self._of(task_id),
            checkpoints.c.name == name,
            checkpoints.c.expires_at > self._database.now(),
        )
        with self._database.reading() as connection:
            found: bytes | None = connection.execute(query).scalar()
        return found

    def save(self, task_id: str, name: str, place: bytes) -> None:
        """Remember *place*."""
        self._ready()
        values = {"place": place, "expires_at": self._database.now() + KEEP_S}
        known = (
            update(checkpoints)
            .where(*self._of(task_id), checkpoints.c.name == name)
            .values(values)
        )
        new = checkpoints.insert().values(
            namespace=self._namespace, task_id=task_id[:255], name=name, **values
        )

        def saved(connection: Connection) -> None:
            if not connection.execute(known).rowcount:
                connection.execute(new)

        self._database.write(saved)

    def finished(self, task_id: str) -> None:
        """The task has ended well; what is past its time goes."""
        self._ready()
        now = self._database.now()
        known = (
            update(checkpoints)
            .where(*self._of(task_id))
            .values(expires_at=now + KEEP_FINISHED_S)
        )
        key = (checkpoints.c.namespace, checkpoints.c.task_id, checkpoints.c.name)
        old = select(*key).where(checkpoints.c.expires_at <= now).limit(PURGED)

        def told(connection: Connection) -> None:
            connection.execute(known)
            for row in connection.execute(old).all():
                where = [
                    column == value for column, value in zip(key, row, strict=True)
                ]
                connection.execute(
                    delete(checkpoints).where(*where, checkpoints.c.expires_at <= now)
                )

        self._database.write(told)

    def _of(self, task_id: str) -> tuple[ColumnElement[bool], ...]:
        return (
            checkpoints.c.namespace == self._namespace,
            checkpoints.c.task_id == task_id[:255],
        )

    def _ready(self) -> None:
        self._database.ready("batches", VERSION, TABLES)
