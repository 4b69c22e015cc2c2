"""How long a dependency asks to be left alone."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


def retry_after_of(exc: BaseException) -> float | None:
    """
    Seconds that an exception asks for, or None; never raises.

    From `exc.retry_after`, a number of seconds, or the header Retry-After of
    `exc.response`, as requests and httpx have it.

    Source: RFC 9110, section 10.2.3.
    """
    try:
        asked: Any = getattr(exc, "retry_after", None)
        if asked is None:
            headers = getattr(getattr(exc, "response", None), "headers", None)
            asked = None if headers is None else headers.get("Retry-After")
        return None if asked is None else _seconds(asked)
    except Exception:
        return None


def _seconds(asked: Any) -> float | None:
    try:
        seconds = float(asked)
    except (TypeError, ValueError):
        at = parsedate_to_datetime(asked)
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        seconds = (at - datetime.now(UTC)).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else None
