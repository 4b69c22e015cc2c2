"""Waiting in tests: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def eventually(
    look: Callable[[], Result],
    *,
    within_s: float = 30,
    what: str | Callable[[], str] = "",
    every_s: float = 0.05,
) -> Result:
    """
    The first true answer of *look*.

    Args:
        what: Is waited for; or what to show where it did not come, asked then.

    Raises:
        AssertionError: There was none in time; it shows the last answer.
    """
    end = time.monotonic() + within_s
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > end:
            told = told_of(what)
            raise AssertionError(f"not within {within_s} s: {told} (last: {answer!r})")
        time.sleep(every_s)


def always(
    look: Callable[[], bool],
    *,
    for_s: float,
    what: str | Callable[[], str] = "",
    every_s: float = 0.1,
) -> None:
    """
    Watch that *look* stays true.

    Raises:
        AssertionError: It did not.
    """
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        assert look(), told_of(what)
        time.sleep(every_s)


def told_of(what: str | Callable[[], str]) -> str:
    """A text, or what there is to show by now."""
    return what if isinstance(what, str) else what()
