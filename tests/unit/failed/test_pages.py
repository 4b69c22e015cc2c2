"""Long lists come in pieces that one statement can take."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from celery_resilience.failed.pages import pages


@given(st.lists(st.integers(), max_size=50), st.integers(1, 10))
def test_pages_hold_everything_in_its_order(items: list[int], size: int) -> None:
    """Each is full but the last one, and none is empty."""
    found = list(pages(iter(items), size))

    assert list(itertools.chain.from_iterable(found)) == items
    assert all(len(page) == size for page in found[:-1])
    assert all(1 <= len(page) <= size for page in found)


def test_only_what_is_needed_is_read() -> None:
    """The rest of an endless list is left where it is."""
    numbers = itertools.count()

    assert next(pages(numbers, 3)) == [0, 1, 2]
    assert next(numbers) == 3
