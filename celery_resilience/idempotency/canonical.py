"""One text for each value: equal texts, equal values. No Celery, no I/O.

Every part says its kind, and a part of several says how many, so that no value can
imitate another: 1 and "1", or "a" and "bc" beside "ab" and "c".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID


class NoCanonicalForm(TypeError):
    """The value is of a type that has no one text."""


def canonical(value: Any) -> str:
    """
    The one text of *value*.

    Lists and tuples are alike, for serializers confuse them; sets and dicts have no
    order; a time with a zone is its moment.

    Raises:
        NoCanonicalForm: The message names the type, and never the value.
    """
    parts: list[str] = []
    write(value, parts)
    return "".join(parts)


def is_stable(value: Any) -> bool:
    """Whether every serializer hands *value* over with the same canonical text."""
    kind = type(value)
    if kind in _STABLE:
        return True
    if kind is list or kind is tuple:
        return all(map(is_stable, value))
    if kind is dict:
        return all(type(k) is str for k in value) and all(
            map(is_stable, value.values())
        )
    return False


#: Not float: NaN is refused by some serializers and becomes null by others.
_STABLE = frozenset({str, int, bool, type(None)})


def write(value: Any, parts: list[str]) -> None:
    """Add the canonical text of *value*, as `canonical` has it, to *parts*."""
    kind = type(value)
    if kind is str:
        parts.append(f"s{len(value)}:{value}")
    elif kind is int:
        parts.append(f"i{value};")
    elif value is None:
        parts.append("n")
    elif kind is bool:
        parts.append("t" if value else "f")
    elif kind is list or kind is tuple:
        parts.append(f"l{len(value)}:")
        for item in value:
            write(item, parts)
    elif kind is dict:
        _write_dict(value, parts)
    else:
        _write_other(value, parts)


def _write_dict(value: Mapping[Any, Any], parts: list[str]) -> None:
    parts.append(f"m{len(value)}:")
    for key, item in sorted((canonical(k), v) for k, v in value.items()):
        parts.append(key)
        write(item, parts)


def _write_other(value: Any, parts: list[str]) -> None:
    # bool before int, datetime before date: each is a kind of the other.
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NoCanonicalForm("a float that is not finite")
        parts.append(f"d{value + 0.0!r};")  # -0.0 is 0.0
    elif isinstance(value, bytes | bytearray | memoryview):
        parts.append(f"b{len(bytes(value))}:{bytes(value).hex()}")
    elif isinstance(value, datetime):
        try:
            moment = value if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError as exc:
            raise NoCanonicalForm("a moment that UTC has no date for") from exc
        parts.append(f"D{moment.isoformat()};")
    elif isinstance(value, date):
        parts.append(f"Y{value.isoformat()};")
    elif isinstance(value, time):
        parts.append(f"T{value.isoformat()};")
    elif isinstance(value, timedelta):
        parts.append(f"P{value // timedelta(microseconds=1)};")
    elif isinstance(value, Decimal):
        if not value.is_finite():
            raise NoCanonicalForm("a Decimal that is not finite")
        parts.append(f"N{value};")
    elif isinstance(value, UUID):
        parts.append(f"U{value.hex};")
    elif isinstance(value, set | frozenset):
        _write_texts("S", sorted(map(canonical, value)), parts)
    elif isinstance(value, str):
        write(str.__str__(value), parts)
    elif isinstance(value, int):
        write(int(value), parts)
    elif isinstance(value, Mapping):
        _write_dict(value, parts)
    elif isinstance(value, list | tuple):
        write(list(value), parts)
    else:
        raise NoCanonicalForm(f"a {type(value).__qualname__}")


def _write_texts(kind: str, texts: Iterable[str], parts: list[str]) -> None:
    found = list(texts)
    parts.append(f"{kind}{len(found)}:")
    parts += found
