"""Pages of a QuerySet, each after the key of the last row before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_resilience.batches.sources import Page, keyed_page


def is_query(source: Any) -> bool:
    """Whether it is a query, such as this file reads."""
    from django.db.models import QuerySet

    return isinstance(source, QuerySet)


class DjangoSource:
    """
    A QuerySet, whose own order is of no matter.

    Args:
        query: Of objects, or of `values()` with the key among them; not sliced.
        key: A unique field without NULL.

    Raises:
        ValueError: The query is sliced.
    """

    def __init__(self, query: Any, key: str) -> None:
        if query.query.is_sliced:
            raise ValueError("stream or batch: a QuerySet that is sliced has no pages")
        self._query = query
        self._key = key

    def page(self, after: Any, size: int) -> Page:
        """The next rows in the order of their keys."""
        query = self._query.order_by(self._key)
        if after is not None:
            query = query.filter(**{f"{self._key}__gt": after})
        rows = list(query[: size + 1])
        return keyed_page(rows, [self._key_of(row) for row in rows], size, self._key)

    def _key_of(self, row: Any) -> Any:
        try:
            return (
                row[self._key] if isinstance(row, Mapping) else getattr(row, self._key)
            )
        except (AttributeError, KeyError):
            raise ValueError(
                f"stream or batch: a row has no {self._key!r}: give key="
            ) from None

    def commit(self) -> None:
        """
        Nothing, as Django commits each statement.

        Raises:
            ValueError: Within `atomic()`, where it does not.
        """
        from django.db import connections

        if connections[self._query.db].in_atomic_block:
            raise ValueError(
                "stream or batch: a page ends within atomic(), where nothing is committed: leave "
                "it before the next row is asked for"
            )


def close_connections() -> None:
    """Close those of this thread."""
    from django.db import connections

    connections.close_all()
