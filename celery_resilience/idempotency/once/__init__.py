"""`once(session, key)`: a key that commits with the user's own rows.

The door: it asks what kind of session it was given, and leaves the rest to the file
that is named after its library. Nothing of those is imported before it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from celery_resilience.errors import ConfigurationError
from celery_resilience.idempotency.once import sql as once_sql

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import (
        AsyncConnection,
        AsyncSession,
        async_scoped_session,
    )
    from sqlalchemy.orm import Session, scoped_session

Result = TypeVar("Result")


class DjangoConnection(Protocol):
    """What of `django.db.connection` and `connections[alias]` is used here."""

    @property
    def vendor(self) -> str: ...
    @property
    def in_atomic_block(self) -> bool: ...
    def cursor(self) -> Any: ...


class Once:
    """
    What a key came to in this transaction: true for the first, false for a duplicate.

    Attributes:
        key: As it was given.
        is_first: Nobody else has claimed the key, and nobody will once this
            transaction is committed.
        result: What the first has saved, with JSON's types; None if nothing.
    """

    def __init__(self, claim: once_sql.Claim) -> None:
        self._claim = claim

    @property
    def key(self) -> str:
        """As it was given."""
        return self._claim.key

    @property
    def is_first(self) -> bool:
        """Whether the effect is this transaction's to have."""
        return self._claim.is_first

    @property
    def result(self) -> Any:
        """What the first has saved, with JSON's types; None if nothing."""
        return self._claim.result

    def __bool__(self) -> bool:
        return self.is_first

    def __repr__(self) -> str:
        what = "first" if self.is_first else "duplicate"
        return f"<{type(self).__name__} {self.key!r}: {what}>"

    def save(self, result: Any) -> None:
        """
        Give *result* to every duplicate; it commits with the key.

        Args:
            result: Anything that JSON has. A duplicate gets JSON's types: a tuple
                comes back as a list.

        Raises:
            ConfigurationError: JSON has no such value; this is a duplicate; or the
                transaction has ended in which the key was claimed.
        """
        self._claim.save(result)


class AsyncOnce(Once):
    """`Once` of an AsyncSession or AsyncConnection, of which `save` is awaited."""

    def __init__(
        self,
        claim: once_sql.Claim,
        run: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> None:
        super().__init__(claim)
        self._run = run

    async def save(self, result: Any) -> None:  # type: ignore[override]  # it is awaited
        """
        Give *result* to every duplicate, as `Once.save` does.

        Raises:
            ConfigurationError: As there.
        """
        await self._run(lambda: self._claim.save(result))


@overload
def once(
    session: AsyncSession | AsyncConnection | async_scoped_session[Any],
    key: str,
    *,
    namespace: str | None = None,
) -> Awaitable[AsyncOnce]: ...


@overload
def once(
    session: Session | scoped_session[Any] | Connection | DjangoConnection | str,
    key: str,
    *,
    namespace: str | None = None,
) -> Once: ...


def once(session: Any, key: str, *, namespace: str | None = None) -> Any:
    """
    Claim *key* inside the caller's own transaction, with whose rows it commits.

    Where the transaction is rolled back, or its process is killed, the key was never
    claimed. While another transaction holds the key, this call waits for its end, as
    long as the database lets a statement wait: if that commits, this is a duplicate,
    else this is the first. Nothing is flushed, committed or expired.

    Args:
        session: A SQLAlchemy Session, scoped_session, Connection, AsyncSession,
            async_scoped_session or AsyncConnection (of the last three the answer is
            awaited); or a Django connection, or its alias.
        key: Names the effect, not the message: "charge:17". Of any length; the first
            255 characters are kept to be read.
        namespace: Keys of two namespaces never meet. None: the current app's.

    Returns:
        True for the first, false for a duplicate, with `result` and `save`. Asked
        again in the same transaction, the key is a duplicate.

    Raises:
        ConfigurationError: The key is no text or empty; the session is of another
            kind, or has no transaction; there is no app and no namespace.
        SchemaMismatch: The table `resilience_once` is not in this database.
    """
    if not isinstance(key, str) or not key:
        raise ConfigurationError(
            f"once: a key is a text that is not empty, such as 'charge:17', not {key!r}"
        )
    return _with_transaction(
        session,
        lambda transaction: once_sql.Claim(transaction, _checked(namespace), key),
        Once,
        AsyncOnce,
    )


@overload
def purge_once(
    session: AsyncSession | AsyncConnection | async_scoped_session[Any],
    *,
    older_than_s: float,
    limit: int = 1_000,
    namespace: str | None = None,
) -> Awaitable[int]: ...


@overload
def purge_once(
    session: Session | scoped_session[Any] | Connection | DjangoConnection | str,
    *,
    older_than_s: float,
    limit: int = 1_000,
    namespace: str | None = None,
) -> int: ...


def purge_once(
    session: Any,
    *,
    older_than_s: float,
    limit: int = 1_000,
    namespace: str | None = None,
) -> Any:
    """
    Forget old keys of `once`, a batch of them, in the caller's own transaction.

    A key that is forgotten is new again: keep keys for longer than any message or
    replay may come late.

    Args:
        session: As for `once`.
        older_than_s: Seconds since a key was claimed, by the database's clock.
        limit: At most so many; call again, in a new transaction, until it is fewer.
        namespace: Whose keys. None: the current app's.

    Returns:
        How many were forgotten; to be awaited where the session is asynchronous.

    Raises:
        ConfigurationError: As `once`; or an age or a limit is not positive.
        SchemaMismatch: The table `resilience_once` is not in this database.
    """
    for name, number in (("older_than_s", older_than_s), ("limit", limit)):
        if isinstance(number, bool) or not number > 0:
            raise ConfigurationError(f"purge_once: {name} must be positive: {number!r}")

    def purge(transaction: once_sql.Transaction) -> int:
        return once_sql.purge(
            transaction, _checked(namespace), older_than_s=older_than_s, limit=limit
        )

    return _with_transaction(
        session, purge, lambda count: count, lambda count, _: count
    )


def _with_transaction(
    session: Any,
    work: Callable[[once_sql.Transaction], Result],
    done: Callable[[Result], Any],
    done_async: Callable[[Result, Any], Any],
) -> Any:
    """What *work* comes to in the session's transaction, awaitable if it is async."""
    kind = _library_of(session)
    if kind == "django":
        django = import_module("celery_resilience.idempotency.once.django_transaction")
        return done(work(django.transaction_of(session)))
    if kind == "sqlalchemy":
        library = import_module(
            "celery_resilience.idempotency.once.sqlalchemy_transaction"
        )
        if library.is_async(session):
            return _awaited(library, session, work, done_async)
        return done(work(library.transaction_of(session)))
    raise ConfigurationError(_refusal(session))


async def _awaited(
    library: Any,
    session: Any,
    work: Callable[[once_sql.Transaction], Result],
    done: Callable[[Result, Any], Any],
) -> Any:
    async def run(call: Callable[[], None]) -> None:
        await library.run(session, lambda _: call())

    return done(await library.run(session, work), run)


def _library_of(session: Any) -> str | None:
    """Whose class it is, or is derived from."""
    if isinstance(session, str):
        return "django"
    # Asked of the object, so that a proxy may speak for what it stands for.
    roots = {cls.__module__.partition(".")[0] for cls in session.__class__.__mro__}
    return next((name for name in ("sqlalchemy", "django") if name in roots), None)


def _refusal(session: Any) -> str:
    return (
        "once needs a SQLAlchemy Session, scoped_session, Connection, AsyncSession, "
        "async_scoped_session or AsyncConnection, or a Django connection or its "
        f"alias; a {type(session).__module__}.{type(session).__qualname__} is none"
    )


def _checked(namespace: str | None) -> str:
    """The namespace that was given, or else the current app's."""
    if namespace is None:
        from celery_resilience.install import current_namespace

        return current_namespace()
    if isinstance(namespace, str) and re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", namespace):
        return namespace
    raise ConfigurationError(
        "once: a namespace is 1 to 64 letters, digits or _ . : -, as "
        f"resilience_namespace is, not {namespace!r}"
    )
