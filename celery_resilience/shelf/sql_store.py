"""The shelf in a SQL database: a row for each message."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    Index,
    String,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from celery_resilience.shelf.store import Claimed, Shelved
from celery_resilience.stores.sql import LongText, SqlDatabase, table

ROOM = "shelf"
VERSION = 1

shelf = table(
    "resilience_shelf",
    Column("namespace", String(64), primary_key=True),
    Column("id", String(32), primary_key=True),
    # When it may be claimed: it is due, or its claim has lapsed.
    Column("due_at", Float(53), nullable=False),
    Column("token", String(32), nullable=False),
    Column("text", LongText, nullable=False),
    Index("resilience_shelf_due", "namespace", "due_at"),
)

TABLES = [shelf]


class SqlShelfStore:
    """
    `ShelfStore` in a SQL database.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
    """

    def __init__(self, database: SqlDatabase, namespace: str) -> None:
        self._database = database
        self._namespace = namespace

    def put(self, messages: Sequence[tuple[Shelved, float]]) -> None:
        """Keep messages, in one transaction."""
        self._ready()

        def kept(connection: Connection) -> None:
            now = connection.execute(select(self._database.now())).scalar_one()
            rows = [
                {
                    "namespace": self._namespace,
                    "id": message.id,
                    "due_at": float(now) + delay_s,
                    "token": "",
                    "text": message.text,
                }
                for message, delay_s in messages
            ]
            connection.execute(shelf.insert(), rows)

        self._database.write(kept)

    def claim(self, limit: int, lease_s: float) -> Claimed:
        """Take messages that are due, in one transaction."""
        self._ready()
        is_due = (self._mine(), shelf.c.due_at <= self._database.now())
        first = select(shelf.c.id).where(*is_due).order_by(shelf.c.due_at).limit(limit)
        token = secrets.token_hex(16)

        def claimed(connection: Connection) -> Claimed:
            ids = connection.execute(first).scalars().all()
            rows: Sequence[Any] = ()
            if ids:
                # Another process may have been quicker with some.
                connection.execute(
                    update(shelf)
                    .where(*is_due, shelf.c.id.in_(sorted(ids)))
                    .values(token=token, due_at=self._database.now() + lease_s)
                )
                mine = select(shelf.c.id, shelf.c.text).where(
                    self._mine(), shelf.c.token == token, shelf.c.id.in_(ids)
                )
                rows = connection.execute(mine).all()
            wait_s = func.min(shelf.c.due_at) - self._database.now()
            query = select(wait_s, func.count()).where(self._mine())
            next_s, count = connection.execute(query).one()
            return Claimed(
                [Shelved(*row) for row in rows],
                None if next_s is None else float(next_s),
                count - len(rows),
            )

        return self._database.write(claimed)

    def remove(self, ids: Sequence[str]) -> None:
        """Forget messages, in one transaction."""
        if not ids:
            return
        self._ready()
        gone = delete(shelf).where(self._mine(), shelf.c.id.in_(sorted(ids)))
        self._database.write(lambda connection: connection.execute(gone).rowcount)

    def _mine(self) -> ColumnElement[bool]:
        return shelf.c.namespace == self._namespace

    def _ready(self) -> None:
        self._database.ready(ROOM, VERSION, TABLES)
