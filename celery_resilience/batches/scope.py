"""The scope of one item: what is raised in it is of the item, and not of the batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

#: Notes that an item did not go well; False where an exception says nothing of it.
Takes = Callable[[Any, BaseException], bool]


class ItemScope(AbstractContextManager[None]):
    """
    Lets what is raised in it be noted; made once for all items of a batch.

    Args:
        takes: Notes it.

    Attributes:
        item: The one that is worked at.
    """

    def __init__(self, takes: Takes) -> None:
        self._takes = takes
        self.item: Any = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        return exc is not None and self._takes(self.item, exc)


class SavepointScope(ItemScope):
    """
    Undoes in the session what was done in it, too.

    Args:
        takes: Notes what is raised.
        session: SQLAlchemy's.
    """

    def __init__(self, takes: Takes, session: Any) -> None:
        from celery_resilience.batches.sqlalchemy_savepoint import savepoint

        super().__init__(takes)
        self._begin = savepoint
        self._session = session
        self._savepoint: Any = None

    def __enter__(self) -> None:
        self._savepoint = self._begin(self._session)
        self._savepoint.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if exc is None:
            try:
                self._savepoint.__exit__(None, None, None)
            except Exception as raised:  # by the flush
                if self._takes(self.item, raised):
                    return True
                raise
            return False
        # First, for a session whose flush has failed tells nothing of the item.
        self._savepoint.__exit__(kind, exc, traceback)
        return self._takes(self.item, exc)
