"""What plain Celery has in the place of keys, so that both runs share every body."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import celery

Item = TypeVar("Item")


class Keyless:
    """What a body may ask of celery-resilience where that is not there."""

    key = None

    @staticmethod
    def stream(items: Iterable[Item], **_: Any) -> Iterable[Item]:
        """All of them, from the start in each run."""
        return items


class Task(celery.Task):  # type: ignore[type-arg]
    """Celery's own, whose calls have no key."""

    abstract = True
    resilience = Keyless()


def once(session: Any, key: str) -> bool:
    """Whether nobody else has claimed *key*: nobody remembers, so it is True."""
    return True
