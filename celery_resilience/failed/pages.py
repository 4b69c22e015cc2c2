"""Long lists in pieces that one statement can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def pages(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """*items* in lists of *size*, the last one shorter."""
    iterator = iter(items)
    while page := list(islice(iterator, size)):
        yield page
