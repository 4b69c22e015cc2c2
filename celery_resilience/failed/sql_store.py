"""Failed tasks in a SQL database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    Connection,
    Update,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from celery_resilience.failed.filters import Filter, is_match
from celery_resilience.failed.merge import Record, merged
from celery_resilience.failed.pages import pages
from celery_resilience.failed.record import FailedTask, Phase, State, Summary
from celery_resilience.failed.rows import (
    CLAIM,
    GHOST,
    GHOST_S,
    KEPT,
    RECORD,
    SHORTEST_START,
    SUMMARY,
    TASK,
    TOP,
    claim_of,
    kept_of,
    record_of,
    row_of,
    row_of_kept,
    summary_of,
    task_of,
)
from celery_resilience.failed.sql_filter import conditions, needs_python
from celery_resilience.failed.sql_table import TABLES, VERSION, columns, failed
from celery_resilience.failed.store import Claim, Kept, Usage
from celery_resilience.redaction import storable
from celery_resilience.stores.sql import SqlDatabase

#: Rows in one statement or page.
PAGE = 500

#: Rows in one page of whole documents, each of which may be large.
DOCUMENTS = 50

_UNRESOLVED: dict[str, Any] = {
    "state": State.UNRESOLVED,
    "phase": None,
    "token": None,
    "copy": None,
}


class SqlFailedTaskStore:
    """
    `FailedTaskStore` in a SQL database.

    Args:
        database: Where the table is.
        namespace: The app's; several share a table.
    """

    def __init__(self, database: SqlDatabase, namespace: str) -> None:
        self._database = database
        self._namespace = namespace

    # --- taking documents in --------------------------------------------------------

    def keep(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Take documents from failed queues in; the same one again changes nothing."""
        self._ready()
        for page in pages(documents, PAGE):
            self._database.write(partial(self._keep_page, documents=page))

    def check(self) -> None:
        """Raise what `keep` would, if it is known now that it would."""
        self._ready()
        with self._database.writing() as connection:
            connection.execute(update(failed).where(false()).values(note=None))

    def _keep_page(
        self, connection: Connection, documents: Sequence[Mapping[str, Any]]
    ) -> None:
        by_id: dict[str, list[Mapping[str, Any]]] = {}
        for document in documents:
            by_id.setdefault(document["id"], []).append(document)
        left = self._insert_unseen(connection, by_id)
        while left:
            found = self._lock_rows(connection, left)
            new: list[Record] = []
            changed: list[Record] = []
            for id in left:
                before = found.get(id)
                after = _merged(before, by_id[id])
                if after is not None and after != before:
                    (new if before is None else changed).append(after)
            self._update(connection, changed)
            # What another collector inserted a moment ago is merged with in the
            # next round.
            is_done = self._insert(connection, [row_of(record) for record in new])
            left = [] if is_done else [record.id for record in new]
        self._forget_ghosts(connection)

    def _insert_unseen(
        self, connection: Connection, by_id: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> list[str]:
        """Insert what is most likely new; returns the ids that are to be looked for."""
        first = [_merged(None, documents) for documents in by_id.values()]
        # A replay's outcome has a record.
        new = [record for record in first if record is not None and not record.number]
        if not self._insert(connection, [row_of(record) for record in new]):
            return list(by_id)
        return list(by_id.keys() - {record.id for record in new})

    def _lock_rows(
        self, connection: Connection, ids: Sequence[str]
    ) -> dict[str, Record]:
        query = (
            select(*columns(RECORD))
            .where(self._mine(), failed.c.id.in_(ids))
            .order_by(failed.c.id)
            .with_for_update()
        )
        return {row.id: record_of(row) for row in connection.execute(query)}

    def _update(self, connection: Connection, records: Sequence[Record]) -> None:
        if records:
            rows = [row_of(record) for record in records]
            connection.execute(
                update(failed).where(self._mine(), failed.c.id == bindparam("row_id")),
                [{"row_id": row.pop("id"), **row} for row in rows],
            )

    def _insert(
        self, connection: Connection, rows: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Insert *rows*, and say whether all were new."""
        if not rows:
            return True
        # In one order everywhere, so that collectors wait and do not deadlock.
        sorted_rows = sorted(
            ({"namespace": self._namespace, **row} for row in rows),
            key=lambda row: row["id"],
        )
        return self._database.insert_new(connection, failed, sorted_rows)

    def _forget_ghosts(self, connection: Connection) -> None:
        connection.execute(
            delete(failed).where(
                self._mine(),
                failed.c.reason == GHOST,
                failed.c.last_failed_at < self._database.now() - GHOST_S,
            )
        )

    # --- looking ----------------------------------------------------------------------

    def list(
        self, wanted: Filter, *, limit: int | None = None, oldest_first: bool = False
    ) -> Iterator[Summary]:
        """The failed tasks that match, last failed first, in flat memory."""
        self._ready()
        is_exact = not needs_python(wanted)
        size = PAGE if limit is None or not is_exact else min(PAGE, limit)
        left, last = limit, None
        while left is None or left > 0:
            rows = self._list_page(wanted, size, last, oldest_first=oldest_first)
            for row in rows:
                summary = summary_of(row)
                if left == 0:
                    return
                if is_match(wanted, summary, row.arguments):
                    left = None if left is None else left - 1
                    yield summary
            if len(rows) < size:
                return
            last = rows[-1]

    def _list_page(
        self, wanted: Filter, size: int, last: Any, *, oldest_first: bool
    ) -> Sequence[Any]:
        """
        Rows that SQL finds, of which Python may refuse some.

        Args:
            last: The row before them. Pages, and no cursor: pymysql reads a result
                whole, and a cursor keeps a transaction open.
        """
        at, id = failed.c.last_failed_at, failed.c.id
        query = (
            select(*columns(SUMMARY), failed.c.arguments)
            .where(self._mine(), *conditions(wanted))
            .order_by(at if oldest_first else at.desc(), id)
            .limit(size)
        )
        if last is not None:
            further = (
                at > last.last_failed_at if oldest_first else at < last.last_failed_at
            )
            # The first condition alone is what an index is for.
            reached = (
                at >= last.last_failed_at if oldest_first else at <= last.last_failed_at
            )
            query = query.where(
                reached, or_(further, and_(at == last.last_failed_at, id > last.id))
            )
        with self._database.reading() as connection:
            return connection.execute(query).all()

    def count(self, wanted: Filter) -> int:
        """How many match."""
        if needs_python(wanted):
            return sum(1 for _ in self.list(wanted))
        self._ready()
        query = select(func.count()).select_from(failed)
        with self._database.reading() as connection:
            return int(
                connection.execute(
                    query.where(self._mine(), *conditions(wanted))
                ).scalar_one()
            )

    def get(self, id: str) -> FailedTask | None:
        """One failed task with its message."""
        return next(self.get_many([id]), None)

    def get_many(self, ids: Iterable[str]) -> Iterator[FailedTask]:
        """Those of *ids* that there are, in their order, with their messages."""
        self._ready()
        for page in pages(ids, DOCUMENTS):
            query = select(*columns(TASK)).where(
                self._mine(), failed.c.id.in_(page), failed.c.reason != GHOST
            )
            with self._database.reading() as connection:
                found = {row.id: task_of(row) for row in connection.execute(query)}
            yield from (found[id] for id in page if id in found)

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of *ids*, whole ones, that there are."""
        self._ready()
        found: set[str] = set()
        with self._database.reading() as connection:
            for page in pages(ids, PAGE):
                query = select(failed.c.id).where(
                    self._mine(), failed.c.id.in_(page), failed.c.reason != GHOST
                )
                found.update(connection.execute(query).scalars())
        return found

    def resolve(self, start: str, *, limit: int = 2) -> Sequence[str]:
        """The ids that begin with *start*, or else those whose task id does."""
        self._ready()
        start = storable(start)
        is_meant = failed.c.task_id == start
        if start and set(start.lower()) <= set("0123456789abcdef"):
            low = start.lower()
            is_meant = or_(is_meant, failed.c.id.between(low, low + "g"))
        found = self._ids_where(is_meant, limit)
        if not found and len(start) >= SHORTEST_START:
            starts = failed.c.task_id.startswith(start, autoescape=True)
            found = self._ids_where(starts, limit)
        return found

    def _ids_where(self, is_meant: ColumnElement[bool], limit: int) -> Sequence[str]:
        query = (
            select(failed.c.id)
            .where(self._mine(), failed.c.reason != GHOST, is_meant)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def stats(self) -> Mapping[str, Any]:
        """Counts by state, and of the unresolved by reason, task and age."""
        self._ready()
        here = and_(self._mine(), failed.c.reason != GHOST)
        unresolved = and_(here, failed.c.state == State.UNRESOLVED)
        with self._database.reading() as connection:
            now = float(connection.execute(select(self._database.now())).scalar_one())
            oldest = connection.execute(
                select(func.min(failed.c.first_failed_at)).where(unresolved)
            ).scalar()

            def counted(column: Any, where: ColumnElement[bool]) -> dict[str, int]:
                query = (
                    select(column, func.count())
                    .where(where)
                    .group_by(column)
                    .order_by(func.count().desc(), column)
                    .limit(TOP)
                )
                return {str(k): int(n) for k, n in connection.execute(query)}

            by_state = counted(failed.c.state, here)
            return {
                **{str(state): by_state.get(state, 0) for state in State},
                "oldest_s": None if oldest is None else max(0.0, now - oldest),
                "by_reason": counted(failed.c.reason, unresolved),
                "by_task": counted(failed.c.task, unresolved),
                "by_exception": counted(failed.c.exception, unresolved),
                "by_failed_queue": counted(failed.c.failed_queue, unresolved),
            }

    def usage(self) -> Mapping[str, Usage]:
        """What the failed tasks of each failed queue take."""
        self._ready()
        query = (
            select(failed.c.failed_queue, func.count(), func.sum(failed.c.size))
            .where(self._mine())
            .group_by(failed.c.failed_queue)
        )
        with self._database.reading() as connection:
            return {
                queue: Usage(int(count), int(size))
                for queue, count, size in connection.execute(query)
                if queue  # a ghost has none
            }

    # --- moving elsewhere -------------------------------------------------------------

    def kept(self, ids: Iterable[str]) -> Iterator[Kept]:
        """All that is held of those of *ids* that there are, in their order."""
        self._ready()
        for page in pages(ids, DOCUMENTS):
            with self._database.reading() as connection:
                found = self._read_kept(connection, page)
            yield from (found[id] for id in page if id in found)

    def insert(self, tasks: Sequence[Kept]) -> set[str]:
        """Take in those of *tasks* that are not there; returns their ids."""
        self._ready()
        inserted: set[str] = set()
        for page in pages(tasks, DOCUMENTS):
            inserted |= self._database.write(partial(self._insert_kept, tasks=page))
        return inserted

    def _insert_kept(self, connection: Connection, tasks: Sequence[Kept]) -> set[str]:
        """One by one, so that it is known of each."""
        return {
            kept.record.id
            for kept in sorted(tasks, key=lambda kept: kept.record.id)
            if self._insert(connection, [row_of_kept(kept)])
        }

    def remove(self, tasks: Sequence[Kept]) -> set[str]:
        """Forget those of *tasks* that are still as they were read; returns their ids."""
        self._ready()
        removed: set[str] = set()
        for page in pages(tasks, DOCUMENTS):
            removed |= self._database.write(partial(self._remove, tasks=page))
        return removed

    def _remove(self, connection: Connection, tasks: Sequence[Kept]) -> set[str]:
        given = {kept.record.id: kept for kept in tasks}
        found = self._read_kept(connection, [*given], lock=True)
        ids = {id for id, kept in found.items() if kept == given[id]}
        connection.execute(delete(failed).where(self._mine(), failed.c.id.in_(ids)))
        return ids

    def _read_kept(
        self, connection: Connection, ids: Sequence[str], *, lock: bool = False
    ) -> dict[str, Kept]:
        query = select(*columns(KEPT)).where(
            self._mine(), failed.c.id.in_(ids), failed.c.reason != GHOST
        )
        if lock:
            query = query.order_by(failed.c.id).with_for_update()
        return {row.id: kept_of(row) for row in connection.execute(query)}

    # --- replaying ----------------------------------------------------------------------

    def claim(
        self,
        ids: Sequence[str],
        *,
        to_queue: str | None = None,
        wants_new_id: bool = False,
        is_forced: bool = False,
    ) -> Sequence[Claim]:
        """Take those of *ids* that are unresolved for a replay."""
        self._ready()
        ids = list(dict.fromkeys(ids))
        if not ids:
            return []
        tokens = {id: uuid4().hex for id in sorted(ids)}
        query = select(*columns(CLAIM)).where(
            self._mine(), failed.c.id.in_(tokens), failed.c.token.in_(tokens.values())
        )

        def claimed(connection: Connection) -> dict[str, Claim]:
            connection.execute(
                update(failed)
                .where(
                    self._mine(),
                    failed.c.id == bindparam("row_id"),
                    failed.c.state == State.UNRESOLVED,
                    failed.c.reason != GHOST,
                )
                .values(
                    state=State.REPLAYING,
                    phase=Phase.CLAIMED,
                    token=bindparam("new_token"),
                    copy=None,
                    claimed_at=self._database.now(),
                    to_queue=to_queue,
                    wants_new_id=wants_new_id,
                    is_forced=is_forced,
                    number=failed.c.number + 1,
                    note=None,
                ),
                [{"row_id": id, "new_token": token} for id, token in tokens.items()],
            )
            return {row.id: claim_of(row) for row in connection.execute(query)}

        found = self._database.write(claimed)
        return [found[id] for id in ids if id in found]

    def mark_sent(self, claims: Sequence[tuple[Claim, str | None]]) -> None:
        """The broker has the messages of these claims."""
        if not claims:
            return
        statement = (
            update(failed)
            .where(
                self._mine(),
                failed.c.id == bindparam("row_id"),
                # By number, for its worker may have answered already.
                failed.c.number == bindparam("row_number"),
            )
            .values(
                phase=case(
                    (failed.c.phase == Phase.CLAIMED, Phase.SENT),
                    else_=failed.c.phase,
                ),
                replays=failed.c.replays + 1,
                replayed_as=bindparam("new_id"),
            )
        )
        rows = [
            {"row_id": claim.id, "row_number": claim.number, "new_id": new_id}
            for claim, new_id in sorted(claims, key=lambda pair: pair[0].id)
        ]
        self._database.write(lambda connection: connection.execute(statement, rows))

    def release(self, claim: Claim, note: str) -> None:
        """Nothing was sent for *claim*: its record is unresolved again."""
        statement = (
            update(failed)
            .where(
                self._mine(),
                failed.c.id == claim.id,
                failed.c.token == claim.token,
                failed.c.phase == Phase.CLAIMED,
            )
            .values(**_UNRESOLVED, note=note)
        )
        self._database.write(lambda connection: connection.execute(statement))

    def finish(self, ids: Sequence[str], note: str) -> None:
        """Resolve replays that no worker will report."""
        self._set_state(
            ids, [State.REPLAYING], state=State.RESOLVED, phase=None, note=note
        )

    def take_stale_claims(self, *, older_than_s: float, limit: int) -> Sequence[Claim]:
        """Claims whose owner died before it sent them, with their old token."""
        self._ready()

        def taken(connection: Connection) -> Sequence[Claim]:
            query = (
                select(*columns(CLAIM))
                .where(
                    self._mine(),
                    failed.c.state == State.REPLAYING,
                    failed.c.phase == Phase.CLAIMED,
                    failed.c.claimed_at < self._database.now() - older_than_s,
                )
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            claims = [claim_of(row) for row in connection.execute(query)]
            if claims:
                connection.execute(
                    update(failed)
                    .where(self._mine(), failed.c.id.in_([c.id for c in claims]))
                    .values(claimed_at=self._database.now())
                )
            return claims

        return self._database.write(taken)

    def start(self, id: str, *, token: str, copy: str) -> bool:
        """Ask for leave to run a replayed message."""
        self._ready()
        statement = (
            update(failed)
            .where(
                self._mine(),
                failed.c.id == id,
                failed.c.state == State.REPLAYING,
                failed.c.token == token,
                or_(failed.c.phase != Phase.RUNNING, failed.c.copy == copy),
            )
            .values(phase=Phase.RUNNING, copy=copy)
        )
        query = select(failed.c.id).where(self._mine(), failed.c.id == id)

        def started(connection: Connection) -> bool:
            return (
                bool(connection.execute(statement).rowcount)
                or connection.execute(query).first() is None
            )

        return self._database.write(started)

    def discard(self, ids: Sequence[str]) -> int:
        """Mark unresolved ones as never to be replayed; returns how many were."""
        return self._set_state(ids, [State.UNRESOLVED], state=State.DISCARDED)

    def reopen(self, ids: Sequence[str]) -> int:
        """Make discarded ones, and replays that never came back, unresolved again."""
        return self._set_state(
            ids, [State.DISCARDED, State.REPLAYING], **_UNRESOLVED, note=None
        )

    def _set_state(
        self, ids: Sequence[str], states: Sequence[State], **values: Any
    ) -> int:
        self._ready()
        changed = 0
        for page in pages(ids, PAGE):
            statement = (
                update(failed)
                .where(
                    self._mine(),
                    failed.c.id.in_(page),
                    failed.c.state.in_(states),
                    failed.c.reason != GHOST,
                )
                .values(**values)
            )
            changed += self._database.write(partial(_count, statement=statement))
        return changed

    def _ready(self) -> None:
        self._database.ready("failed", VERSION, TABLES)

    def _mine(self) -> ColumnElement[bool]:
        return failed.c.namespace == self._namespace


def _merged(
    record: Record | None, documents: Sequence[Mapping[str, Any]]
) -> Record | None:
    for document in documents:
        record = merged(record, document)
    return record


def _count(connection: Connection, statement: Update) -> int:
    return connection.execute(statement).rowcount
