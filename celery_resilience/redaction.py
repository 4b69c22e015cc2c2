"""What an operator may see of a task's arguments and texts.

Stored bytes are never touched, so that a replay is exact; everything that is
logged, listed or shown goes through here. Policy only: no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

MASK = "***"

#: Parts of names that are hidden without being asked for.
HIDDEN_WORDS = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "api_key",
    "apikey",
    "private_key",
    "authorization",
    "credential",
    "cookie",
    "session_id",
    "card_number",
    "cvv",
    "cvc",
    "iban",
    "ssn",
)

MAX_DEPTH = 4
MAX_ITEMS = 20
MAX_VALUE_CHARS = 256
MAX_TEXT_CHARS = 2048

#: Shorter values would blank out half of a message by accident.
MIN_SECRET_CHARS = 4


@dataclass(frozen=True, slots=True)
class ShownArguments:
    """
    The redacted texts of a call.

    Attributes:
        args, kwargs: As they are shown.
        named: Each argument by its name, or its position where it has none.
        secrets: The values that were hidden.
    """

    args: str
    kwargs: str
    named: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


def show_arguments(
    args: Any,
    kwargs: Any,
    *,
    parameters: Sequence[str] = (),
    hidden: Iterable[str] = (),
) -> ShownArguments:
    """
    Write a call's arguments with secrets masked and long values cut.

    Args:
        args: Positional arguments as the worker decoded them; any object.
        kwargs: Keyword arguments as the worker decoded them; any object.
        parameters: Names of the positional parameters, so that a positional
            secret is known by its name.
        hidden: Names to hide besides `HIDDEN_WORDS`; compared whole, any case.
    """
    secrets: list[str] = []
    names = frozenset(name.lower() for name in hidden)
    named: dict[str, str] = {}
    if isinstance(args, list | tuple):
        shown = []
        for i, value in enumerate(args[:MAX_ITEMS]):
            name = parameters[i] if i < len(parameters) else str(i)
            named[name] = _show_named(name, value, names, secrets)
            shown.append(named[name])
        if len(args) > MAX_ITEMS:
            shown.append(f"... {len(args) - MAX_ITEMS} more")
        text = f"({', '.join(shown)}{',' if len(args) == 1 else ''})"
    else:
        text = _show(args, names, secrets, 0)
    if isinstance(kwargs, Mapping):
        for key, value in _first(kwargs.items()):
            named[str(key)] = _show_named(str(key), value, names, secrets)
    return ShownArguments(
        cut(text), cut(_show(kwargs, names, secrets, 0)), named, tuple(secrets)
    )


def mask(text: str, secrets: Iterable[str]) -> str:
    """Blank *secrets* out of a message or traceback that quotes them."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def cut(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Cut *text* to *limit* characters, and say so at its end."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}... [{len(text) - limit} characters cut]"


def safe_text(value: object, limit: int = MAX_TEXT_CHARS) -> str:
    """`str(value)` that never raises, holds no NUL and no lone surrogate."""
    try:
        text = str(value)
    except Exception as exc:
        text = f"<{type(value).__name__} whose text raised {type(exc).__name__}>"
    return storable(cut(text, limit))


def storable(text: str) -> str:
    """*text* as every database and encoder takes it: no NUL, no lone surrogate."""
    if "\0" in text:
        text = text.replace("\0", "\\x00")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="backslashreplace").decode()
    return text


#: C0 and C1 control characters, and what reorders or hides text on a screen.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """*text* with nothing left in it that a terminal would obey."""
    text = _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", storable(text))
    if not keep_newlines:
        text = text.replace("\n", "\\n").replace("\t", " ")
    return text


@lru_cache(maxsize=4096)
def _is_hidden(name: str, names: frozenset[str]) -> bool:
    lower = name.lower()
    return lower in names or any(
        word in lower.replace("-", "_") for word in HIDDEN_WORDS
    )


def _show_named(
    name: str, value: Any, names: frozenset[str], secrets: list[str], depth: int = 0
) -> str:
    if name and _is_hidden(name, names):
        _remember(value, secrets)
        return f"'{MASK}'"
    return _show(value, names, secrets, depth + 1)


def _remember(value: Any, secrets: list[str]) -> None:
    if isinstance(value, str | int) and not isinstance(value, bool):
        text = safe_text(value)
        if len(text) >= MIN_SECRET_CHARS:
            secrets.append(text)
    elif isinstance(value, Mapping):
        for inner in value.values():
            _remember(inner, secrets)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            _remember(inner, secrets)


def _show(value: Any, names: frozenset[str], secrets: list[str], depth: int) -> str:
    kind = type(value)
    if kind is bool or kind is float or value is None:
        return repr(value)
    if kind is str:
        return storable(repr(cut(value, MAX_VALUE_CHARS)))
    if depth > MAX_DEPTH:
        return "..."
    if kind is dict:
        shown = [
            f"{_show(key, names, secrets, depth + 1)}: "
            + _show_named(key if type(key) is str else "", inner, names, secrets, depth)
            for key, inner in _first(value.items())
        ]
        return "{" + ", ".join(_and_more(shown, len(value))) + "}"
    if kind is list or kind is tuple:
        shown = [_show(inner, names, secrets, depth + 1) for inner in _first(value)]
        text = ", ".join(_and_more(shown, len(value)))
        return f"[{text}]" if kind is list else f"({text})"
    try:
        text = repr(value)
    except Exception as exc:
        text = f"<{kind.__name__} whose repr raised {type(exc).__name__}>"
    return storable(cut(text, MAX_VALUE_CHARS))


def _first(values: Iterable[Any]) -> list[Any]:
    return [value for value, _ in zip(values, range(MAX_ITEMS), strict=False)]


def _and_more(shown: list[str], count: int) -> list[str]:
    if count > len(shown):
        shown.append(f"... {count - len(shown)} more")
    return shown
