"""Places in Redis: a hash for each task, which Redis itself forgets."""

from __future__ import annotations

from celery_resilience.batches.store import KEEP_FINISHED_S, KEEP_S
from celery_resilience.stores.redis import RedisServer

ROOM = "batches"
VERSION = 1


class RedisCheckpointStore:
    """
    `CheckpointStore` in Redis.

    Args:
        server: Where the hashes are.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def load(self, task_id: str, name: str) -> bytes | None:
        """The place that was saved last, or None."""
        self._ready()
        with self._server.client() as client:
            found: bytes | None = client.hget(self._key(task_id), name)
        return found

    def save(self, task_id: str, name: str, place: bytes) -> None:
        """Remember *place*."""
        self._ready()
        with (
            self._server.client() as client,
            client.pipeline(transaction=True) as pipe,
        ):
            pipe.hset(self._key(task_id), name, place)
            pipe.expire(self._key(task_id), int(KEEP_S))
            pipe.execute()

    def finished(self, task_id: str) -> None:
        """The task has ended well."""
        self._ready()
        with self._server.client() as client:
            client.expire(self._key(task_id), int(KEEP_FINISHED_S))

    def _key(self, task_id: str) -> str:
        return f"{self._server.prefix(ROOM)}task:{task_id}"

    def _ready(self) -> None:
        self._server.ready(ROOM, VERSION)
