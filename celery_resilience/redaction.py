"""What an operator may see of a task's arguments and texts.

Stored bytes are never touched, so that a replay is exact; everything that is
logged, listed or shown goes through here. Policy only: no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

MASK = "***"

#: Parts of names that are hidden without being asked for.
HIDDEN_PARTS = (
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
)

#: Words of names that are hidden too; as parts they would hide a "classname".
HIDDEN_WORDS = ("cvv", "cvc", "iban", "ssn")

MAX_DEPTH = 4
MAX_ITEMS = 20

#: Values of one call that are looked at; their text is cut far below.
MAX_VALUES = 1_000

#: Levels of what is logged as facts.
MAX_NESTED = 12

#: Keys of one mapping among which secrets are looked for, shown or not.
MAX_KEYS = 200

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
        hidden: Names to hide besides the usual ones; compared whole, any case.
    """
    look = _Look(frozenset(name.lower() for name in hidden))
    named: dict[str, str] = {}
    if isinstance(args, list | tuple):
        shown = []
        for i, value in enumerate(args[:MAX_ITEMS]):
            name = parameters[i] if i < len(parameters) else str(i)
            named[name] = look.show_named(name, value, depth=1)
            shown.append(named[name])
        _and_more(shown, len(args))
        text = f"({', '.join(shown)}{',' if len(args) == 1 else ''})"
    else:
        text = look.show(args)
    shown_kwargs = look.show(kwargs)
    if isinstance(kwargs, Mapping):
        for key, value in _first(kwargs.items()):
            name = safe_text(key)
            named[name] = look.show_named(name, value, depth=1)
    return ShownArguments(cut(text), cut(shown_kwargs), named, tuple(look.secrets))


def mask(text: str, secrets: Iterable[str]) -> str:
    """Blank *secrets* out of a message or traceback that quotes them."""
    # The longest first, for one may begin with another.
    for secret in sorted(secrets, key=len, reverse=True):
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
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """*text* with nothing left in it that a terminal would obey."""
    text = _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", storable(text))
    if not keep_newlines:
        text = text.replace("\n", "\\n").replace("\t", " ")
    return text


@lru_cache(maxsize=4096)
def is_hidden(name: str, names: frozenset[str]) -> bool:
    """
    Whether the value of an argument is never shown.

    Args:
        names: Hidden besides the usual ones, in lower case.
    """
    lower = name.lower()
    plain = re.sub(r"[^a-z0-9]", "_", lower)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]", "_", name).lower()
    return (
        lower in names
        or any(part in plain for part in HIDDEN_PARTS)
        or any(word in HIDDEN_WORDS for word in words.split("_"))
    )


def without_secrets(value: Any, names: frozenset[str]) -> Any:
    """
    *value* with a mask for each value in it whose key is hidden.

    Mappings, lists and tuples are copied as deep as `MAX_NESTED`, and `MAX_VALUES` of
    them all; of what is left, "..." stands.

    Args:
        names: Hidden besides the usual ones, in lower case.
    """
    if not isinstance(value, _NESTS):
        return value
    left = [MAX_VALUES]

    def copy(value: Any, depth: int) -> Any:
        left[0] -= 1
        if depth > MAX_NESTED or left[0] < 0:
            return "..."
        if isinstance(value, Mapping):
            return {
                key: MASK
                if isinstance(key, str) and is_hidden(key, names)
                else copy(inner, depth + 1)
                for key, inner in islice(value.items(), MAX_VALUES)
            }
        if isinstance(value, list | tuple):
            return [copy(inner, depth + 1) for inner in islice(value, MAX_VALUES)]
        return value

    try:
        return copy(value, 0)
    except Exception as exc:
        return f"<{type(value).__name__} that raised {type(exc).__name__}>"


_NESTS = (Mapping, list, tuple)


class _Look:
    """
    One look at a call's arguments, of bounded length whatever they are.

    Args:
        names: Hidden besides the usual ones, in lower case.

    Attributes:
        secrets: The values that were hidden.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.secrets: list[str] = []
        self._names = names
        self._left = MAX_VALUES

    def show_named(self, name: str, value: Any, depth: int) -> str:
        """The text of a value, or a mask where its name is hidden."""
        if name and is_hidden(name, self._names):
            self._remember(value)
            return f"'{MASK}'"
        return self.show(value, depth)

    def show(self, value: Any, depth: int = 0) -> str:
        """The text of a value with what is hidden in it masked."""
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            return "..."
        try:
            return storable(self._text(value, depth))
        except Exception as exc:
            kind = type(value).__name__
            return f"<{kind} whose repr raised {type(exc).__name__}>"

    def _text(self, value: Any, depth: int) -> str:
        if isinstance(value, str):
            return repr(cut(str(value), MAX_VALUE_CHARS))
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset):
            shown = [self.show(inner, depth + 1) for inner in _first(value)]
            text = ", ".join(_and_more(shown, len(value)))
            if isinstance(value, tuple):
                return f"({text})"
            return f"[{text}]" if isinstance(value, list) else f"{{{text}}}"
        if isinstance(value, bytes | bytearray) and len(value) > MAX_VALUE_CHARS:
            shown_part = repr(bytes(value[:MAX_VALUE_CHARS]))
            return f"{shown_part}... [{len(value) - MAX_VALUE_CHARS} bytes cut]"
        return cut(repr(value), MAX_VALUE_CHARS)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> str:
        shown: list[str] = []
        for key, inner in islice(value.items(), MAX_KEYS):
            name = str(key) if isinstance(key, str) else ""
            if len(shown) < MAX_ITEMS:
                text = self.show_named(name, inner, depth + 1)
                shown.append(f"{self.show(key, depth + 1)}: {text}")
            elif name and is_hidden(name, self._names):
                self._remember(inner)
        return "{" + ", ".join(_and_more(shown, len(value))) + "}"

    def _remember(self, value: Any) -> None:
        if isinstance(value, str):
            self._remember_text(str(value))
        elif isinstance(value, bytes | bytearray):
            self._remember_text(repr(bytes(value))[2:-1])
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self._remember_text(repr(value))
        elif isinstance(value, Mapping):
            for inner in islice(value.values(), MAX_KEYS):
                self._remember(inner)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in islice(value, MAX_KEYS):
                self._remember(inner)

    def _remember_text(self, text: str) -> None:
        if len(text) >= MIN_SECRET_CHARS:
            self.secrets.append(storable(text))


def _first(values: Iterable[Any]) -> list[Any]:
    return list(islice(values, MAX_ITEMS))


def _and_more(shown: list[str], count: int) -> list[str]:
    if count > len(shown):
        shown.append(f"... {count - len(shown)} more")
    return shown


def without_password(url: str) -> str:
    """A URL as it may be logged; any other text is as it was."""
    url = re.sub(r"(?<=://)([^/@:]*):(?:[^/]*|[^@]*)@", rf"\1:{MASK}@", url, count=1)
    return re.sub(r"(?i)((?:^|[?&])[^=&]*password=)[^&]*", rf"\1{MASK}", url)
