"""`once` in a transaction of SQLAlchemy's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from celery_resilience.errors import ConfigurationError

Result = TypeVar("Result")

#: `sqlite3.LEGACY_TRANSACTION_CONTROL`, which Python 3.11 has no name for.
_LEGACY = -1


def is_async(session: Any) -> bool:
    """Whether the answer must be awaited."""
    modules = [cls.__module__ for cls in session.__class__.__mro__]
    return any(module.startswith("sqlalchemy.ext.asyncio") for module in modules)


async def run(session: Any, work: Callable[[SqlalchemyTransaction], Result]) -> Result:
    """
    Do *work* in the transaction of an asynchronous session or connection.

    Raises:
        ConfigurationError: It is of another kind.
    """
    from sqlalchemy.ext.asyncio import (
        AsyncConnection,
        AsyncSession,
        async_scoped_session,
    )

    if isinstance(session, async_scoped_session):
        session = session()
    if not isinstance(session, AsyncSession | AsyncConnection):
        raise _refused(session)
    done: Result = await session.run_sync(lambda inner: work(transaction_of(inner)))
    return done


def transaction_of(session: Any) -> SqlalchemyTransaction:
    """
    The transaction of a session or connection, begun if it was not.

    Raises:
        ConfigurationError: It is of another kind.
    """
    if isinstance(session, scoped_session):
        session = session()
    if not isinstance(session, Session | Connection):
        raise _refused(session)
    return SqlalchemyTransaction(session)


def _refused(session: Any) -> ConfigurationError:
    return ConfigurationError(
        "once needs a Session, scoped_session, Connection, AsyncSession, "
        "async_scoped_session or AsyncConnection of SQLAlchemy: what has a "
        f"transaction. {type(session).__qualname__} has none"
    )


class SqlalchemyTransaction:
    """
    `sql.Transaction` of a session or connection.

    Args:
        session: The caller's; it begins by itself, as with every statement.
    """

    def __init__(self, session: Session | Connection) -> None:
        self._session = session
        self._connection = _connection_of(session)
        if not self._connection.in_transaction():
            self._connection.begin()
        self._root = self._connection.get_transaction()

    @property
    def vendor(self) -> str:
        """The kind of database; MariaDB speaks MySQL."""
        name = self._connection.dialect.name
        return "mysql" if name == "mariadb" else name

    def check(self) -> None:
        """
        Make sure that the driver does not commit each statement by itself.

        Raises:
            ConfigurationError: It does; or SQLite would commit at a savepoint's end.
        """
        fairy = self._connection.connection
        driver: Any = fairy.driver_connection
        if self.vendor != "sqlite":
            if _commits_by_itself(fairy.dbapi_connection):
                raise _no_transaction()
            return
        # sqlite3 begins a transaction before it writes, unless it is told not to.
        mode = getattr(driver, "autocommit", _LEGACY)
        begins_late = mode == _LEGACY and driver.isolation_level is not None
        if not begins_late and not driver.in_transaction:
            raise _no_transaction()
        if begins_late and self._connection.in_nested_transaction():
            raise ConfigurationError(
                "once in a savepoint of SQLite: Python's sqlite3 begins no transaction "
                "before SAVEPOINT, so that the savepoint's end would commit the key "
                "without what follows. Call once before begin_nested(), or let "
                "SQLAlchemy begin transactions, as its page about SQLite tells"
            )

    def is_current(self) -> bool:
        """Whether the session still has the transaction that it had."""
        connection = self._connection
        if isinstance(self._session, Session):
            if not self._session.in_transaction():
                return False
            connection = self._session.connection()
        return not connection.closed and connection.get_transaction() is self._root

    def write(self, sql: str, values: Mapping[str, Any]) -> int:
        """Send a statement; how many rows it wrote."""
        return self._connection.execute(text(sql), dict(values)).rowcount

    def read(self, sql: str, values: Mapping[str, Any]) -> Sequence[Any] | None:
        """The one row that a query finds, or None."""
        row = self._connection.execute(text(sql), dict(values)).first()
        return None if row is None else tuple(row)

    def cause(self, error: Exception) -> BaseException | None:
        """The driver's own error."""
        return error.orig if isinstance(error, DBAPIError) else None


def _connection_of(session: Session | Connection) -> Connection:
    return session.connection() if isinstance(session, Session) else session


def _commits_by_itself(driver: Any) -> bool:
    """
    Whether a driver's connection is in its mode AUTOCOMMIT.

    Asked of the driver, because it costs no round trip, and knows what an engine, a
    connection or the user's own code has set.
    """
    ask = getattr(driver, "get_autocommit", None)  # MySQL's drivers
    return bool(ask() if ask is not None else getattr(driver, "autocommit", False))


def _no_transaction() -> ConfigurationError:
    return ConfigurationError(
        "once: this connection is in AUTOCOMMIT, where the key would be committed "
        "before its effect: use one with another isolation_level"
    )
