"""Asks the bank for money."""

from __future__ import annotations

import json
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

#: Seconds; shorter than the time limit of the task that asks.
TIMEOUT_S = 10.0


class BankDown(Exception):
    """The bank did not answer; it may have taken the money."""


def charge(service_url: str, *, order: int, cents: int, key: str | None) -> int:
    """
    Take the money for an order.

    Args:
        key: Names this charge, for which the bank takes money once; None: each time.

    Returns:
        The cents that were taken now, which is 0 for a key that the bank knows.

    Raises:
        BankDown: Nobody knows whether money was taken.
    """
    words = {"order": order, "cents": cents} | ({} if key is None else {"key": key})
    url = f"{service_url}/charge?{urlencode(words)}"
    try:
        with urlopen(Request(url, method="POST"), timeout=TIMEOUT_S) as answer:
            return int(json.load(answer)["taken_cents"])
    except (URLError, TimeoutError) as exc:
        raise BankDown(str(exc)) from exc
