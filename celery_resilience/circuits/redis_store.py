"""Circuits in Redis: a hash for each, which Redis itself forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery_resilience.circuits.store import Answer, Stored
from celery_resilience.stores.redis import RedisServer

ROOM = "circuits"
VERSION = 1

#: Nobody waits long for a circuit: how `RedisServer` is made for them.
LIMITS = {"connect_s": 1.0, "answer_s": 1.0, "health_check_s": 0.0}


class RedisCircuitStore:
    """
    `CircuitStore` in Redis.

    Args:
        server: Where the hashes are, made with `LIMITS`.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def read(self, names: Sequence[str]) -> Answer:
        """The circuits of these names, in one round trip."""
        return self._answer(self._run("read", *names), names)

    def swap(self, name: str, seen: str, new: Stored, *, keep_s: float) -> Answer:
        """Replace a circuit if it still is of the version *seen*."""
        kept_ms = int(keep_s * 1000) + 1
        found = self._run("swap", name, seen, new.version, new.text, kept_ms)
        return self._answer(found, [name])

    def tickets(self, name: str, generation: int, count: int, *, keep_s: float) -> int:
        """Take tickets, in one round trip."""
        kept_ms = int(keep_s * 1000) + 1
        return int(self._run("tickets", name, generation, count, kept_ms))

    def take_slot(self, name: str, token: str, *, limit: int, lease_s: float) -> bool:
        """Take one of *limit* slots for a task that runs, in one round trip."""
        return bool(self._run("take_slot", name, token, limit, lease_s))

    def give_slot(self, name: str, token: str) -> None:
        """Give a slot back."""
        self._server.ready(ROOM, VERSION)
        with self._server.client() as client:
            client.zrem(f"{self._server.prefix(ROOM)}slots:{name}", token)

    def names(self) -> Sequence[str]:
        """The circuits that are not forgotten."""
        self._server.ready(ROOM, VERSION)
        prefix = self._server.prefix(ROOM) + "circuit:"
        with self._server.client() as client:
            # A glob's own characters in the namespace match themselves too.
            found = {key.decode() for key in client.scan_iter(f"{_plain(prefix)}*")}
        return sorted(key.removeprefix(prefix) for key in found)

    def _run(self, script: str, *words: Any) -> Any:
        self._server.ready(ROOM, VERSION)
        return self._server.run(ROOM, script, *words)

    @staticmethod
    def _answer(reply: Sequence[Any], names: Sequence[str]) -> Answer:
        now, *rows = reply
        found = {
            name: Stored(version.decode(), text.decode())
            for name, (version, text) in zip(names, rows, strict=True)
            if version
        }
        return Answer(float(now), found)


def _plain(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "*?[]\\" else sign for sign in text)
