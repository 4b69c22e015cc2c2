"""How long an exception asks to be left alone, whichever library it is of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.message import Message
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest

from celery_resilience.retry_after import retry_after_of

NOW = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC).timestamp()
IN_90_S = "Mon, 30 Nov 2026 12:01:30 GMT"


class Asking(Exception):
    """Has attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def response(**headers: str) -> Any:
    """As requests and httpx have it."""
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(headers=found)


def of_urllib(value: str) -> HTTPError:
    """As urllib raises it, with headers of its own."""
    headers = Message()
    headers["Retry-After"] = value
    return HTTPError("http://bank", 503, "busy", headers, None)


@pytest.mark.parametrize(
    ("exc", "seconds"),
    [
        (Asking(retry_after=3), 3),
        (Asking(retry_after=" 3.5 "), 3.5),
        (Asking(retry_after_s=0.25), 0.25),
        (Asking(retry_after=timedelta(minutes=2)), 120),
        (Asking(retry_after=datetime(2026, 11, 30, 12, 0, 9, tzinfo=UTC)), 9),
        (Asking(response=response(Retry_After="7")), 7),
        (Asking(response=response(retry_after="7")), 7),
        (Asking(response=response(Retry_After=IN_90_S)), 90),
        (Asking(headers={"Retry-After": IN_90_S}), 90),
        (of_urllib("120"), 120),
        (of_urllib(IN_90_S), 90),
        (Asking(retry_after=0), None),
        (Asking(retry_after=-1), None),
        (Asking(retry_after="inf"), None),
        (Asking(retry_after="soon"), None),
        (Asking(retry_after=object()), None),
        (Asking(response=response(Retry_After="Sun, 29 Nov 2026 12:00:00 GMT")), None),
        (Asking(response=response(Age="7")), None),
        (Asking(response=None), None),
        (Asking(response={"not": "headers"}), None),
        (ValueError(), None),
    ],
)
def test_what_is_asked_for(exc: Exception, seconds: float | None) -> None:
    """Seconds and dates; what is past, or nonsense, is nothing."""
    found = retry_after_of(exc, NOW)

    assert found == (None if seconds is None else pytest.approx(seconds))


def test_an_exception_that_will_not_be_asked_asks_for_nothing() -> None:
    """Whatever its attributes raise."""

    class Hostile(Exception):
        @property
        def retry_after(self) -> float:
            raise RuntimeError

    assert retry_after_of(Hostile()) is None


def test_a_date_is_counted_from_the_present() -> None:
    """Where nobody says from when."""
    at = datetime.now(UTC) + timedelta(hours=1)

    found = retry_after_of(Asking(retry_after=at))

    assert found is not None
    assert 3_590 < found <= 3_600
