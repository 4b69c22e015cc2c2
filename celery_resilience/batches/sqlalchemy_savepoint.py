"""A savepoint around each item, so that one that fails leaves its chunk as it was."""

from __future__ import annotations

from typing import Any


def savepoint(session: Any) -> Any:
    """
    Begin one in *session*; what it returns is a context manager.

    sqlite3 begins a transaction before it changes a row, and not before a savepoint:
    the end of the outermost one would commit (SQLAlchemy 2.0, dialects/sqlite).
    """
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        if not getattr(driver, "in_transaction", True):
            connection.exec_driver_sql("BEGIN")
    return session.begin_nested()
