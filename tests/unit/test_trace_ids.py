"""The trace of a message is read from, and taken out of, its headers."""

from __future__ import annotations

from typing import Any

import pytest

from celery_resilience.trace_ids import (
    is_traceparent,
    trace_id_of,
    traceparent_of,
    without_trace,
)

TRACE, SPAN = "a" * 32, "b" * 16


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"traceparent": f"00-{TRACE}-{SPAN}-01"}, f"00-{TRACE}-{SPAN}-01"),
        ({"traceparent": f"01-{TRACE}-{SPAN}-00-more"}, f"00-{TRACE}-{SPAN}-00"),
        ({"sentry-trace": f"{TRACE}-{SPAN}-1"}, f"00-{TRACE}-{SPAN}-01"),
        ({"sentry-trace": f"{TRACE}-{SPAN}-0"}, f"00-{TRACE}-{SPAN}-00"),
        ({"sentry-trace": f"{TRACE}-{SPAN}"}, f"00-{TRACE}-{SPAN}-00"),
        (
            {"headers": {"sentry-trace": f"{TRACE}-{SPAN}-1"}},
            f"00-{TRACE}-{SPAN}-01",
        ),
        ({"traceparent": f"00-{'0' * 32}-{SPAN}-01"}, None),
        ({"traceparent": f"00-{TRACE}-{'0' * 16}-01"}, None),
        ({"traceparent": f"00-{'a' * 31}-{SPAN}-01"}, None),
        ({"traceparent": f"ff-{TRACE}-{SPAN}-01"}, None),
        ({"traceparent": f"00-{TRACE}"}, None),
        ({"traceparent": 5, "headers": [1]}, None),
        ({"headers": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_senders_span_is_read(headers: Any, found: str | None) -> None:
    """As W3C or Sentry write it; anything else is none, whatever anybody wrote."""
    assert traceparent_of(headers) == found
    assert trace_id_of(headers) == (None if found is None else TRACE)


def test_what_is_read_is_valid_as_a_mark() -> None:
    """And nothing else is."""
    assert is_traceparent(f"00-{TRACE}-{SPAN}-01")
    assert not is_traceparent(f"{TRACE}-{SPAN}-1")
    assert not is_traceparent(f"00-{'0' * 32}-{SPAN}-01")
    assert not is_traceparent(["x"])


def test_the_trace_is_taken_out_and_nothing_else() -> None:
    """The user's baggage stays, and Sentry's part of it goes."""
    headers = {
        "id": "1",
        "traceparent": f"00-{TRACE}-{SPAN}-01",
        "tracestate": "x=1",
        "baggage": "tenant=7, sentry-trace_id=1,sentry-environment=test",
        "headers": {"sentry-trace": f"{TRACE}-{SPAN}-1", "mine": 1, "baggage": None},
    }

    assert without_trace(headers) == {
        "id": "1",
        "baggage": "tenant=7",
        "headers": {"mine": 1, "baggage": None},
    }
    assert without_trace({"baggage": "sentry-trace_id=1"}) == {}
    assert len(headers) == 5
