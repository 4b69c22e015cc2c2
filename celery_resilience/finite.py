"""What is a number where people write one: neither a boolean, nor infinite, nor nan."""

from __future__ import annotations

import sys
from typing import Any


def is_finite(value: Any) -> bool:
    """Whether *value* is a number that a float can hold."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
