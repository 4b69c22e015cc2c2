"""What an order line must be, release by release. No I/O, no Django, no Celery."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation

COLUMNS = ("number", "ordered_on", "customer", "email", "city", "item", "amount")

#: An order above this is a slip of the keyboard.
MAX_AMOUNT = Decimal(10_000)


class LineRefused(ValueError):
    """No release of the shop will ever take this line."""


class LineNotUnderstood(ValueError):
    """This release of the shop cannot read this line."""


@dataclass(frozen=True, slots=True)
class Line:
    """An order as the file tells it."""

    number: str
    ordered_on: date
    customer: str
    email: str
    city: str
    item: str
    amount_cents: int


def parse(raw: bytes, *, release: int) -> Line:
    """
    Read one line of the file.

    Args:
        raw: The line as it is in the file, without its end.
        release: Release 1 reads UTF-8 and dates like 2026-11-02; release 2 also
            latin-1 and 02.11.2026.

    Raises:
        LineRefused: It is wrong, and says how.
        LineNotUnderstood: It may be right, for a later release.
    """
    (cells,) = csv.reader([_decode(raw, release)])
    if len(cells) != len(COLUMNS):
        raise LineRefused(f"has {len(cells)} fields, not {len(COLUMNS)}")
    fields = dict(zip(COLUMNS, map(str.strip, cells), strict=True))
    for name, value in fields.items():
        if not value:
            raise LineRefused(f"the field {name} is missing")
    return Line(
        number=fields["number"],
        ordered_on=_date(fields["ordered_on"], release),
        customer=fields["customer"],
        email=fields["email"],
        city=fields["city"],
        item=fields["item"],
        amount_cents=_cents(fields["amount"]),
    )


def _decode(raw: bytes, release: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        if release < 2:
            raise LineNotUnderstood(
                f"is not UTF-8: byte 0x{raw[exc.start]:02x} at {exc.start}"
            ) from exc
        return raw.decode("latin-1")


def _date(text: str, release: int) -> date:
    german = re.fullmatch(r"(\d\d)\.(\d\d)\.(\d{4})", text)
    if german and release < 2:
        raise LineNotUnderstood(f"the date {text!r} is not like 2026-11-02")
    try:
        if german:
            return date(int(german[3]), int(german[2]), int(german[1]))
        return date.fromisoformat(text)
    except ValueError as exc:
        raise LineRefused(f"{text!r} is no date") from exc


def _cents(text: str) -> int:
    try:
        amount = Decimal(text)
    except InvalidOperation as exc:
        raise LineRefused(f"the amount {text!r} is no number") from exc
    if not 0 < amount <= MAX_AMOUNT:
        raise LineRefused(f"the amount {text!r} is absurd")
    return int(amount * 100)
