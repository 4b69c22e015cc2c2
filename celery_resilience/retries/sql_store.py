"""Budgets in a SQL database: a row for each."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, Float, String, case, literal, select, update

from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.store import Withdrawal
from celery_resilience.stores.sql import SqlDatabase, table

ROOM = "retries"
VERSION = 1

budgets = table(
    "resilience_retry_budgets",
    Column("namespace", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("tokens", Float(53), nullable=False),
    Column("changed_at", Float(53), nullable=False),
)

TABLES = [budgets]


class SqlBudgetStore:
    """
    `BudgetStore` in a SQL database.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
    """

    def __init__(self, database: SqlDatabase, namespace: str) -> None:
        self._database = database
        self._namespace = namespace

    def withdraw(
        self, name: str, options: BudgetOptions, *, added: float, max_wait_s: float
    ) -> Withdrawal:
        """Take one retry from the budget *name*; others who ask wait for it."""
        self._database.ready(ROOM, VERSION, TABLES)
        most = literal(float(options.most), Float(53))
        now: Any = self._database.now()
        mine = (budgets.c.namespace == self._namespace, budgets.c.name == name)
        row = {
            "namespace": self._namespace,
            "name": name,
            "tokens": float(options.most),
            "changed_at": 0.0,
        }
        passed_s = now - budgets.c.changed_at
        gained = case((passed_s > 0, passed_s), else_=0.0) * options.per_s
        filled = budgets.c.tokens + added + gained
        # MySQL assigns from left to right.
        fill = (
            update(budgets)
            .where(*mine)
            .ordered_values(
                (budgets.c.tokens, case((filled > most, most), else_=filled)),
                (
                    budgets.c.changed_at,
                    case((passed_s > 0, now), else_=budgets.c.changed_at),
                ),
            )
        )
        take = (
            update(budgets)
            .where(*mine, budgets.c.tokens >= 1 - max_wait_s * options.per_s)
            .values(tokens=budgets.c.tokens - 1)
        )
        look = select(budgets.c.tokens).where(*mine)

        def took(connection: Connection) -> Withdrawal:
            if not connection.execute(fill).rowcount:
                self._database.insert_new(connection, budgets, [row])
                connection.execute(fill)
            if not connection.execute(take).rowcount:
                return Withdrawal(False, max_wait_s)
            left = float(connection.execute(look).scalar_one())
            return Withdrawal(True, max(0.0, -left / options.per_s))

        return self._database.write(took)
