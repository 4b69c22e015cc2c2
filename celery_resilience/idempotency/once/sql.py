"""What `once` says to each kind of database. No library is imported here.

The statements are plain SQL, so that one text serves SQLAlchemy and Django; how a
statement is sent, and what an error was, is told by an adapter (`Transaction`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from celery_resilience.errors import (
    ConfigurationError,
    SchemaMismatch,
    StoreUnavailable,
)

TABLE = "resilience_once"

#: Characters of a key that are kept to be read.
NAME_CHARS = 255

#: How often a key is claimed that is deleted whenever it is looked at.
TRIES = 10

Values = Mapping[str, Any]


class Transaction(Protocol):
    """The caller's own transaction; statements have their values as `:name`."""

    @property
    def vendor(self) -> str:
        """The kind of database: sqlite, postgresql, mysql, or another."""
        ...

    def check(self) -> None:
        """
        Make sure that what is written now commits with the caller's rows.

        Raises:
            ConfigurationError: It would be committed alone.
        """
        ...

    def is_current(self) -> bool:
        """Whether the transaction has not ended yet."""
        ...

    def write(self, sql: str, values: Values) -> int:
        """Send a statement; how many rows it wrote."""
        ...

    def read(self, sql: str, values: Values) -> Sequence[Any] | None:
        """The one row that a query finds, or None."""
        ...

    def cause(self, error: Exception) -> BaseException | None:
        """The driver's own error behind *error*; None: it is not the database's."""
        ...


@dataclass(frozen=True, slots=True)
class Statements:
    """
    The statements of one kind of database.

    Attributes:
        claim: Inserts a key that is not there, or waits for who has inserted it.
        result: Reads what is saved, also where it was committed after the
            transaction's snapshot.
        save: Saves a result.
        purge: Deletes a batch of old keys.
    """

    claim: str
    result: str
    save: str
    purge: str


def _statements(
    *, key: str, now: str, unless_there: str = "", locked: str = "", purge: str
) -> Statements:
    return Statements(
        claim=(
            f"INSERT INTO {TABLE} ({key}, namespace, name, created_at) "
            f"VALUES (:key, :namespace, :name, {now}){unless_there}"
        ),
        result=f"SELECT result FROM {TABLE} WHERE {key} = :key{locked}",
        save=f"UPDATE {TABLE} SET result = :result WHERE {key} = :key",
        purge=purge.format(
            key=key,
            old=f"namespace = :namespace AND created_at < {now} - :older_than_s "
            "ORDER BY created_at LIMIT :limit",
        ),
    )


_ON_CONFLICT = ' ON CONFLICT ("key") DO NOTHING'
_PURGE = (
    f"DELETE FROM {TABLE} WHERE {{key}} IN (SELECT {{key}} FROM {TABLE} WHERE {{old}}"
)

STATEMENTS: Mapping[str, Statements] = {
    "sqlite": _statements(
        key='"key"',
        now="(julianday('now') - 2440587.5) * 86400.0",
        unless_there=_ON_CONFLICT,
        purge=f"{_PURGE})",
    ),
    "postgresql": _statements(
        key='"key"',
        now="extract(epoch from clock_timestamp())",
        unless_there=_ON_CONFLICT,
        purge=f"{_PURGE} FOR UPDATE SKIP LOCKED)",
    ),
    # Not INSERT IGNORE, which ignores more than that the key is there, nor ON
    # DUPLICATE KEY UPDATE, whose count of rows depends on a flag of the connection.
    # InnoDB undoes the one statement that met a duplicate, not the transaction.
    "mysql": _statements(
        key="`key`",
        now="UNIX_TIMESTAMP(NOW(6))",
        locked=" LOCK IN SHARE MODE",
        purge=f"DELETE FROM {TABLE} WHERE {{old}}",
    ),
}


def statements_for(transaction: Transaction) -> Statements:
    """
    The statements of its kind of database.

    Raises:
        ConfigurationError: There are none.
    """
    found = STATEMENTS.get(transaction.vendor)
    if found is None:
        raise ConfigurationError(
            "once works in SQLite, PostgreSQL, MariaDB and MySQL; this transaction "
            f"is of {transaction.vendor}"
        )
    return found


def stored_key(namespace: str, key: str) -> str:
    """The key as it is stored: 64 hexadecimal digits, whatever its length."""
    digest = hashlib.sha256()
    for part in (namespace, key):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def readable(key: str) -> str:
    """The key as people read it: cut, and without what a database could refuse."""
    shown = key[:NAME_CHARS].encode("utf-8", "backslashreplace").decode()
    return shown.replace("\0", "\\0")[:NAME_CHARS]


class Claim:
    """
    One key in one transaction.

    Args:
        transaction: The caller's.
        namespace: Whose key it is.
        key: As the caller names it.

    Raises:
        ConfigurationError: The key would be committed alone, or never.
        SchemaMismatch: The table is missing.
    """

    def __init__(self, transaction: Transaction, namespace: str, key: str) -> None:
        self.key = key
        self.result: Any = None
        self._transaction = transaction
        self._statements = statements_for(transaction)
        self._stored = stored_key(namespace, key)
        transaction.check()
        self.is_first = self._claim(namespace)

    def save(self, result: Any) -> None:
        """
        Keep *result* for duplicates.

        Raises:
            ConfigurationError: It cannot be kept; the message says why.
        """
        text = _encoded(result)
        if not self.is_first:
            raise ConfigurationError(
                f"once: {self.key!r} is a duplicate here; only the first saves a result"
            )
        values = {"key": self._stored, "result": text}
        if not self._transaction.is_current() or not self._transaction.write(
            self._statements.save, values
        ):
            raise ConfigurationError(
                f"once: the transaction, or savepoint, that claimed {self.key!r} has "
                "ended: save the result before that"
            )
        self.result = json.loads(text)

    def _claim(self, namespace: str) -> bool:
        values = {
            "key": self._stored,
            "namespace": namespace,
            "name": readable(self.key),
        }
        for _ in range(TRIES):
            if self._is_inserted(values):
                return True
            row = self._transaction.read(self._statements.result, {"key": self._stored})
            if row is not None:
                self.result = None if row[0] is None else json.loads(row[0])
                return False
        raise StoreUnavailable(
            f"once: {self.key!r} is in {TABLE}, but this user cannot read it"
        )

    def _is_inserted(self, values: Values) -> bool:
        try:
            return self._transaction.write(self._statements.claim, values) == 1
        except Exception as exc:
            cause = self._transaction.cause(exc)
            if cause is not None and _code(cause) == MYSQL_DUPLICATE:
                return False
            if cause is not None and is_missing_table(cause):
                raise missing_table(self._transaction.vendor) from exc
            raise


def purge(
    transaction: Transaction, namespace: str, *, older_than_s: float, limit: int
) -> int:
    """
    Delete at most *limit* keys of *namespace* that are older.

    Raises:
        ConfigurationError: No such kind of database is known.
        SchemaMismatch: The table is missing.
    """
    values = {"namespace": namespace, "older_than_s": older_than_s, "limit": limit}
    try:
        return transaction.write(statements_for(transaction).purge, values)
    except Exception as exc:
        cause = transaction.cause(exc)
        if cause is not None and is_missing_table(cause):
            raise missing_table(transaction.vendor) from exc
        raise


def _encoded(result: Any) -> str:
    try:
        return json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigurationError(
            f"once: a result has the types of JSON, and this {type(result).__name__} "
            f"has not: {exc}"
        ) from exc


# --- what drivers say -----------------------------------------------------------------

MYSQL_DUPLICATE, MYSQL_NO_TABLE = 1062, 1146
POSTGRESQL_NO_TABLE = "42P01"


def _code(error: BaseException) -> int | None:
    """The number of an error of MySQL's."""
    for code in (getattr(error, "errno", None), *error.args[:1]):
        if isinstance(code, int):
            return code
    return None


def is_missing_table(error: BaseException) -> bool:
    """Whether a driver says that `resilience_once` is not there."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return (
        state == POSTGRESQL_NO_TABLE
        or _code(error) == MYSQL_NO_TABLE
        or f"no such table: {TABLE}" in str(error)
    )


def missing_table(database: str) -> SchemaMismatch:
    """The error that says how the table is made."""
    return SchemaMismatch(
        f"there is no table {TABLE} in the database of this transaction. Make it "
        "with Resilience(app).create_once_table(engine); or in an Alembic revision, by "
        "celery_resilience.idempotency.alembic.upgrade(op); or in Django, with "
        "'celery_resilience.django' in INSTALLED_APPS and `manage.py migrate`. "
        f"`celery -A app resilience schema --sql --once {database}` prints it"
    )
