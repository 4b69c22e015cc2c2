"""The collector that a worker runs beside it: when it makes a pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest

from celery_resilience.errors import StoreUnavailable
from celery_resilience.failed.bootstep import PAUSE_S, repeat
from celery_resilience.failed.collector import BATCH


def passes(*results: int | Exception) -> list[str | float]:
    """What happens, in order: passes, and seconds of pauses."""
    happened: list[str | float] = []
    left: list[int | Exception] = list(results)

    def collect() -> int:
        happened.append("pass")
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def pause(seconds: float, should_stop: Callable[[], bool]) -> None:
        assert should_stop() is not bool(left)
        happened.append(seconds)

    repeat(collect, lambda: not left, pause=pause)
    return happened


@pytest.mark.parametrize("moved", [0, 1, BATCH - 1])
def test_few_failures_are_collected_together(moved: int) -> None:
    """A pass for each would take the worker's processor."""
    assert passes(moved, moved) == ["pass", PAUSE_S] * 2


@pytest.mark.parametrize("moved", [BATCH, 9 * BATCH])
def test_many_failures_are_collected_without_a_pause(moved: int) -> None:
    """As fast as they can be."""
    assert passes(moved, moved, 0) == ["pass", "pass", "pass", PAUSE_S]


def test_a_pass_that_failed_is_told_and_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The store may come back; not at once."""
    results: Sequence[int | Exception] = [StoreUnavailable("away"), 0]
    with caplog.at_level(logging.WARNING):
        assert passes(*results) == ["pass", PAUSE_S] * 2

    assert "cannot collect: StoreUnavailable: away" in caplog.text


def test_nothing_is_collected_once_it_must_stop() -> None:
    """Not even once."""
    assert passes() == []
