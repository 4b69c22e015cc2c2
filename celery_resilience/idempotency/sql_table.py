"""The table of keys, and the statements that a run waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    Index,
    Insert,
    Integer,
    SmallInteger,
    String,
    and_,
    bindparam,
    case,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from celery_resilience.idempotency.record import KeyState
from celery_resilience.stores.sql import LongBinary, table
from celery_resilience.stores.sql_dialects import SqlDialect

ROOM = "idempotency"
VERSION = 1

keys = table(
    "resilience_keys",
    Column("namespace", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("state", String(12), nullable=False),
    # Of the last run; "" where there was none.
    Column("token", String(32), nullable=False),
    Column("owner", String(255), nullable=False),
    Column("holder", String(255), nullable=False),
    Column("fingerprint", String(32), nullable=False),
    Column("epoch", Integer, nullable=False),
    # The state that the last run found.
    Column("found", String(12)),
    # Whether the last statement that asked for the row was given it. MySQL assigns
    # from left to right: what it assigns first is what all others go by.
    Column("is_given", SmallInteger, nullable=False),
    Column("begun_at", Float(53), nullable=False),
    Column("lease_until", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("name", String(255), nullable=False),
    Column("task", String(255), nullable=False),
    # Last, so that SQLite reads the others without the pages it overflows to.
    Column("result", LongBinary),
    Index("resilience_keys_expiry", "namespace", "expires_at"),
    # A duplicate rewrites its row: let it stay on its page.
    postgresql_with={"fillfactor": 80},
)

TABLES = [keys]


class Row(NamedTuple):
    """
    A row as a statement left it.

    Attributes:
        remaining_s: For how long it is its owner's.
    """

    state: str
    token: str
    owner: str
    fingerprint: str
    epoch: int
    found: str | None
    result: bytes | None
    remaining_s: float

    @classmethod
    def unknown(cls) -> Row:
        """One that is not there any more: it was another's a moment ago."""
        return cls(KeyState.RUNNING, "", "", "", 0, None, None, 0.0)


class Statements:
    """
    What is said again and again, in one kind of database.

    Words: those of a claim, `namespace`, and, to finish, `new_state`, `result` and
    `until_s`; SQLite's `now` is one too.

    Attributes:
        begin: Take a key for one run.
        finish_own: Say what a run came to, if no other has begun since.
        finish: The same, also where the key is not there any more.
        reserve: Take a key for a message.
        read: The row as it is.
    """

    def __init__(self, dialect: SqlDialect) -> None:
        self._dialect = dialect
        self._now = dialect.statement_now()
        self._returned: dict[Insert, Insert] = {}
        self.begin = self._begin()
        self.finish = self._finish()
        self.finish_own = (
            update(keys)
            .where(_is_it, keys.c.token == _word("token"))
            .values(
                state=_word("new_state"),
                owner=_word("owner"),  # a sender may have reserved it meanwhile
                lease_until=self._after("until_s"),
                expires_at=self._after("until_s", "keep_s"),
                result=bindparam("result", type_=LongBinary),
            )
        )
        self.reserve = self._reserve()
        self.read = select(*self._answer).where(_is_it)

    def returning(self, statement: Insert) -> Insert:
        """The statement that returns the row as it is then."""
        found = self._returned.get(statement)
        if found is None:
            found = statement.returning(*self._answer)
            self._returned[statement] = found
        return found

    @property
    def _answer(self) -> list[ColumnElement[Any]]:
        columns = [keys.c[name] for name in Row._fields[:-1]]
        return [*columns, keys.c.lease_until - self._now]

    def _begin(self) -> Insert:
        lapsed = keys.c.lease_until <= self._now
        is_mine = keys.c.owner == _word("owner")
        is_dead = and_(
            is_mine,
            _word("dead_holder") != _NOTHING,
            keys.c.holder == _word("dead_holder"),
        )
        is_forced = bindparam("is_forced", type_=Boolean)
        is_free = or_(
            self._is_expired,
            _is(KeyState.QUEUED),
            and_(_is(KeyState.RETRYING), is_mine),
            and_(
                or_(is_forced, _is_same),
                or_(
                    _is(KeyState.FAILED),
                    _is(KeyState.INTERRUPTED),
                    and_(_is(KeyState.RETRYING), lapsed),
                    and_(_is(KeyState.RUNNING), or_(lapsed, is_dead)),
                    and_(_is(KeyState.DONE), is_forced),
                ),
            ),
        )
        row = self._row(
            state=_constant(KeyState.RUNNING.value),
            token=_word("token"),
            epoch=_ONE,
            lease_until=self._after("lease_s"),
            expires_at=self._after("lease_s", "keep_s"),
        )
        changes = {
            # First, for MySQL: of the old values.
            keys.c.found: case((self._is_expired, null()), else_=keys.c.state),
            **_without_identity(row),
            keys.c.epoch: keys.c.epoch + _ONE,
        }
        return self._dialect.upsert(row, is_free, changes, keys.c.is_given)

    def _finish(self) -> Insert:
        has_run = and_(~self._is_expired, keys.c.token != _NOTHING)
        row = self._row(
            state=_word("new_state"),
            token=_word("token"),
            epoch=_ONE,
            lease_until=self._after("until_s"),
            expires_at=self._after("until_s", "keep_s"),
            result=bindparam("result", type_=LongBinary),
        )
        changes = {
            # First, for MySQL: of the old values.
            keys.c.begun_at: case((has_run, keys.c.begun_at), else_=self._now),
            keys.c.epoch: case((keys.c.epoch < _ONE, _ONE), else_=keys.c.epoch),
        }
        changes |= {c: v for c, v in _without_identity(row).items() if c not in changes}
        is_free = or_(~has_run, keys.c.token == _word("token"))
        return self._dialect.upsert(row, is_free, changes, keys.c.is_given)

    def _reserve(self) -> Insert:
        lapsed = keys.c.lease_until <= self._now
        is_mine = keys.c.owner == _word("owner")
        is_free = or_(
            self._is_expired,
            and_(_is(KeyState.QUEUED), or_(lapsed, is_mine)),
            and_(_is(KeyState.RETRYING), lapsed, _is_same),
            and_(_is(KeyState.FAILED), _is_same),
        )
        lease_until = self._after("lease_s")
        row = self._row(
            state=_constant(KeyState.QUEUED.value),
            token=_NOTHING,
            epoch=_constant(0),
            lease_until=lease_until,
            expires_at=lease_until,
        )
        changes = {
            # First, for MySQL: of the old values. The token stays that of the last
            # run: nobody has begun since.
            keys.c.token: case((self._is_expired, _NOTHING), else_=keys.c.token),
            keys.c.expires_at: case(
                (keys.c.expires_at > lease_until, keys.c.expires_at),
                else_=lease_until,
            ),
            keys.c.epoch: keys.c.epoch,
        }
        changes |= {c: v for c, v in _without_identity(row).items() if c not in changes}
        return self._dialect.upsert(row, is_free, changes, keys.c.is_given)

    def _row(self, **values: Any) -> dict[Column[Any], Any]:
        """A new row: of the claim's words, and *values*."""
        words = ("namespace", "key", "name", "task", "owner", "holder", "fingerprint")
        by_name = {
            **{name: _word(name) for name in words},
            "begun_at": self._now,
            "result": null(),
            **values,
        }
        return {keys.c[name]: value for name, value in by_name.items()}

    def _after(self, *seconds: str) -> ColumnElement[float]:
        """When so many seconds will have passed."""
        time = self._now
        for word in seconds:
            time = time + bindparam(word, type_=Float(53))
        return time

    @property
    def _is_expired(self) -> ColumnElement[bool]:
        return keys.c.expires_at <= self._now


def _word(name: str) -> ColumnElement[str]:
    return bindparam(name, type_=String)


def _constant(value: str | int) -> ColumnElement[Any]:
    """Of ours, and written out: a word would be sent each time."""
    return literal_column(repr(value), Integer if isinstance(value, int) else String)


def _is(state: KeyState) -> ColumnElement[bool]:
    return keys.c.state == _constant(state.value)


def _without_identity(row: Mapping[Column[Any], Any]) -> dict[Column[Any], Any]:
    return {column: value for column, value in row.items() if not column.primary_key}


_NOTHING = _constant("")
_ONE = _constant(1)
_is_it = and_(keys.c.namespace == _word("namespace"), keys.c.key == _word("key"))
_is_same = or_(
    keys.c.fingerprint == _NOTHING,
    _word("fingerprint") == _NOTHING,
    keys.c.fingerprint == _word("fingerprint"),
)
