"""`once` in a transaction of Django's.

Django is imported when an alias is looked up: whoever has a connection has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from celery_resilience.errors import ConfigurationError, MissingExtra

_VALUE = re.compile(r":(\w+)")


def transaction_of(session: Any) -> DjangoTransaction:
    """
    The transaction of a connection, or of the connection with that alias.

    Raises:
        MissingExtra: Django is not installed.
        ConfigurationError: It is no connection to a database.
    """
    if isinstance(session, str):
        try:
            from django.db import connections
        except ModuleNotFoundError as exc:
            raise MissingExtra.of(
                "django", "django", f"once with the alias {session!r} of a database"
            ) from exc
        session = connections[session]
    if not hasattr(session, "in_atomic_block"):
        raise ConfigurationError(
            "once needs a connection of Django's (django.db.connection, or "
            "connections[alias]) or its alias; "
            f"a {type(session).__qualname__} is neither"
        )
    return DjangoTransaction(session)


class DjangoTransaction:
    """
    `sql.Transaction` of a Django connection.

    Args:
        connection: `django.db.connection`, or one of `connections`.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def vendor(self) -> str:
        """The kind of database; MariaDB is MySQL to Django."""
        return str(self._connection.vendor)

    def check(self) -> None:
        """
        Make sure that there is a transaction.

        Raises:
            ConfigurationError: Each statement is committed by itself.
        """
        if not self.is_current():
            raise ConfigurationError(
                "once: the key would be committed before its effect; call it inside "
                f"transaction.atomic(using={self._connection.alias!r})"
            )

    def is_current(self) -> bool:
        """Whether there is a transaction; which one it is, Django does not tell."""
        connection = self._connection
        return bool(connection.in_atomic_block or not connection.get_autocommit())

    def write(self, sql: str, values: Mapping[str, Any]) -> int:
        """Send a statement; how many rows it wrote."""
        with self._connection.cursor() as cursor:
            cursor.execute(*_positional(sql, values))
            return int(cursor.rowcount)

    def read(self, sql: str, values: Mapping[str, Any]) -> Sequence[Any] | None:
        """The one row that a query finds, or None."""
        with self._connection.cursor() as cursor:
            cursor.execute(*_positional(sql, values))
            row: Sequence[Any] | None = cursor.fetchone()
            return row

    def cause(self, error: Exception) -> BaseException | None:
        """The driver's own error, which Django has wrapped in one of its own."""
        return error.__cause__


def _positional(sql: str, values: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The statement as every driver below Django takes it."""
    names: list[str] = _VALUE.findall(sql)
    return _VALUE.sub("%s", sql), [values[name] for name in names]
