"""Why arguments do not survive a serializer, and what to pass in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import IOBase
from typing import Any, TypeAlias

#: Values that are looked at before the search ends: arguments are seldom so many.
MOST = 10_000

#: What most arguments are.
_HAVE_NO_KEYS = frozenset({str, int, float, bool, type(None)})

#: What a value is in, the step from there to it, and its name or number there.
_Place: TypeAlias = "tuple[_Place | None, str, Any]"

#: Serializers of text, to which every key of a mapping is a text.
KEYS_ARE_TEXTS = frozenset({"json", "application/json"})


def changed_keys(args: Any, kwargs: Any, serializer: str) -> str | None:
    """The first place with a key that the serializer turns into a text, or None."""
    if serializer not in KEYS_ARE_TEXTS:
        return None
    for place, value in _values(args, kwargs):
        if type(value) not in _HAVE_NO_KEYS and isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    return (
                        f"{_path(place)} has the key {key!r}, which is a text for the "
                        "task: pass texts as keys, or a list of pairs"
                    )
    return None


def culprit(args: Any, kwargs: Any, can_be_sent: Callable[[Any], bool]) -> str | None:
    """
    Where is what cannot be serialised, and what to pass instead; None: not found.

    Args:
        can_be_sent: Whether the serializer takes a value.
    """
    found = None
    for place, value in _values(args, kwargs):
        path = _path(place)
        # The innermost is the last one, on the way down.
        if (found is None or path.startswith(found[0])) and not can_be_sent(value):
            found = path, value
    if found is None:
        return None
    path, value = found
    return f"{path} is {_kind(value)}: pass {_instead(value)}"


def _values(args: Any, kwargs: Any) -> Iterator[tuple[_Place, Any]]:
    """Each value within the arguments with where it is, outer ones first."""
    waiting: list[tuple[_Place, Any]] = [
        ((None, "args[{}]", n), value) for n, value in enumerate(args or ())
    ]
    waiting += [((None, "{}", name), value) for name, value in (kwargs or {}).items()]
    waiting.reverse()
    seen = 0
    while waiting and seen < MOST:
        place, value = waiting.pop()
        seen += 1
        yield place, value
        if type(value) in _HAVE_NO_KEYS:
            continue
        inner: list[tuple[_Place, Any]] = []
        if isinstance(value, Mapping):
            inner = [((place, "[{!r}]", key), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            inner = [((place, "[{}]", n), item) for n, item in enumerate(value)]
        waiting += reversed(inner)


def _path(place: _Place) -> str:
    """What a reader calls it; not made for each value, for few are told."""
    outer, step, name = place
    return ("" if outer is None else _path(outer)) + step.format(name)


def _kind(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def _instead(value: Any) -> str:
    """What a task should be given in the place of *value*."""
    kind = type(value)
    bases = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    if "django.db.models.query.QuerySet" in bases:
        return "a list of the primary keys"
    if "django.db.models.base.Model" in bases or hasattr(kind, "__mapper__"):
        return "its primary key, and load it in the task"
    if isinstance(value, set | frozenset):
        return "a sorted list"
    if isinstance(value, IOBase):
        return "the path of the file, or what is in it"
    if hasattr(value, "__next__"):
        return "a list of what it yields"
    if callable(value):
        return "a name by which the task finds it"
    return "numbers, texts, lists and dicts of them, dates, Decimal, UUID or bytes"
