"""What a finished key remembers, as bytes, by the app's result serializer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from celery_resilience.serialization import deserialized, serialized

#: A larger result is looked up in the result backend.
MAX_INLINE_BYTES = 32_768

_INLINE, _NOT_KEPT = b"=", b"!"

#: A result that the result backend has, or will have, under the task's id.
IN_BACKEND = b"@"

#: One that another task will have, which goes on under the task's id.
HANDED_OVER = b">"


class Kept(StrEnum):
    """Where a result is."""

    HERE = "here"
    IN_BACKEND = "in_backend"
    HANDED_OVER = "handed_over"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class SavedResult:
    """
    What a duplicate is given.

    Attributes:
        kept: Where the result is.
        value: The result, if it is here.
    """

    kept: Kept
    value: Any = None


def pack(result: Any, serializer: str, *, has_backend: bool) -> bytes:
    """
    A result as it is remembered; one that cannot be serialized is not.

    Args:
        serializer: The app's `result_serializer`.
        has_backend: The result backend stores this task's results.
    """
    if result is None:
        return _packed_none(serializer)
    return _packed(result, serializer, has_backend=has_backend)


@cache
def _packed_none(serializer: str) -> bytes:
    """What most tasks return, which is the same each time."""
    return _packed(None, serializer, has_backend=False)


def _packed(result: Any, serializer: str, *, has_backend: bool) -> bytes:
    try:
        content_type, encoding, data = serialized(result, serializer)
    except Exception:
        # Whatever a serializer, or a type that it asks, raises: Celery will say so.
        return _NOT_KEPT
    if len(data) > MAX_INLINE_BYTES:
        return IN_BACKEND if has_backend else _NOT_KEPT
    return b"\0".join((_INLINE + content_type.encode(), encoding.encode(), data))


def unpack(data: bytes | None, accept: Sequence[str] | None) -> SavedResult:
    """
    A remembered result, with the types that it has for whoever asks Celery for it.

    Args:
        accept: The content types that the app takes results in; pickle only if asked.
    """
    if not data or data[:1] == _NOT_KEPT:
        return SavedResult(Kept.NOWHERE)
    if data[:1] == IN_BACKEND:
        return SavedResult(Kept.IN_BACKEND)
    if data[:1] == HANDED_OVER:
        return SavedResult(Kept.HANDED_OVER)
    content_type, encoding, body = data[1:].split(b"\0", 2)
    try:
        value = deserialized(
            content_type.decode(), encoding.decode(), body, accept=accept
        )
    except ValueError:
        return SavedResult(Kept.NOWHERE)
    return SavedResult(Kept.HERE, value)
