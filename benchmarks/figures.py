"""One measured figure with its bound, and how measurements are repeated."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Figure:
    """
    One figure of the table.

    Attributes:
        name: What was measured.
        value: The figure; None: it could not be measured, `raw` says why.
        unit: "µs", "ms", "MiB", or "x" for a ratio.
        at_most, at_least: Its bound; None where there is none.
        raw: What it was made from, for the reader.
    """

    name: str
    value: float | None
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    raw: Sequence[str] = field(default=())

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    @property
    def is_kept(self) -> bool | None:
        """Whether the bound is kept; None where there is none, or no value."""
        if self.value is None:
            return None
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least


def interleaved(
    first: Callable[[], float], second: Callable[[], float], pairs: int
) -> tuple[list[float], list[float]]:
    """Measure two things in turn, so that a machine that slows down slows both."""
    a: list[float] = []
    b: list[float] = []
    for pair in range(pairs):
        order = ((first, a), (second, b))
        for measure, into in order if pair % 2 == 0 else reversed(order):
            into.append(measure())
    return a, b


def ratio_of(a: Sequence[float], b: Sequence[float]) -> tuple[float, list[str]]:
    """The median of the pairs' ratios a/b, and the raw figures."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), [
        f"{x:,.4g} / {y:,.4g} = {x / y:.3f}" for x, y in zip(a, b, strict=True)
    ]
