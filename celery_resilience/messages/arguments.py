"""Why arguments do not survive a serializer, and what to pass in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from io import IOBase
from itertools import islice
from typing import Any

#: Values that are looked at before the search ends: arguments are seldom so many.
MOST = 10_000

#: What most arguments are.
_HAVE_NO_KEYS = frozenset({str, int, float, bool, type(None)})

#: Serializers of text, to which every key of a mapping is a text.
KEYS_ARE_TEXTS = frozenset({"json", "application/json"})


def changed_keys(args: Any, kwargs: Any, serializer: str) -> str | None:
    """The first place with a key that the serializer turns into a text, or None."""
    if serializer not in KEYS_ARE_TEXTS or _keys_are_texts(args, kwargs):
        return None
    for path, value in _values(args, kwargs):
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    return (
                        f"{path} has the key {key!r}, which is a text for the task: "
                        "pass texts as keys, or a list of pairs"
                    )
    return None


def _keys_are_texts(args: Any, kwargs: Any) -> bool:
    """Whether the first `MOST` values have no other keys; for each call, so no paths."""
    waiting = [*(args or ()), *(kwargs or {}).values()]
    for value in waiting:  # which grows
        if type(value) in _HAVE_NO_KEYS:
            continue
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                return False
            inner: Iterable[Any] = value.values()
        elif isinstance(value, list | tuple):
            inner = value
        else:
            continue
        waiting.extend(islice(inner, max(0, MOST - len(waiting))))
    return True


def culprit(args: Any, kwargs: Any, can_be_sent: Callable[[Any], bool]) -> str | None:
    """
    Where is what cannot be serialised, and what to pass instead; None: not found.

    Args:
        can_be_sent: Whether the serializer takes a value.
    """
    found = None
    for path, value in _values(args, kwargs):
        # The innermost is the last one, on the way down.
        if (found is None or path.startswith(found[0])) and not can_be_sent(value):
            found = path, value
    if found is None:
        return None
    path, value = found
    return f"{path} is {_kind(value)}: pass {_instead(value)}"


def _values(args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Each value within the arguments with where it is, outer ones first."""
    waiting = [(f"args[{n}]", value) for n, value in enumerate(args or ())]
    waiting += [(str(name), value) for name, value in (kwargs or {}).items()]
    waiting.reverse()
    seen = 0
    while waiting and seen < MOST:
        path, value = waiting.pop()
        seen += 1
        yield path, value
        inner: list[tuple[str, Any]] = []
        if isinstance(value, Mapping):
            inner = [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            inner = [(f"{path}[{n}]", item) for n, item in enumerate(value)]
        waiting += reversed(inner)


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
