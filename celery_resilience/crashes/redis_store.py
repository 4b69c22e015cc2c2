"""Starts of redelivered messages in Redis: a list for each message."""

from __future__ import annotations

from celery_resilience.stores.redis import RedisServer

ROOM = "crashes"
VERSION = 1


class RedisStartStore:
    """
    `StartStore` in Redis.

    Args:
        server: Where the lists are.
        keep_s: Seconds after which Redis itself forgets a start: at least the
            window in which crashes are counted.
    """

    def __init__(self, server: RedisServer, *, keep_s: float) -> None:
        self._server = server
        self._keep_s = int(keep_s) + 1

    def unfinished(self, key: str, *, window_s: float) -> list[bool]:
        """The starts of *key* that never ended, oldest first."""
        self._ready()
        found = self._server.run(ROOM, "unfinished", key, window_s)
        return [alone == b"1" for alone in found]

    def record(self, key: str, *, is_alone: bool, worker: str) -> None:
        """Remember that a run of *key* starts now in *worker*."""
        self._ready()
        self._server.run(ROOM, "record", key, int(is_alone), worker, self._keep_s)

    def clear(self, key: str) -> None:
        """Forget the starts of *key*: a run has ended."""
        self._ready()
        with self._server.client() as client:
            client.delete(f"{self._server.prefix(ROOM)}message:{key}")

    def clear_worker(self, worker: str) -> None:
        """Forget the starts in *worker*: it was asked to stop."""
        self._ready()
        self._server.run(ROOM, "clear_worker", worker)

    def _ready(self) -> None:
        self._server.ready(ROOM, VERSION)
