"""What each driver says of its connection without a round trip, and how it cancels.

No driver is imported: whoever has a connection has its driver, and tells it by its
module's name. Psycopg 3 (3.1 to 3.3), psycopg 2 (2.8 to 2.9), asyncpg, PyMySQL,
mysqlclient and sqlite3 are known; of another, nothing is said.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from typing import Any

from celery_resilience.sessions.policy import LISTEN, LOCK, TEMPORARY, DriverState

#: Seconds that a cancellation may take.
CANCEL_S = 2.0

#: libpq's PQtransactionStatus, which both of psycopg hand over.
_LIBPQ = {
    0: DriverState.IDLE,
    1: DriverState.BUSY,
    2: DriverState.IN_TRANSACTION,
    3: DriverState.FAILED,
    4: DriverState.DEAD,
}

#: A flag of MySQL's protocol: SERVER_STATUS_IN_TRANS.
_MYSQL_IN_TRANSACTION = 1


def _libpq_state(connection: Any) -> DriverState:
    if connection.closed:
        return DriverState.DEAD
    status = int(connection.info.transaction_status)
    return _LIBPQ.get(status, DriverState.UNSAID)


def _sqlite_state(connection: Any) -> DriverState:
    return DriverState.IN_TRANSACTION if connection.in_transaction else DriverState.IDLE


def _pymysql_state(connection: Any) -> DriverState:
    if not connection.open:
        return DriverState.DEAD
    if connection.server_status & _MYSQL_IN_TRANSACTION:
        return DriverState.IN_TRANSACTION
    # Not told of a statement under REPEATABLE READ that has only read; a rollback
    # is the driver's business, and one round trip.
    return DriverState.UNSAID


def _asyncpg_state(connection: Any) -> DriverState:
    if connection.is_closed():
        return DriverState.DEAD
    return (
        DriverState.IN_TRANSACTION
        if connection.is_in_transaction()
        else DriverState.IDLE
    )


_STATES: dict[str, Callable[[Any], DriverState]] = {
    "psycopg": _libpq_state,
    "psycopg2": _libpq_state,
    "sqlite3": _sqlite_state,
    "pymysql": _pymysql_state,
    "asyncpg": _asyncpg_state,
}


#: Drivers, by the classes of their connections.
_libraries: dict[type, str] = {}


def library_of(connection: Any) -> str:
    """The driver of a connection, by the name of the package of its class."""
    kind = type(connection)
    found = _libraries.get(kind)
    if found is None:
        packages = [cls.__module__.partition(".")[0] for cls in kind.__mro__]
        known = (name for name in packages if name in _STATES or name == "MySQLdb")
        found = _libraries[kind] = next(known, packages[0])
    return found


def state_of(connection: Any) -> DriverState:
    """The state of a driver's connection; no round trip."""
    read = _STATES.get(library_of(connection))
    if read is None:
        return DriverState.UNSAID
    try:
        return read(connection)
    except Exception:
        # Closed under our feet, or of a release that has other names.
        return DriverState.UNSAID


def is_readable(connection: Any) -> bool:
    """
    Whether the server has sent what nobody has asked for; no round trip.

    An idle connection that was ended by its server is readable.
    """
    try:
        number = _descriptor(connection)
        if number is None:
            return False
        if number < 0:
            return True
        poll = select.poll()
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))
    except Exception:
        # A driver that raises here has no socket any more.
        return True


def _descriptor(connection: Any) -> int | None:
    library = library_of(connection)
    if library in ("psycopg", "psycopg2"):
        return int(connection.fileno())
    if library == "pymysql":
        sock = getattr(connection, "_sock", None)
        return -1 if sock is None else int(sock.fileno())
    return None


def is_alive(connection: Any) -> bool:
    """Ask the server; one round trip, outside any transaction."""
    try:
        ping = getattr(connection, "ping", None)
        if library_of(connection) in ("pymysql", "MySQLdb") and ping is not None:
            ping(False)
            return True
        cursor = connection.cursor()
        try:
            cursor.execute("SELECT 1")
            cursor.fetchall()
        finally:
            cursor.close()
        if not getattr(connection, "autocommit", False):
            connection.rollback()
    except Exception:
        return False
    return True


def cancel(connection: Any, connect_again: Callable[[], Any] | None = None) -> None:
    """
    Cancel on the server what *connection* has not waited for; a round trip or two.

    Args:
        connection: The driver's.
        connect_again: Makes another connection of the driver's to the same server,
            where the protocol needs one.
    """
    library = library_of(connection)
    if library == "psycopg":
        safely = getattr(connection, "cancel_safe", None)
        if safely is not None:
            safely(timeout=CANCEL_S)
        else:
            connection.cancel()
    elif library == "psycopg2":
        connection.cancel()
    elif library in ("pymysql", "MySQLdb") and connect_again is not None:
        number = int(connection.thread_id())
        with contextlib.closing(connect_again()) as other:
            other.cursor().execute(f"KILL QUERY {number}")


# --- what is left of a session on PostgreSQL ------------------------------------------

#: What may be undone without a new connection: (is it there, undo it).
_ON_POSTGRESQL = {
    LOCK: (
        """SELECT count(*) FROM pg_locks
        WHERE locktype = 'advisory' AND pid = pg_backend_pid()""",
        "SELECT pg_advisory_unlock_all()",
    ),
    TEMPORARY: (
        "SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()",
        "DISCARD TEMP",
    ),
    LISTEN: ("SELECT count(*) FROM pg_listening_channels()", "UNLISTEN *"),
}


def found_on_postgresql(connection: Any, kinds: set[str]) -> set[str]:
    """
    Which of *kinds* are left in a session, after undoing what can be undone there.

    A round trip or two for each. What SET has set before is not known, the user's own
    code may have set it as it connected: it is taken for left, and stays.
    """
    found = set()
    cursor = connection.cursor()
    for kind in kinds:
        if kind not in _ON_POSTGRESQL:
            found.add(kind)
            continue
        look, undo = _ON_POSTGRESQL[kind]
        cursor.execute(look)
        if cursor.fetchone()[0]:
            found.add(kind)
            cursor.execute(undo)
    cursor.close()
    connection.commit()
    return found
