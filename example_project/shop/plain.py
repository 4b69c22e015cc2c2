"""What plain Celery has in the place of keys and batches: both runs share every body."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import celery

Item = TypeVar("Item")


class Loop(AbstractContextManager["Loop"]):
    """A loop over all items, from the start in each run, that ends at the first error."""

    report: ClassVar[dict[str, Any]] = {}

    def __exit__(self, *_: object) -> None:
        """Nothing is remembered."""

    @staticmethod
    def items(items: Iterable[Item]) -> Iterable[Item]:
        """All of them."""
        return items

    @staticmethod
    def item(item: object) -> AbstractContextManager[None]:
        """What is raised in it ends the loop."""
        return nullcontext()


class Keyless:
    """What a body may ask of celery-resilience where that is not there."""

    key = None

    @staticmethod
    def batch(name: str, **_: Any) -> Loop:
        """A plain loop."""
        return Loop()


class Task(celery.Task):  # type: ignore[type-arg]
    """Celery's own, whose calls have no key."""

    abstract = True
    resilience = Keyless()


def once(session: Any, key: str) -> bool:
    """Whether nobody else has claimed *key*: nobody remembers, so it is True."""
    return True
