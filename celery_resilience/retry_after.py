"""How long a dependency asks to be left alone."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

#: Attributes of an exception that say it themselves, in seconds.
OWN_WORDS = ("retry_after_s", "retry_after")


def retry_after_of(exc: BaseException, now: float | None = None) -> float | None:
    """
    Seconds that an exception asks for, or None; never raises.

    From `exc.retry_after_s` or `exc.retry_after`, or the header Retry-After of
    `exc.response`, as requests and httpx have it, or of the exception itself, as
    urllib has it.

    Args:
        now: Wall time in seconds, from which a date is counted; None: the present.

    Source: RFC 9110, section 10.2.3.
    """
    try:
        asked = _asked(exc)
        return None if asked is None else _seconds(asked, now)
    except Exception:
        return None


def _asked(exc: BaseException) -> Any:
    for word in OWN_WORDS:
        asked: Any = getattr(exc, word, None)
        if asked is not None:
            return asked
    for answer in (getattr(exc, "response", None), exc):
        headers: Any = getattr(answer, "headers", None)
        for name in () if headers is None else ("Retry-After", "retry-after"):
            asked = headers.get(name)
            if asked is not None:
                return asked
    return None


def _seconds(asked: Any, now: float | None) -> float | None:
    if isinstance(asked, timedelta):
        asked = asked.total_seconds()
    try:
        seconds = float(asked)
    except (TypeError, ValueError):
        at = asked if isinstance(asked, datetime) else parsedate_to_datetime(asked)
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        seconds = at.timestamp() - (time.time() if now is None else now)
    return seconds if math.isfinite(seconds) and seconds > 0 else None
