"""The shelf in Redis: the messages in a hash, their times in a sorted set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery_resilience.shelf.store import Claimed, Shelved
from celery_resilience.stores.redis import RedisServer

ROOM = "shelf"
VERSION = 1


class RedisShelfStore:
    """
    `ShelfStore` in Redis.

    Args:
        server: Where the keys are.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def put(self, messages: Sequence[tuple[Shelved, float]]) -> None:
        """Keep messages, in one round trip."""
        words: list[Any] = []
        for (id_, text), delay_s in messages:
            words += (id_, float(delay_s), text)
        self._run("put", *words)

    def claim(self, limit: int, lease_s: float) -> Claimed:
        """Take messages that are due, in one round trip."""
        others, next_s, *rows = self._run("claim", limit, float(lease_s))
        texts = [row.decode() for row in rows]
        return Claimed(
            list(map(Shelved, texts[::2], texts[1::2])),
            float(next_s) if next_s else None,
            int(others),
        )

    def remove(self, ids: Sequence[str]) -> None:
        """Forget messages, in one round trip."""
        if ids:
            self._run("remove", *ids)

    def _run(self, script: str, *words: Any) -> Any:
        self._server.ready(ROOM, VERSION)
        return self._server.run(ROOM, script, *words)
