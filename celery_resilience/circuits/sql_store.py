"""Circuits in a SQL database: a row for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    Integer,
    SmallInteger,
    String,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from celery_resilience.circuits.store import Answer, Stored
from celery_resilience.stores.sql import LongText, SqlDatabase, table

ROOM = "circuits"
VERSION = 1

circuits = table(
    "resilience_circuits",
    Column("namespace", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("version", String(32), nullable=False),
    # Whether the last statement that asked for the row was given it.
    Column("is_given", SmallInteger, nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("text", LongText, nullable=False),
)

tickets = table(
    "resilience_circuit_tickets",
    Column("namespace", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("taken", Integer, nullable=False),
)

slots = table(
    "resilience_circuit_slots",
    Column("namespace", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("token", String(32), primary_key=True),
    Column("lease_until", Float(53), nullable=False),
)

TABLES = [circuits, tickets, slots]


class SqlCircuitStore:
    """
    `CircuitStore` in a SQL database.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
    """

    def __init__(self, database: SqlDatabase, namespace: str) -> None:
        self._database = database
        self._namespace = namespace

    def read(self, names: Sequence[str]) -> Answer:
        """The circuits of these names, in one round trip."""
        self._ready()
        now = self._database.now()
        query = (
            select(now, circuits.c.name, circuits.c.version, circuits.c.text)
            .where(self._mine(), circuits.c.name.in_(names))
            .where(circuits.c.expires_at > now)
            # The time is told also where there is no row.
            .union_all(select(now, literal(""), literal(""), literal("")))
        )
        rows = self._database.statements.run_once(query).rows
        found = {row[1]: Stored(row[2], row[3]) for row in rows if row[1]}
        return Answer(float(rows[0][0]), found)

    def swap(self, name: str, seen: str, new: Stored, *, keep_s: float) -> Answer:
        """Replace a circuit if it still is of the version *seen*."""
        self._ready()
        now = self._database.now()
        values: dict[Column[Any], Any] = {
            circuits.c.version: literal(new.version),
            circuits.c.text: literal(new.text, LongText),
            circuits.c.expires_at: now + keep_s,
        }
        statement: Any
        if seen:
            statement = (
                update(circuits)
                .where(self._mine(), circuits.c.name == name)
                .where(circuits.c.version == seen, circuits.c.expires_at > now)
                .values(values)
            )
        else:
            row = {
                circuits.c.namespace: literal(self._namespace),
                circuits.c.name: literal(name),
                **values,
            }
            is_forgotten = or_(circuits.c.expires_at <= now, circuits.c.version == "")
            statement = self._database.dialect.upsert(
                row, is_forgotten, values, circuits.c.is_given
            )
        self._database.statements.run_once(statement)
        return self.read([name])

    def tickets(self, name: str, generation: int, count: int, *, keep_s: float) -> int:
        """Take tickets; those of an older generation are forgotten."""
        self._ready()
        mine = (tickets.c.namespace == self._namespace, tickets.c.name == name)
        row = self._ticket_row(name, generation)
        is_same = tickets.c.generation == generation
        # MySQL assigns from left to right.
        taken = (
            update(tickets)
            .where(*mine)
            .ordered_values(
                (tickets.c.taken, case((is_same, tickets.c.taken), else_=0) + count),
                (tickets.c.generation, generation),
            )
        )

        def took(connection: Connection) -> int:
            self._database.insert_new(connection, tickets, [row])
            connection.execute(taken)
            query = select(tickets.c.taken).where(*mine)
            return int(connection.execute(query).scalar_one())

        return self._database.write(took) - count

    def take_slot(self, name: str, token: str, *, limit: int, lease_s: float) -> bool:
        """Take one of *limit* slots for a task that runs."""
        self._ready()
        now = self._database.now()
        mine = (slots.c.namespace == self._namespace, slots.c.name == name)
        # One at a time: who counts has this row.
        locked = (
            update(tickets)
            .where(tickets.c.namespace == self._namespace, tickets.c.name == name)
            .values(taken=tickets.c.taken)
        )

        def took(connection: Connection) -> bool:
            row = self._ticket_row(name, 0)
            self._database.insert_new(connection, tickets, [row])
            connection.execute(locked)
            connection.execute(delete(slots).where(*mine, slots.c.lease_until <= now))
            query = select(func.count()).select_from(slots).where(*mine)
            if connection.execute(query).scalar_one() >= limit:
                return False
            connection.execute(
                slots.insert().values(
                    namespace=self._namespace,
                    name=name,
                    token=token,
                    lease_until=now + lease_s,
                )
            )
            return True

        return self._database.write(took)

    def give_slot(self, name: str, token: str) -> None:
        """Give a slot back."""
        self._ready()
        statement = delete(slots).where(
            slots.c.namespace == self._namespace,
            slots.c.name == name,
            slots.c.token == token,
        )
        self._database.statements.run_once(statement)

    def _ticket_row(self, name: str, generation: int) -> dict[str, Any]:
        row: dict[str, Any] = {"namespace": self._namespace, "name": name}
        return {**row, "generation": generation, "taken": 0}

    def names(self) -> Sequence[str]:
        """The circuits that are not forgotten; those that are go."""
        self._ready()
        now = self._database.now()
        past = delete(circuits).where(self._mine(), circuits.c.expires_at <= now)
        self._database.statements.run_once(past)
        query = select(circuits.c.name).where(self._mine()).order_by(circuits.c.name)
        return [row[0] for row in self._database.statements.run_once(query).rows]

    def _mine(self) -> ColumnElement[bool]:
        return circuits.c.namespace == self._namespace

    def _ready(self) -> None:
        self._database.ready(ROOM, VERSION, TABLES)
