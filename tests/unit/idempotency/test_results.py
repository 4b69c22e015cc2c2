"""What a key remembers of a result is what Celery would have given."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from celery_resilience.idempotency.results import (
    MAX_INLINE_BYTES,
    Kept,
    SavedResult,
    pack,
    unpack,
)


@pytest.mark.parametrize(
    "value",
    [
        *(None, 0, "", {}, [], False, 1.5, "\0", "\U0001f600", {"a": [1, None]}),
        *(datetime(2026, 11, 2, tzinfo=UTC), Decimal("1.10"), UUID(int=1)),
    ],
)
def test_a_result_is_itself(value: Any) -> None:
    """With its type, whatever bytes it is made of."""
    saved = unpack(pack(value, "json", has_backend=False), ["json"])

    assert saved == SavedResult(Kept.HERE, value)
    assert type(saved.value) is type(value)


def test_a_large_result_is_looked_up() -> None:
    """Where there is a backend that has it."""
    value = "x" * MAX_INLINE_BYTES

    assert unpack(pack(value, "json", has_backend=True), ["json"]) == SavedResult(
        Kept.IN_BACKEND
    )
    assert unpack(pack(value, "json", has_backend=False), ["json"]) == SavedResult(
        Kept.NOWHERE
    )
    assert (
        unpack(pack(value[:-2], "json", has_backend=False), ["json"]).kept is Kept.HERE
    )


def test_a_result_that_cannot_be_serialized_is_not_kept() -> None:
    """And nothing is raised: the effect has happened."""

    class Rude:
        def __json__(self) -> None:
            raise RuntimeError("no")

    for value in (object(), {1, object()}, Rude()):
        saved = unpack(pack(value, "json", has_backend=True), ["json"])
        assert saved == SavedResult(Kept.NOWHERE)


def test_what_the_app_does_not_accept_is_not_loaded() -> None:
    """A pickle in a store that somebody else can write is not run."""
    packed = pack({"a": 1}, "pickle", has_backend=False)

    assert unpack(packed, ["json"]) == SavedResult(Kept.NOWHERE)
    assert unpack(packed, ["pickle"]) == SavedResult(Kept.HERE, {"a": 1})


@pytest.mark.parametrize("data", [None, b"", b"!"])
def test_nothing_is_nothing(data: bytes | None) -> None:
    """A key that was finished without a result."""
    assert unpack(data, ["json"]) == SavedResult(Kept.NOWHERE)
