"""Asks the address service."""

from __future__ import annotations

import json
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

#: Seconds; longer than the task's time limit, as it is in many a shop.
TIMEOUT_S = 30.0


class ServiceDown(Exception):
    """The address service did not tell the zone."""


def zone_of(service_url: str, *, line_no: int, city: str) -> str:
    """
    The delivery zone of a city.

    Raises:
        ServiceDown: It may tell later.
    """
    words = urlencode({"city": city, "line": line_no})
    try:
        with urlopen(f"{service_url}/zone?{words}", timeout=TIMEOUT_S) as answer:
            return str(json.load(answer)["zone"])
    except HTTPError as exc:
        raise ServiceDown(f"{exc.code} {exc.reason}") from exc
    except URLError as exc:
        raise ServiceDown(str(exc.reason)) from exc
