"""Pages of a query of SQLAlchemy's, each after the key of the last row before it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select
from sqlalchemy.orm import Query

from celery_resilience.batches.sources import Page, keyed_page


def is_query(source: Any) -> bool:
    """Whether it is a query, such as this file reads."""
    return isinstance(source, Select | Query)


class SqlAlchemySource:
    """
    A query, whose own order is of no matter.

    Args:
        query: Without a limit.
        key: A unique column without NULL: an attribute of the first entity, or the
            name of a column that is selected.
        session: What the query is asked in, and committed in after each page; a
            `Query` has its own.

    Raises:
        TypeError: There is no session.
        ValueError: The query has a limit, or no such key.
    """

    def __init__(self, query: Any, key: str, session: Any) -> None:
        if session is None and isinstance(query, Query):
            session = query.session
        if session is None:
            raise TypeError("stream or batch: a select() needs session=")
        if query._limit_clause is not None or query._offset_clause is not None:
            raise ValueError(
                "stream or batch: a query with a limit or an offset has no pages"
            )
        self._query = query
        self._key = key
        self._session = session
        descriptions = query.column_descriptions
        entity = descriptions[0].get("entity")
        #: Whether a row is one object, and whether the key is that object's.
        self._is_scalar = len(descriptions) == 1 and descriptions[0]["expr"] is entity
        self._is_of_entity = descriptions[0]["expr"] is entity is not None
        column = getattr(entity, key, None) if self._is_of_entity else None
        if column is None:
            self._is_of_entity = False
            column = next((d["expr"] for d in descriptions if d["name"] == key), None)
        if column is None:
            raise ValueError(
                f"stream or batch: the query has no column {key!r}: give key="
            )
        self._column: Any = column

    def page(self, after: Any, size: int) -> Page:
        """The next rows in the order of their keys."""
        query = self._query.order_by(None).order_by(self._column)
        if after is not None:
            query = query.where(self._column > after)
        query = query.limit(size + 1)
        if isinstance(query, Query):
            rows: Any = query.all()
        else:
            found = self._session.execute(query)
            rows = found.scalars().all() if self._is_scalar else found.all()
        return keyed_page(rows, [self._key_of(row) for row in rows], size, self._key)

    def _key_of(self, row: Any) -> Any:
        if self._is_of_entity:
            return getattr(row if self._is_scalar else row[0], self._key)
        return row._mapping[self._key]

    def commit(self) -> None:
        """
        Commit the page.

        Raises:
            ValueError: A savepoint is open, so that nothing would be committed.
        """
        if self._session.in_nested_transaction():
            raise ValueError(
                "stream or batch: a page ends within begin_nested(), where nothing can be "
                "committed: leave it before the next row is asked for"
            )
        self._session.commit()
