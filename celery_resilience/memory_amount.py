"""How an amount of memory is written, in settings, flags and task options."""

from __future__ import annotations

import re
from typing import Any

from celery_resilience.finite import is_finite

#: What is accepted as an amount of memory.
MEMORY_AMOUNT = 'a number of MiB from 1, a share such as "25%"'


def is_memory_amount(value: Any) -> bool:
    """Whether a value is MiB, or a share of the container's memory."""
    if isinstance(value, str):
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
        return share is not None and 0 < float(share[1]) <= 100
    return is_finite(value) and bool(value >= 1)
