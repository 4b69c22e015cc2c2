"""Failed tasks in SQLite or PostgreSQL."""

from __future__ import annotations

import builtins
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement, Select

from celery_resilience.failed.envelope import dumps, loads, unpack
from celery_resilience.failed.filters import Filter, matches_arguments, matches_globs
from celery_resilience.failed.merge import Record, merged
from celery_resilience.failed.record import FailedTask, Phase, State, Summary
from celery_resilience.failed.store import Claim
from celery_resilience.redaction import cut
from celery_resilience.stores.sql import SqlDatabase, metadata

VERSION = 1

#: Characters of a message that a list and its filter see; the document has all.
LISTED_MESSAGE_CHARS = 500

#: Rows in one statement or page.
PAGE = 500

#: Names in a count by task, reason or exception.
TOP = 20

#: The reason of a success that was collected before the failure it makes void.
_GHOST = ""

_UNRESOLVED: dict[str, Any] = {
    "state": "unresolved",
    "phase": None,
    "token": None,
    "copy": None,
}

#: Seconds that the success of a redelivery waits for the failure it makes void.
GHOST_S = 3_600.0

failed = Table(
    "resilience_failed",
    metadata,
    Column("namespace", String(64), primary_key=True),
    Column("id", String(32), primary_key=True),
    Column("state", String(12), nullable=False),
    Column("phase", String(8)),
    Column("token", String(32)),
    Column("copy", String(32)),
    Column("claimed_at", Float(53)),
    Column("number", Integer, nullable=False, default=0),
    Column("replays", Integer, nullable=False, default=0),
    Column("replayed_as", String(255)),
    Column("settled_at", Float(53)),
    Column("note", Text),
    Column("reason", String(32), nullable=False),
    Column("task", String(255), nullable=False),
    Column("task_id", String(255), nullable=False),
    Column("queue", String(255), nullable=False),
    Column("failed_queue", String(255), nullable=False),
    Column("exception", String(255), nullable=False),
    Column("message", Text, nullable=False),
    Column("fingerprint", String(16), nullable=False),
    Column("worker", String(255), nullable=False),
    Column("release", String(64)),
    Column("first_failed_at", Float(53), nullable=False),
    Column("last_failed_at", Float(53), nullable=False),
    Column("in_chord", Boolean, nullable=False, default=False),
    Column("arguments", Text, nullable=False),
    Column("attempts", Text, nullable=False),
    # Last, so that SQLite reads the others without the pages it overflows to.
    Column("document", LargeBinary),
    Index("resilience_failed_state", "namespace", "state", "last_failed_at"),
    Index("resilience_failed_time", "namespace", "last_failed_at"),
    Index("resilience_failed_group", "namespace", "fingerprint", "last_failed_at"),
    Index("resilience_failed_task_id", "namespace", "task_id"),
)
Index(
    "resilience_failed_ghosts",
    failed.c.namespace,
    failed.c.last_failed_at,
    sqlite_where=failed.c.reason == _GHOST,
    postgresql_where=failed.c.reason == _GHOST,
)

TABLES = [failed]

_SUMMARY = (
    failed.c.id,
    failed.c.state,
    failed.c.reason,
    failed.c.task,
    failed.c.task_id,
    failed.c.queue,
    failed.c.failed_queue,
    failed.c.exception,
    failed.c.message,
    failed.c.fingerprint,
    failed.c.worker,
    failed.c.release,
    failed.c.first_failed_at,
    failed.c.last_failed_at,
    failed.c.replays,
    failed.c.phase,
    failed.c.note,
)


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
        for start in range(0, len(documents), PAGE):
            with self._database.writing() as connection:
                self._keep_page(connection, documents[start : start + PAGE])
                self._forget_ghosts(connection)

    def _keep_page(
        self, connection: Connection, documents: Sequence[Mapping[str, Any]]
    ) -> None:
        by_id: dict[str, list[Mapping[str, Any]]] = {}
        for document in documents:
            by_id.setdefault(document["id"], []).append(document)
        while by_id:
            found = self._lock_rows(connection, list(by_id))
            new: list[Record] = []
            changed: list[Record] = []
            for id, its_documents in by_id.items():
                before = after = found.get(id)
                for document in its_documents:
                    after = merged(after, document)
                if after is not None and after != before:
                    (new if before is None else changed).append(after)
            self._update(connection, changed)
            inserted = self._insert(connection, new)
            # What another collector inserted a moment ago is merged with in the
            # next round.
            by_id = {r.id: by_id[r.id] for r in new if r.id not in inserted}

    def _lock_rows(
        self, connection: Connection, ids: Sequence[str]
    ) -> dict[str, Record]:
        query = (
            select(
                failed.c.id,
                failed.c.state,
                failed.c.document,
                failed.c.attempts,
                failed.c.number,
                failed.c.token,
                failed.c.phase,
                failed.c.settled_at,
                failed.c.note,
            )
            .where(self._mine(), failed.c.id.in_(ids))
            .order_by(failed.c.id)
            .with_for_update()
        )
        return {
            row.id: Record(
                id=row.id,
                state=State(row.state),
                document=None if row.document is None else _unpacked(row.document),
                attempts=tuple(json.loads(row.attempts)),
                number=row.number,
                token=row.token,
                phase=None if row.phase is None else Phase(row.phase),
                settled_at=row.settled_at,
                note=row.note,
            )
            for row in connection.execute(query)
        }

    def _update(self, connection: Connection, records: Sequence[Record]) -> None:
        if records:
            rows = [self._row(record) for record in records]
            connection.execute(
                update(failed).where(self._mine(), failed.c.id == bindparam("row_id")),
                [{"row_id": row.pop("id"), **row} for row in rows],
            )

    def _insert(self, connection: Connection, records: Sequence[Record]) -> set[str]:
        if not records:
            return set()
        rows = [{"namespace": self._namespace, **self._row(r)} for r in records]
        statement = (
            self._database.insert(failed)
            .on_conflict_do_nothing()
            .returning(failed.c.id)
        )
        return set(connection.execute(statement, rows).scalars())

    def _row(self, record: Record) -> dict[str, Any]:
        document = record.document or {}
        failed_at = document.get("failed_at", record.settled_at)
        first = record.attempts[0]["_failed_at"] if record.attempts else failed_at
        attempt = document.get("attempt", {})
        return {
            "id": record.id,
            "state": record.state,
            "phase": record.phase,
            "token": record.token,
            "number": record.number,
            "settled_at": record.settled_at,
            "note": record.note,
            "reason": document.get("reason", _GHOST),
            "task": document.get("task", "")[:255],
            "task_id": document.get("task_id", "")[:255],
            "queue": document.get("queue", "")[:255],
            "failed_queue": document.get("failed_queue", "")[:255],
            "exception": document.get("exception", "")[:255],
            "message": cut(document.get("message", ""), LISTED_MESSAGE_CHARS),
            "fingerprint": document.get("fingerprint", ""),
            "worker": attempt.get("worker", "")[:255],
            "release": document.get("release"),
            "first_failed_at": first,
            "last_failed_at": failed_at,
            "in_chord": bool(document.get("in_chord")),
            "arguments": json.dumps(document.get("arguments", {})),
            "attempts": json.dumps(record.attempts),
            "document": _packed(document) if document else None,
        }

    def _forget_ghosts(self, connection: Connection) -> None:
        connection.execute(
            delete(failed).where(
                self._mine(),
                failed.c.reason == _GHOST,
                failed.c.last_failed_at < self._database.now() - GHOST_S,
            )
        )

    # --- looking ----------------------------------------------------------------------

    def list(self, wanted: Filter, *, limit: int | None = None) -> Iterator[Summary]:
        """The failed tasks that match, last failed first, in flat memory."""
        self._ready()
        query = (
            select(*_SUMMARY, failed.c.arguments)
            .where(*self._conditions(wanted))
            .order_by(failed.c.last_failed_at.desc(), failed.c.id)
            .execution_options(yield_per=PAGE)
        )
        if limit is not None and not _needs_python(wanted):
            query = query.limit(limit)
        left = limit
        with self._database.reading() as connection:
            for row in connection.execute(query):
                summary = _summary(row)
                if left == 0:
                    return
                if _is_match(wanted, summary, row.arguments):
                    left = None if left is None else left - 1
                    yield summary

    def count(self, wanted: Filter) -> int:
        """How many match."""
        if _needs_python(wanted):
            return sum(1 for _ in self.list(wanted))
        self._ready()
        query = select(func.count()).select_from(failed)
        with self._database.reading() as connection:
            return int(
                connection.execute(query.where(*self._conditions(wanted))).scalar_one()
            )

    def get(self, id: str) -> FailedTask | None:
        """One failed task with its message."""
        self._ready()
        query = select(
            *_SUMMARY, failed.c.document, failed.c.attempts, failed.c.replayed_as
        ).where(self._mine(), failed.c.id == id, failed.c.reason != _GHOST)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        return FailedTask(
            summary=_summary(row),
            document=_unpacked(row.document),
            attempts=[
                {k: v for k, v in attempt.items() if not k.startswith("_")}
                for attempt in json.loads(row.attempts)
            ],
            replayed_as=row.replayed_as,
        )

    def resolve(self, start: str, *, limit: int = 2) -> Sequence[str]:
        """The ids that begin with *start*, or whose task id is *start*."""
        self._ready()
        is_meant = failed.c.task_id == start
        if start and set(start.lower()) <= set("0123456789abcdef"):
            low = start.lower()
            is_meant = or_(is_meant, failed.c.id.between(low, low + "g"))
        query = (
            select(failed.c.id)
            .where(self._mine(), failed.c.reason != _GHOST, is_meant)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def stats(self) -> Mapping[str, Any]:
        """Counts by state, and of the unresolved by reason, task and age."""
        self._ready()
        here = and_(self._mine(), failed.c.reason != _GHOST)
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

    # --- replaying ----------------------------------------------------------------------

    def claim(self, ids: Sequence[str]) -> Sequence[Claim]:
        """Take those of *ids* that are unresolved for a replay."""
        self._ready()
        if not ids:
            return []
        tokens = {id: uuid4().hex for id in ids}
        with self._database.writing() as connection:
            connection.execute(
                update(failed)
                .where(
                    self._mine(),
                    failed.c.id == bindparam("row_id"),
                    failed.c.state == State.UNRESOLVED,
                    failed.c.reason != _GHOST,
                )
                .values(
                    state=State.REPLAYING,
                    phase=Phase.CLAIMED,
                    token=bindparam("new_token"),
                    copy=None,
                    claimed_at=self._database.now(),
                    number=failed.c.number + 1,
                    note=None,
                ),
                [{"row_id": id, "new_token": token} for id, token in tokens.items()],
            )
            query = _claims().where(self._mine(), failed.c.token.in_(tokens.values()))
            found = {row.id: _claim(row) for row in connection.execute(query)}
        return [found[id] for id in ids if id in found]

    def mark_sent(self, claims: Sequence[tuple[Claim, str | None]]) -> None:
        """The broker has the messages of these claims."""
        if not claims:
            return
        with self._database.writing() as connection:
            connection.execute(
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
                ),
                [
                    {"row_id": claim.id, "row_number": claim.number, "new_id": new_id}
                    for claim, new_id in claims
                ],
            )

    def release(self, claim: Claim, note: str) -> None:
        """Nothing was sent for *claim*: its record is unresolved again."""
        with self._database.writing() as connection:
            connection.execute(
                update(failed)
                .where(
                    self._mine(),
                    failed.c.id == claim.id,
                    failed.c.token == claim.token,
                    failed.c.phase == Phase.CLAIMED,
                )
                .values(**_UNRESOLVED, note=note)
            )

    def finish(self, ids: Sequence[str], note: str) -> None:
        """Resolve replays that no worker will report."""
        self._set_state(
            ids, [State.REPLAYING], state=State.RESOLVED, phase=None, note=note
        )

    def take_stale_claims(self, *, older_than_s: float, limit: int) -> Sequence[Claim]:
        """Claims whose owner died before it sent them, with their old token."""
        self._ready()
        with self._database.writing() as connection:
            query = (
                _claims()
                .where(
                    self._mine(),
                    failed.c.state == State.REPLAYING,
                    failed.c.phase == Phase.CLAIMED,
                    failed.c.claimed_at < self._database.now() - older_than_s,
                )
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            claims = [_claim(row) for row in connection.execute(query)]
            if claims:
                connection.execute(
                    update(failed)
                    .where(self._mine(), failed.c.id.in_([c.id for c in claims]))
                    .values(claimed_at=self._database.now())
                )
        return claims

    def start(self, id: str, *, token: str, copy: str) -> bool:
        """Ask for leave to run a replayed message."""
        self._ready()
        with self._database.writing() as connection:
            started = connection.execute(
                update(failed)
                .where(
                    self._mine(),
                    failed.c.id == id,
                    failed.c.state == State.REPLAYING,
                    failed.c.token == token,
                    or_(failed.c.phase != Phase.RUNNING, failed.c.copy == copy),
                )
                .values(phase=Phase.RUNNING, copy=copy)
            ).rowcount
            if started:
                return True
            query = select(failed.c.id).where(self._mine(), failed.c.id == id)
            return connection.execute(query).first() is None

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
        for start in range(0, len(ids), PAGE):
            with self._database.writing() as connection:
                changed += connection.execute(
                    update(failed)
                    .where(
                        self._mine(),
                        failed.c.id.in_(ids[start : start + PAGE]),
                        failed.c.state.in_(states),
                        failed.c.reason != _GHOST,
                    )
                    .values(**values)
                ).rowcount
        return changed

    # --- conditions -------------------------------------------------------------------------

    def _ready(self) -> None:
        self._database.ready("failed", VERSION, TABLES)

    def _mine(self) -> ColumnElement[bool]:
        return failed.c.namespace == self._namespace

    def _conditions(self, wanted: Filter) -> builtins.list[ColumnElement[bool]]:
        conditions = [self._mine(), failed.c.reason != _GHOST]
        equal = {
            failed.c.state: wanted.state,
            failed.c.queue: wanted.queue,
            failed.c.failed_queue: wanted.failed_queue,
            failed.c.reason: wanted.reason,
            failed.c.release: wanted.release,
        }
        conditions += [
            column == value for column, value in equal.items() if value is not None
        ]
        if wanted.ids is not None:
            conditions.append(failed.c.id.in_(wanted.ids))
        if wanted.since is not None:
            conditions.append(failed.c.last_failed_at >= wanted.since)
        if wanted.until is not None:
            conditions.append(failed.c.last_failed_at <= wanted.until)
        if wanted.group is not None:
            low = wanted.group.lower()
            conditions.append(failed.c.fingerprint.between(low, low + "g"))
        if wanted.message is not None:
            conditions.append(
                failed.c.message.icontains(wanted.message, autoescape=True)
            )
        for column, glob in (
            (failed.c.task, wanted.task),
            (failed.c.worker, wanted.worker),
        ):
            if glob is not None:
                conditions.append(column.like(_like(glob), escape="\\"))
        if wanted.exception is not None:
            like = _like(wanted.exception)
            conditions.append(
                or_(
                    failed.c.exception.like(like, escape="\\"),
                    failed.c.exception.like("%." + like, escape="\\"),
                )
            )
        return conditions


def _needs_python(wanted: Filter) -> bool:
    """SQL only narrows these down: LIKE knows no case and no [classes]."""
    return bool(wanted.task or wanted.worker or wanted.exception or wanted.args)


def _is_match(wanted: Filter, found: Summary, arguments: str) -> bool:
    return matches_globs(wanted, found) and (
        not wanted.args or matches_arguments(wanted.args, json.loads(arguments))
    )


def _like(glob: str) -> str:
    """A pattern that matches at least what *glob* does."""
    if "[" in glob:
        return "%"
    escaped = re.sub(r"([\\%_])", r"\\\1", glob)
    return escaped.replace("*", "%").replace("?", "_")


def _claims() -> Select[Any]:
    return select(
        failed.c.id,
        failed.c.token,
        failed.c.number,
        failed.c.task,
        failed.c.task_id,
        failed.c.reason,
        failed.c.in_chord,
        failed.c.document,
    )


def _claim(row: Any) -> Claim:
    return Claim(
        id=row.id,
        token=row.token,
        number=row.number,
        task=row.task,
        task_id=row.task_id,
        reason=row.reason,
        in_chord=bool(row.in_chord),
        original=unpack(_unpacked(row.document)["original"]),
    )


def _summary(row: Any) -> Summary:
    values = {column.name: getattr(row, column.name) for column in _SUMMARY}
    values["state"] = State(values["state"])
    values["phase"] = None if values["phase"] is None else Phase(values["phase"])
    return Summary(**values)


def _packed(document: Mapping[str, Any]) -> bytes:
    return zlib.compress(dumps(document), 1)


def _unpacked(data: bytes) -> dict[str, Any]:
    return loads(zlib.decompress(data))
