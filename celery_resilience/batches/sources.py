"""What can be read in pages: an iterable here, queries in files of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple, Protocol


class Page(NamedTuple):
    """
    Some rows.

    Attributes:
        rows: As the source has them.
        place: What the next page comes after.
        is_last: Nothing comes after it.
        places: What would come after each of the rows.
    """

    rows: Sequence[Any]
    place: Any
    is_last: bool
    places: Sequence[Any]


class Source(Protocol):
    """Rows in an order that is the same each time."""

    def page(self, after: Any, size: int) -> Page:
        """At most *size* rows after a place; None: from the start."""
        ...

    def commit(self) -> None:
        """Commit what was done with the page before its place is remembered."""
        ...


class IterableSource:
    """
    Any iterable that gives the same items in the same order each time.

    Its places are numbers of items: what was read before is read again and passed over.
    """

    def __init__(self, items: Iterable[Any], session: Any = None) -> None:
        self._items: Iterator[Any] | None = None
        self._iterable = items
        self._session = session

    def page(self, after: Any, size: int) -> Page:
        """The next items."""
        place = int(after or 0)
        if self._items is None:
            self._items = iter(self._iterable)
            next(islice(self._items, place, place), None)
        rows = list(islice(self._items, size))
        end = place + len(rows)
        return Page(rows, end, len(rows) < size, range(place + 1, end + 1))

    def commit(self) -> None:
        """Commit the session, if there is one."""
        if self._session is not None:
            self._session.commit()


def keyed_page(rows: Sequence[Any], keys: Sequence[Any], size: int, key: str) -> Page:
    """
    A page of a query that was asked for one row more than *size*.

    Args:
        rows: At most ``size + 1``, in the order of their keys.
        keys: Of each row.
        key: The keys' name.

    Raises:
        ValueError: Two rows have one key, or one has none: a page would lose rows.
    """
    for before, after in pairwise(keys):
        if before == after:
            raise ValueError(
                f"stream or batch: two rows have the same {key}, {before!r}: give a key that is "
                "unique"
            )
    if None in keys:
        raise ValueError(
            f"stream or batch: a row has no {key}: give a key that each row has"
        )
    is_last = len(rows) <= size
    rows, keys = rows[:size], keys[:size]
    return Page(rows, keys[-1] if keys else None, is_last, keys)


def source_of(source: Any, *, key: str, session: Any = None) -> Source:
    """
    The pages of a query of SQLAlchemy's or Django's, or of an iterable.

    Args:
        source: A `select()` or a `Query`, a QuerySet, or an iterable.
        key: The column by which a query is read.
        session: SQLAlchemy's, which is committed after each page.

    Raises:
        TypeError: It is none of these, or a `select()` without a session.
        ValueError: It has a limit, or no such key.
    """
    if session is not None and hasattr(session, "sync_session"):
        raise TypeError("stream or batch: an AsyncSession is not taken, give a Session")
    if "sqlalchemy" in sys.modules:
        from celery_resilience.batches import sqlalchemy_source

        if sqlalchemy_source.is_query(source):
            return sqlalchemy_source.SqlAlchemySource(source, key, session)
    if "django.db.models" in sys.modules:
        from celery_resilience.batches import django_source

        if django_source.is_query(source):
            return django_source.DjangoSource(source, key)
    if not isinstance(source, Iterable):
        raise TypeError(
            "stream and batch take a select() with session=, a Query, a QuerySet or an iterable, "
            f"got {type(source).__name__}"
        )
    return IterableSource(source, session)
