"""The trace that a message belongs to, by the headers that its sender wrote.

Policy only: the libraries that write these headers are not needed to read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: What W3C Trace Context (3.2) writes, and what Sentry's SDKs write.
TRACEPARENT, TRACESTATE, SENTRY_TRACE = "traceparent", "tracestate", "sentry-trace"

BAGGAGE = "baggage"

_W3C = re.compile(
    r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_SENTRY = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})(?:-([01]))?")


def trace_id_of(headers: Mapping[str, Any] | None) -> str | None:
    """
    The id of the trace that a message with these headers belongs to, or None.

    Args:
        headers: Of a message, or the attributes of a running task's request.

    Returns:
        32 hex digits.
    """
    traceparent = traceparent_of(headers)
    return None if traceparent is None else traceparent[3:35]


def traceparent_of(headers: Mapping[str, Any] | None) -> str | None:
    """
    The sender's span as W3C Trace Context writes it, or None.

    By `traceparent`, or else by `sentry-trace`.
    """
    if not headers:
        return None
    found = headers.get(TRACEPARENT) or headers.get(SENTRY_TRACE)
    if found is None:
        # Where Celery keeps what `apply_async(headers=)` was given.
        inner = headers.get("headers")
        if not isinstance(inner, Mapping):
            return None
        found = inner.get(TRACEPARENT) or inner.get(SENTRY_TRACE)
    return _as_traceparent(found)


def is_traceparent(value: object) -> bool:
    """Whether *value* is a `traceparent` as `traceparent_of` returns it."""
    return isinstance(value, str) and _as_traceparent(value) == value


def without_trace(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers of a message that starts a trace of its own; the rest of them stays."""
    kept: dict[str, Any] = {}
    for name, value in headers.items():
        if name in (TRACEPARENT, TRACESTATE, SENTRY_TRACE):
            continue
        if name == BAGGAGE and isinstance(value, str):
            # Sentry's part says how the old trace was sampled.
            items = [i for i in value.split(",") if not i.strip().startswith("sentry-")]
            if items:
                kept[name] = ",".join(items)
        elif name == "headers" and isinstance(value, Mapping):
            kept[name] = without_trace(value)
        else:
            kept[name] = value
    return kept


def _as_traceparent(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    found = _W3C.fullmatch(value)
    if found is not None:
        trace, span, flags = found.groups()
    else:
        found = _SENTRY.fullmatch(value)
        if found is None:
            return None
        trace, span, sampled = found.groups()
        flags = "01" if sampled == "1" else "00"
    # All zeros are no id (W3C Trace Context, 3.2.2.3).
    return f"00-{trace}-{span}-{flags}" if int(trace, 16) and int(span, 16) else None
