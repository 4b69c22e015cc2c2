"""Waits are at random, whatever the app does with its own numbers."""

from __future__ import annotations

import random

import pytest

from celery_resilience.chance import between, chance


def test_an_app_that_seeds_its_numbers_does_not_make_workers_wait_alike() -> None:
    """Nor does a wait take a number out of the app's row."""
    random.seed(17)
    before = random.getstate()
    first = [chance(), between(1.0, 2.0)]
    assert random.getstate() == before
    random.seed(17)

    assert [chance(), between(1.0, 2.0)] != first


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.75, 1.0), (3.0, 3.0)])
def test_it_is_between_its_bounds(low: float, high: float) -> None:
    """In seconds, say."""
    assert all(low <= between(low, high) <= high for _ in range(100))
    assert all(0 <= chance() < 1 for _ in range(100))
