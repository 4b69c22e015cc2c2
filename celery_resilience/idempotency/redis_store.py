"""Keys in Redis: a hash for each, which Redis itself forgets."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from celery_resilience.idempotency.record import (
    Begun,
    Claim,
    KeyRecord,
    KeyState,
    Verdict,
)
from celery_resilience.idempotency.rows import outcome, stored
from celery_resilience.stores.redis import RedisServer

ROOM = "idempotency"
VERSION = 1

#: A task waits for its keys: how `RedisServer` is made for them. No round trip is
#: spent on whether an idle connection lives.
LIMITS = {"connect_s": 2.0, "answer_s": 5.0, "health_check_s": 0.0}

#: Hashes read in one round trip.
READ = 500

_RECORD = (
    *("name", "task", "state", "owner", "holder", "epoch"),
    *("begun_at", "lease_until", "expires_at", "result_bytes"),
)


class RedisKeyStore:
    """
    `KeyStore` in Redis 6.2 or later.

    Args:
        server: Where the hashes are, made with `LIMITS`.
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._prefix = server.prefix(ROOM) + "key:"

    def begin(self, claim: Claim) -> Begun:
        """Take a key for one run, in one round trip."""
        answer = self._run("begin", _text(claim))
        if isinstance(answer, int):
            return Begun(Verdict.RUN, epoch=answer)
        verdict, epoch, found, owner, remaining_s, result = answer
        return Begun(
            Verdict(verdict.decode()),
            epoch=epoch,
            found=KeyState(found.decode()) if found else None,
            owner=owner.decode(),
            remaining_s=max(0.0, float(remaining_s)),
            result=result,
        )

    def finish(
        self,
        claim: Claim,
        state: KeyState,
        *,
        result: bytes | None = None,
        until_s: float = 0.0,
    ) -> str | None:
        """Say what the run of *claim* came to, in one round trip."""
        result, until_s = outcome(state, result, until_s)
        has_result = int(result is not None)
        words = (str(state), until_s, has_result, result or b"")
        owner: bytes | None = self._run("finish", _text(claim), *words)
        return None if owner is None else owner.decode()

    def renew(self, claims: Sequence[Claim]) -> set[str]:
        """Begin the leases of running keys anew, in one command."""
        if not claims:
            return set()
        words: list[Any] = []
        for claim in claims:
            words += (claim.key, claim.token, claim.lease_s, claim.keep_s)
        return {key.decode() for key in self._run("renew", *words)}

    def reserve(self, claim: Claim) -> str | None:
        """Reserve a key for a message that is about to be sent."""
        owner: bytes | None = self._run("reserve", _text(claim))
        return None if owner is None else owner.decode()

    def release(self, key: str, owner: str) -> None:
        """The message *owner*, for which *key* waits, will not run."""
        self._run("release", key, stored(owner))

    def weaknesses(self) -> Sequence[str]:
        """How this Redis may forget keys before their time."""
        return self._server.weaknesses()

    # --- for those who look after keys ---------------------------------------------

    def get(self, key: str) -> KeyRecord | None:
        """What is known of a key."""
        self._ready()
        return next(self._records([self._prefix + key]), None)

    def list(
        self, *, state: KeyState | None = None, task: str = "*", name: str = ""
    ) -> Iterator[KeyRecord]:
        """The keys that are remembered, in any order."""
        self._ready()
        is_wanted = re.compile(fnmatch.translate(task)).match
        name = stored(name)
        for page in self._pages():
            for record in self._records(page):
                if (
                    (state is None or record.state is state)
                    and (not name or record.name == name)
                    and is_wanted(record.task)
                ):
                    yield record

    def forget(self, key: str, *, is_running_too: bool = False) -> bool:
        """Forget a key, so that its effect may happen again."""
        return bool(self._run("forget", key, int(is_running_too)))

    def purge(self, limit: int) -> int:
        """Nothing: Redis forgets by itself."""
        return 0

    def _pages(self) -> Iterator[Sequence[str]]:
        """The names of all hashes; Redis may tell one twice, and it is given once."""
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix) + "*"
        seen: set[bytes] = set()
        page: list[str] = []
        with self._server.client() as client:
            for name in client.scan_iter(pattern, count=READ):
                if name in seen:
                    continue
                seen.add(name)
                page.append(name.decode())
                if len(page) == READ:
                    yield page
                    page = []
        yield page

    def _records(self, names: Sequence[str]) -> Iterator[KeyRecord]:
        rows = self._server.read(names, _RECORD)
        for hash_name, row in zip(names, rows, strict=True):
            if row[2] is None:
                continue
            name, task, state, owner, holder = (word.decode() for word in row[:5])
            yield KeyRecord(
                key=hash_name.removeprefix(self._prefix),
                name=name,
                task=task,
                state=KeyState(state),
                owner=owner,
                holder=holder,
                epoch=int(row[5]),
                begun_at=float(row[6]),
                lease_until=float(row[7]),
                expires_at=float(row[8]),
                result_bytes=int(row[9]),
            )

    def _run(self, script: str, *words: Any) -> Any:
        self._ready()
        return self._server.run(ROOM, script, *words)

    def _ready(self) -> None:
        self._server.ready(ROOM, VERSION)


@lru_cache(maxsize=64)  # each is said twice, as its run begins and as it ends
def _text(claim: Claim) -> str:
    """A claim in one word, as `claim_of` of the scripts reads it."""
    return "\0".join(
        (
            claim.key,
            stored(claim.name),
            stored(claim.task),
            stored(claim.owner),
            claim.token,
            stored(claim.holder),
            claim.fingerprint,
            repr(claim.lease_s),
            repr(claim.keep_s),
            stored(claim.dead_holder or ""),
            "1" if claim.is_forced else "0",
            "",
        )
    )
