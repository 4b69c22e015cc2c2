"""Types of numbers on a command line."""

from __future__ import annotations

from math import isfinite
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """click's, without nan, which is in every range, and without infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """The number, if it is one that can be reckoned with."""
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"must be a number in {self._describe_range()}, got {value!r}")
        return number


#: Seconds, which are more than none.
SECONDS = FiniteRange(min=0, min_open=True)
