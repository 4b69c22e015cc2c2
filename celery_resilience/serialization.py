"""Values as bytes and back, by the serializers that the app has registered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kombu.exceptions import KombuError
from kombu.serialization import dumps, loads, prepare_accept_content


def serialized(value: Any, serializer: str) -> tuple[str, str, bytes]:
    """
    Content type, content encoding and bytes of *value*.

    Raises:
        Exception: Whatever the serializer does, or a type that it asks.
    """
    content_type, encoding, data = dumps(value, serializer)
    return content_type, encoding, data.encode() if isinstance(data, str) else data


def deserialized(
    content_type: str, encoding: str, data: bytes, *, accept: Iterable[str] | None
) -> Any:
    """
    The value that *data* stands for.

    Args:
        accept: Serializers or content types that are taken; pickle only if it is
            among them. None: all but those that kombu disables.

    Raises:
        ValueError: It is refused, or is no such data.
    """
    try:
        accepted = prepare_accept_content(accept)
        return loads(data, content_type, encoding, accept=accepted, force=True)
    except KombuError as exc:
        raise ValueError(str(exc)) from exc
