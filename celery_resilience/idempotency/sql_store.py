"""Keys in a SQL database: a row for each."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    Connection,
    Executable,
    Insert,
    and_,
    case,
    delete,
    func,
    select,
    true,
    update,
)
from sqlalchemy.sql import ColumnElement

from celery_resilience.deadline import TASK_WAITS_S, answer_within
from celery_resilience.idempotency.record import (
    WAITING,
    Begun,
    Claim,
    KeyRecord,
    KeyState,
    Verdict,
)
from celery_resilience.idempotency.rows import outcome, stored
from celery_resilience.idempotency.sql_table import (
    ROOM,
    TABLES,
    VERSION,
    Row,
    Statements,
    keys,
)
from celery_resilience.stores.sql import SqlDatabase
from celery_resilience.stores.sql_statements import WAITS_S

Result = TypeVar("Result")

#: Rows read by one statement, and leases renewed by one.
PAGE = 500


class SqlKeyStore:
    """
    `KeyStore` in a SQL database.

    In SQLite, a power cut may undo what was said last; a killed process does not.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
        clock: This host's wall time, for SQLite, which has no clock of its own; the
            others go by theirs.
    """

    def __init__(
        self,
        database: SqlDatabase,
        namespace: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._namespace = namespace
        self._clock = clock
        self._statements = database.statements
        self._say = Statements(database.dialect)

    def begin(self, claim: Claim) -> Begun:
        """Take a key for one run, in one round trip."""
        row = self._asked(self._upsert, self._say.begin, self._words(claim))
        state = KeyState(row.state)
        if state is KeyState.RUNNING and row.token == claim.token:
            found = KeyState(row.found) if row.found else None
            return Begun(Verdict.RUN, epoch=row.epoch, found=found)
        if not claim.is_forced and not _are_same(claim, row):
            return Begun(Verdict.MISMATCH, found=state, owner=row.owner)
        if state is KeyState.DONE:
            return Begun(Verdict.DONE, found=state, owner=row.owner, result=row.result)
        return Begun(
            Verdict.BUSY,
            found=state,
            owner=row.owner,
            remaining_s=max(0.0, row.remaining_s),
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
        words = self._words(claim) | {
            "new_state": str(state),
            "result": result,
            "until_s": until_s,
        }
        return self._asked(self._finish, claim, words)

    def _finish(self, claim: Claim, words: Mapping[str, Any]) -> str | None:
        if self._statements.run(self._say.finish_own, words).changed:
            return None
        row = self._upsert(self._say.finish, words)
        return None if row.token == claim.token else row.owner

    def renew(self, claims: Sequence[Claim]) -> set[str]:
        """Begin the leases of running keys anew, in one command."""
        lost: set[str] = set()
        for start in range(0, len(claims), PAGE):
            lost |= self._renew(claims[start : start + PAGE])
        return lost

    def _renew(self, claims: Sequence[Claim]) -> set[str]:
        by_token = {claim.token: claim for claim in claims}
        running = and_(
            self._mine(),
            keys.c.key.in_([claim.key for claim in claims]),
            keys.c.token.in_(by_token),
            keys.c.state == KeyState.RUNNING,
            keys.c.expires_at > self._database.now(),
        )
        lease_until = self._database.now() + case(
            {token: claim.lease_s for token, claim in by_token.items()},
            value=keys.c.token,
        )
        keep_s = case(
            {token: claim.keep_s for token, claim in by_token.items()},
            value=keys.c.token,
        )
        statement = (
            update(keys)
            .where(running)
            .values(lease_until=lease_until, expires_at=lease_until + keep_s)
        )

        def renewed() -> set[str]:
            if self._statements.run_once(statement).changed == len(by_token):
                return set()
            found = self._statements.run_once(select(keys.c.token).where(running)).rows
            return {
                claim.key
                for token, claim in by_token.items()
                if token not in {row[0] for row in found}
            }

        return self._asked(renewed)

    def reserve(self, claim: Claim) -> str | None:
        """Reserve a key for a message that is about to be sent."""
        row = self._asked(self._upsert, self._say.reserve, self._words(claim))
        is_in_the_way = (
            row.state in WAITING
            and row.remaining_s > 0
            and row.owner != stored(claim.owner)
            and _are_same(claim, row)
        )
        return row.owner if is_in_the_way else None

    def release(self, key: str, owner: str) -> None:
        """The message *owner*, for which *key* waits, will not run."""
        reserved = and_(
            self._is(key),
            keys.c.state.in_(WAITING),
            keys.c.owner == stored(owner),
        )
        forgotten = delete(keys).where(reserved, keys.c.token == "")
        # A run of it has ended, and not in success.
        failed = (
            update(keys)
            .where(reserved)
            .values(state=KeyState.FAILED, lease_until=self._database.now())
        )

        def released() -> None:
            if not self._statements.run_once(forgotten).changed:
                self._statements.run_once(failed)

        self._asked(released)

    def weaknesses(self) -> Sequence[str]:
        """None: a database keeps what it has confirmed."""
        return ()

    # --- for those who look after keys ---------------------------------------------

    def get(self, key: str) -> KeyRecord | None:
        """What is known of a key."""
        return next(self._records(self._is(key)), None)

    def list(
        self, *, state: KeyState | None = None, task: str = "*", name: str = ""
    ) -> Iterator[KeyRecord]:
        """The keys that are remembered, in any order."""
        wanted: list[ColumnElement[bool]] = [self._mine()]
        if state is not None:
            wanted.append(keys.c.state == state)
        if name:
            wanted.append(keys.c.name == stored(name))
        is_wanted = re.compile(fnmatch.translate(task)).match
        last = ""
        while True:
            page = [*self._records(*wanted, keys.c.key > last)]
            yield from (record for record in page if is_wanted(record.task))
            if len(page) < PAGE:
                return
            last = page[-1].key

    def _records(self, *wanted: ColumnElement[bool]) -> Iterator[KeyRecord]:
        """The first page of what is wanted."""
        self._ready()
        query = (
            select(
                *(keys.c.key, keys.c.name, keys.c.task, keys.c.state, keys.c.owner),
                *(keys.c.holder, keys.c.epoch, keys.c.begun_at, keys.c.lease_until),
                keys.c.expires_at,
                func.coalesce(func.length(keys.c.result), 0),
            )
            .where(*wanted, keys.c.expires_at > self._database.now())
            .order_by(keys.c.key)
            .limit(PAGE)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        for key, name, task, state, *others in rows:
            yield KeyRecord(key, name, task, KeyState(state), *others)

    def forget(self, key: str, *, is_running_too: bool = False) -> bool:
        """Forget a key, so that its effect may happen again."""
        now = self._database.now()
        is_running = and_(keys.c.state == KeyState.RUNNING, keys.c.lease_until > now)
        statement = delete(keys).where(
            self._is(key),
            keys.c.expires_at > now,
            true() if is_running_too else ~is_running,
        )
        return bool(self._write(statement))

    def purge(self, limit: int) -> int:
        """Delete at most *limit* expired keys."""
        self._ready()
        expired = and_(self._mine(), keys.c.expires_at <= self._database.now())
        query = select(keys.c.key).where(expired).limit(limit)
        with self._database.reading() as connection:
            found = connection.execute(query).scalars().all()
        purged = 0
        for start in range(0, len(found), PAGE):
            page = found[start : start + PAGE]
            # Again: somebody may have begun meanwhile.
            statement = delete(keys).where(expired, keys.c.key.in_(page))
            purged += self._write(statement)
        return purged

    # --- how -------------------------------------------------------------------------

    def _upsert(self, statement: Insert, words: Mapping[str, Any]) -> Row:
        if self._statements.can_return:
            (row,) = self._statements.run(self._say.returning(statement), words).rows
            return Row(*row)
        self._statements.run(statement, words)
        rows = self._statements.run(self._say.read, words).rows
        # Forgotten between the two.
        return Row(*rows[0]) if rows else Row.unknown()

    def _asked(self, ask: Callable[..., Result], *words: Any) -> Result:
        self._ready()
        if self._database.dialect.has_limits:
            return ask(*words)
        return answer_within(WAITS_S, lambda: ask(*words))

    def _words(self, claim: Claim) -> dict[str, Any]:
        return {
            "namespace": self._namespace,
            "key": claim.key,
            "name": stored(claim.name),
            "task": stored(claim.task),
            "owner": stored(claim.owner),
            "token": claim.token,
            "holder": stored(claim.holder),
            "fingerprint": claim.fingerprint,
            "lease_s": claim.lease_s,
            "keep_s": claim.keep_s,
            "dead_holder": stored(claim.dead_holder or ""),
            "is_forced": claim.is_forced,
            "now": self._clock(),
        }

    def _write(self, statement: Executable) -> int:
        self._ready()

        def written(connection: Connection) -> int:
            return connection.execute(statement).rowcount

        return self._database.write(written)

    def _ready(self) -> None:
        if not self._database.is_ready(ROOM):
            answer_within(
                TASK_WAITS_S, lambda: self._database.ready(ROOM, VERSION, TABLES)
            )

    def _mine(self) -> ColumnElement[bool]:
        return keys.c.namespace == self._namespace

    def _is(self, key: str) -> ColumnElement[bool]:
        return and_(self._mine(), keys.c.key == key)


def _are_same(claim: Claim, row: Row) -> bool:
    """Whether a claim's arguments are those of the row; "" is like any."""
    fingerprints = {claim.fingerprint, row.fingerprint} - {""}
    return len(fingerprints) < 2
