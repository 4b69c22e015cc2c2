"""`once`: the key commits with the rows of its transaction, or was never claimed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from polling import always, eventually
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import NullPool

from celery_resilience import ConfigurationError, once, purge_once
from celery_resilience.errors import SchemaMismatch
from celery_resilience.idempotency.once import sql as once_sql
from celery_resilience.idempotency.once import sql_table as once_table

PROCESS = Path(__file__).parents[2] / "apps" / "once_process.py"

NAMESPACE = "race"

effects = Table(
    "effects",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("name", String(100)),
)

_numbers = itertools.count()


def new_key() -> str:
    """A key that no other test has."""
    return f"charge:{next(_numbers)}"


@pytest.fixture(scope="module")
def url(make_url_of_kind: Callable[[], str]) -> str:
    """One database of each kind, with the table of `once` and one of effects."""
    url = make_url_of_kind()
    engine = create_engine(url)
    once_table.create(engine)
    effects.create(engine)
    engine.dispose()
    return url


def engine_for(url: str, **options: Any) -> Engine:
    """An engine whose connections end with their blocks."""
    if url.startswith("sqlite"):
        options.setdefault("connect_args", {"timeout": 60})
    return create_engine(url, poolclass=NullPool, **options)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """As a user makes one."""
    engine = engine_for(url)
    yield engine
    engine.dispose()


def effects_in(engine: Engine, name: str) -> int:
    """How often an effect has been committed."""
    query = select(effects.c.id).where(effects.c.name == name)
    with engine.connect() as connection:
        return len(connection.execute(query).all())


def claim(session: Any, key: str, namespace: str = NAMESPACE) -> Any:
    """`once` in the tests' namespace."""
    return once(session, key, namespace=namespace)


# --- every kind of session ------------------------------------------------------------


class Door:
    """One kind of session: runs work in a transaction, which is committed or not."""

    def __init__(self, url: str) -> None:
        self._engine = engine_for(url)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """A session in whose transaction `once` is called."""
        raise NotImplementedError

    def run(self, *keys: str, save: Any = None, is_kept: bool = True) -> list[Any]:
        """Claim keys in one transaction; what each came to, and its result."""
        with self.opened() as session:
            answers = []
            for key in keys:
                answer = claim(session, key)
                if answer and save is not None:
                    answer.save(save)
                answers.append((bool(answer), answer.result))
            (session.commit if is_kept else session.rollback)()
        return answers

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


class SessionDoor(Door):
    """A Session."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        with Session(self._engine) as session:
            yield session


class ConnectionDoor(Door):
    """A Connection, which begins by itself."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        with self._engine.connect() as connection:
            yield connection


class ScopedDoor(Door):
    """A scoped_session, as Flask has one."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        scoped = scoped_session(sessionmaker(self._engine))
        yield scoped
        scoped.remove()


class AsyncDoor(Door):
    """An AsyncSession."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        url = url.replace("sqlite:", "sqlite+aiosqlite:")
        self.async_engine = create_async_engine(url, poolclass=NullPool)

    def session(self) -> Any:
        """What is opened for one transaction."""
        return AsyncSession(self.async_engine)

    def run(self, *keys: str, save: Any = None, is_kept: bool = True) -> list[Any]:
        async def work() -> list[Any]:
            async with self.session() as session:
                answers = []
                for key in keys:
                    answer = await claim(session, key)
                    if answer and save is not None:
                        await answer.save(save)
                    answers.append((bool(answer), answer.result))
                await (session.commit if is_kept else session.rollback)()
            return answers

        return asyncio.run(work())


class AsyncConnectionDoor(AsyncDoor):
    """An AsyncConnection."""

    def session(self) -> Any:
        return self.async_engine.connect()


class AsyncScopedDoor(AsyncDoor):
    """An async_scoped_session."""

    def session(self) -> Any:
        return async_scoped_session(
            async_sessionmaker(self.async_engine), asyncio.current_task
        )

    def run(self, *keys: str, save: Any = None, is_kept: bool = True) -> list[Any]:
        async def work() -> list[Any]:
            session = self.session()
            try:
                answers = []
                for key in keys:
                    answer = await claim(session, key)
                    if answer and save is not None:
                        await answer.save(save)
                    answers.append((bool(answer), answer.result))
                await (session.commit if is_kept else session.rollback)()
            finally:
                await session.remove()
            return answers

        return asyncio.run(work())


SYNC = (SessionDoor, ConnectionDoor, ScopedDoor)
ASYNC = (AsyncDoor, AsyncConnectionDoor, AsyncScopedDoor)


@pytest.fixture(
    params=[
        *(
            (kind, door)
            for kind in ("sqlite", "postgresql", "mariadb")
            for door in SYNC
        ),
        *((kind, door) for kind in ("sqlite", "postgresql") for door in ASYNC),
    ],
    ids=lambda param: f"{param[0]}-{param[1].__name__}",
)
def door(request: Any, urls: Callable[[str], str]) -> Iterator[Door]:
    """Each kind of session on each kind of database that has a driver for it."""
    kind, of = request.param
    door = of(urls(kind))
    yield door
    door.close()


@pytest.fixture(scope="module")
def urls(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """A database by its kind, with the table of `once`."""
    made: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in made:
            if kind == "sqlite":
                made[kind] = f"sqlite:///{tmp_path_factory.mktemp('door')}/shop.sqlite3"
            else:
                made[kind] = request.getfixturevalue(f"{kind}_url")()
            engine = create_engine(made[kind])
            once_table.create(engine)
            engine.dispose()
        return made[kind]

    return get


def test_the_first_is_true_and_the_next_gets_its_result(door: Door) -> None:
    """Of every kind of session."""
    key = new_key()

    assert door.run(key, save={"charge": 17}) == [(True, {"charge": 17})]
    assert door.run(key, save="mine") == [(False, {"charge": 17})]


def test_a_rollback_forgets_the_key_with_the_rows(door: Door) -> None:
    """As if nobody had asked."""
    key = new_key()

    assert door.run(key, is_kept=False) == [(True, None)]
    assert door.run(key) == [(True, None)]
    assert door.run(key) == [(False, None)]


def test_asked_again_in_its_own_transaction_a_key_is_a_duplicate(door: Door) -> None:
    """With what is saved so far; and the transaction goes on."""
    key, other = new_key(), new_key()

    answers = door.run(key, key, other, save=[1])

    assert answers == [(True, [1]), (False, [1]), (True, [1])]
    assert door.run(key, other) == [(False, [1]), (False, [1])]


@pytest.mark.parametrize(
    "result",
    [
        *(None, 0, "", {}, [], False, 1.5, 2**70, "nul \0 surrogate \ud800 ﬁn 🦆"),
        {"a": [1, {"b": None}]},
        "x" * 300_000,
    ],
    ids=lambda result: repr(result)[:20],
)
def test_a_result_comes_back_as_itself(engine: Engine, result: Any) -> None:
    """Falsy ones too, and larger ones than a TEXT of MySQL's holds."""
    key = new_key()
    with engine.begin() as connection:
        claim(connection, key).save(result)
    with engine.begin() as connection:
        found = claim(connection, key).result

    assert found == result
    assert type(found) is type(result)


def test_first_and_duplicates_see_the_same_result(engine: Engine) -> None:
    """With JSON's types, and the last that was saved."""
    key = new_key()
    with engine.begin() as connection:
        first = claim(connection, key)
        first.save("to be replaced")
        first.save((1, 2))
    with engine.begin() as connection:
        duplicate = claim(connection, key)

    assert first.result == duplicate.result == [1, 2]
    assert first.is_first
    assert not duplicate.is_first
    assert repr(duplicate) == f"<Once {key!r}: duplicate>"


# --- keys -----------------------------------------------------------------------------


def test_namespaces_never_meet(engine: Engine) -> None:
    """Two apps may use one database."""
    key = new_key()
    with engine.begin() as connection:
        assert claim(connection, key, "shop")
        assert claim(connection, key, "bank")
        assert not claim(connection, key, "shop")


def test_long_and_odd_keys_are_told_apart_and_can_be_read(engine: Engine) -> None:
    """By all of their characters; a name of 255 is kept."""
    long = f"{new_key()}:{'x' * 1_000}"
    keys = [long, f"{long}y", "nul \0", "nul \\0", "\ud800", "🦆" * 400, " ", "A", "a"]
    keys += ["a ", "ﬁ", "fi", "é", "e\u0301"]
    with engine.begin() as connection:
        answers = [bool(claim(connection, key, "odd")) for key in keys]
        query = text("SELECT name FROM resilience_once WHERE namespace = 'odd'")
        names = set(connection.execute(query).scalars())

    assert all(answers)
    assert names >= {long[:255], "nul \\0", "\\ud800", "🦆" * 255, "é"}


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_no_two_keys_are_stored_alike(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    """Whatever a namespace and a key contain, and however they are cut."""
    stored = once_sql.stored_key(*one)

    assert (stored == once_sql.stored_key(*other)) == (one == other)
    assert once_sql.stored_key(f"{one[0]}x", one[1]) != once_sql.stored_key(
        one[0], f"x{one[1]}"
    )
    assert len(stored) == 64


@given(st.text())
@example("\0" * 255)
@example("\ud800" * 255)
def test_a_readable_name_fits(key: str) -> None:
    """Into a column that knows no NUL and no lone surrogate."""
    name = once_sql.readable(key)

    assert len(name) <= once_sql.NAME_CHARS
    assert "\0" not in name
    name.encode()


@pytest.mark.parametrize("key", ["", None, 17, b"charge:17", ["charge"]])
def test_a_key_is_a_text(engine: Engine, key: Any) -> None:
    """Not what somebody forgot to format."""
    with (
        engine.begin() as connection,
        pytest.raises(ConfigurationError, match="a text that is not empty"),
    ):
        once(connection, key, namespace=NAMESPACE)


@pytest.mark.parametrize("namespace", ["", "a b", "x" * 65, 7, "nul\0"])
def test_a_namespace_is_as_the_setting_has_it(engine: Engine, namespace: Any) -> None:
    """So that a table's column holds it."""
    with (
        engine.begin() as connection,
        pytest.raises(ConfigurationError, match="a namespace is 1 to 64"),
    ):
        once(connection, new_key(), namespace=namespace)


# --- what is refused ------------------------------------------------------------------


class NoSession:
    """Anything."""


def test_what_has_no_transaction_is_refused(engine: Engine) -> None:
    """And told what would be accepted."""
    for wrong in (None, 17, NoSession(), engine, sessionmaker(engine), NoSession):
        with pytest.raises(ConfigurationError, match="AsyncSession") as refused:
            claim(wrong, new_key())
        assert "Connection" in str(refused.value)


def test_an_async_engine_is_refused() -> None:
    """Where it is awaited."""

    async def ask() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        with pytest.raises(ConfigurationError, match="AsyncEngine has none"):
            await claim(engine, new_key())
        await engine.dispose()

    asyncio.run(ask())


def test_another_kind_of_database_is_refused() -> None:
    """Before anything is sent there."""

    class Oracle:
        vendor = "oracle"

    with pytest.raises(ConfigurationError, match="of oracle"):
        once_sql.Claim(Oracle(), "shop", "key")  # type: ignore[arg-type]


def test_autocommit_is_refused(url: str) -> None:
    """Wherever it is set; nothing is written."""
    key = new_key()
    plain, auto = engine_for(url), engine_for(url, isolation_level="AUTOCOMMIT")
    opened: list[Callable[[], Any]] = [
        lambda: auto.connect(),
        lambda: plain.connect().execution_options(isolation_level="AUTOCOMMIT"),
        lambda: Session(auto),
        lambda: Session(plain.execution_options(isolation_level="AUTOCOMMIT")),
    ]
    for make in opened:
        with (
            make() as session,
            pytest.raises(ConfigurationError, match="AUTOCOMMIT"),
        ):
            claim(session, key)
    with plain.begin() as connection:
        assert claim(connection, key)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_async_autocommit_is_refused(urls: Callable[[str], str], kind: str) -> None:
    """As the other."""

    async def ask() -> None:
        url = urls(kind).replace("sqlite:", "sqlite+aiosqlite:")
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await claim(connection, new_key())
        await engine.dispose()

    asyncio.run(ask())


def test_a_missing_table_is_told_with_three_ways_to_make_it(
    make_url_of_kind: Callable[[], str],
) -> None:
    """To who claims, and to who purges."""
    engine = engine_for(make_url_of_kind())
    for ask in (
        lambda connection: claim(connection, "key"),
        lambda connection: purge_once(connection, older_than_s=1, namespace="shop"),
    ):
        with (
            engine.connect() as connection,
            pytest.raises(SchemaMismatch, match="no table resilience_once") as told,
        ):
            ask(connection)
        kind = engine.dialect.name.replace("mariadb", "mysql")
        for way in (
            *("create_once_table(engine)", "alembic.upgrade(op)", "migrate"),
            f"schema --sql --once {kind}`",
        ):
            assert way in str(told.value)


def test_an_error_that_is_no_duplicate_is_raised(
    make_url_of_kind: Callable[[], str],
) -> None:
    """Only a key that is there is a duplicate."""
    engine = engine_for(make_url_of_kind())
    made = once_table.ddl(engine.dialect.name.replace("mariadb", "mysql"))
    made = made.replace("PRIMARY KEY (", "CHECK (name <> 'no'), PRIMARY KEY (", 1)
    with engine.begin() as connection:
        for statement in made.split(";\n"):
            if statement.strip():
                connection.execute(text(statement))

    with engine.connect() as connection, pytest.raises(DBAPIError) as raised:
        claim(connection, "no")
    assert isinstance(raised.value, IntegrityError) or "no" in str(raised.value)
    with engine.begin() as connection:
        assert claim(connection, "yes")


@pytest.mark.parametrize(
    "result",
    [float("nan"), {1, 2}, b"bytes", object(), {(1, 2): 3}],
    ids=lambda result: type(result).__name__,
)
def test_a_result_that_json_does_not_have_is_refused(
    engine: Engine, result: Any
) -> None:
    """Where it is saved; and the transaction goes on."""
    key = new_key()
    with engine.begin() as connection:
        first = claim(connection, key)
        with pytest.raises(ConfigurationError, match="the types of JSON"):
            first.save(result)
    with engine.begin() as connection:
        assert not claim(connection, key)


def test_a_duplicate_saves_nothing(engine: Engine) -> None:
    """The first one's result stays."""
    key = new_key()
    with engine.begin() as connection:
        claim(connection, key).save(1)
    with engine.begin() as connection:
        duplicate = claim(connection, key)
        with pytest.raises(ConfigurationError, match="is a duplicate here"):
            duplicate.save(2)
        assert claim(connection, key).result == 1


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("of", [SessionDoor, ConnectionDoor])
def test_a_result_that_comes_too_late_is_refused(
    url: str, of: type[Door], end: str
) -> None:
    """Else it would be written in a transaction of which nobody knows."""
    door, key = of(url), new_key()
    with door.opened() as session:
        first = claim(session, key)
        getattr(session, end)()
        with pytest.raises(ConfigurationError, match="has ended"):
            first.save(1)
        again = claim(session, key)
        with pytest.raises(ConfigurationError, match="has ended"):
            first.save(1)
        assert bool(again) is (end == "rollback")
    door.close()


# --- the user's transaction -----------------------------------------------------------


class Base(DeclarativeBase):
    """Of the user's."""


class Effect(Base):
    """The user's row."""

    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def test_nothing_of_the_users_is_flushed_expired_or_committed(engine: Engine) -> None:
    """By the first and by a duplicate."""
    key, name = new_key(), new_key()
    commits: list[Connection] = []
    event.listen(engine, "commit", commits.append)
    with Session(engine) as session:
        session.add(Effect(name=name))
        session.commit()
        commits.clear()
        loaded = session.scalars(select(Effect).where(Effect.name == name)).one()
        loaded.name = f"{name} changed"
        session.add(pending := Effect(name="pending"))
        for expected in (True, False):
            assert bool(claim(session, key)) is expected
            assert pending in session.new
            assert loaded in session.dirty
            assert not inspect(loaded).expired_attributes
        assert not commits
        session.rollback()
    assert effects_in(engine, name) == 1
    with engine.begin() as connection:
        assert claim(connection, key)


def test_a_duplicate_does_not_break_the_transaction(engine: Engine) -> None:
    """What was written before and after it commits."""
    key, name = new_key(), new_key()
    with engine.begin() as connection:
        claim(connection, key)
    with Session(engine) as session, session.begin():
        session.add(Effect(name=name))
        session.flush()
        assert not claim(session, key)
        session.add(Effect(name=name))

    assert effects_in(engine, name) == 2


def savepoint_engine(url: str) -> Engine:
    """An engine that begins by itself in SQLite, as SQLAlchemy's page tells."""
    engine = engine_for(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def connected(driver: Any, _: Any) -> None:
            driver.isolation_level = None

        @event.listens_for(engine, "begin")
        def begun(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def test_a_savepoint_that_is_undone_forgets_the_key(url: str) -> None:
    """And only that; one that is released keeps it."""
    engine = savepoint_engine(url)
    undone, released = new_key(), new_key()
    with Session(engine) as session, session.begin():
        with session.begin_nested() as savepoint:
            lost = claim(session, undone)
            assert lost
            savepoint.rollback()
        with pytest.raises(ConfigurationError, match="has ended"):
            lost.save(1)
        with session.begin_nested():
            assert claim(session, released)
        assert not claim(session, released)
        with session.begin_nested():
            assert not claim(session, released)
        assert claim(session, undone)
    with engine.begin() as connection:
        assert not claim(connection, undone)
        assert not claim(connection, released)


def test_a_savepoint_that_would_commit_by_itself_is_refused(
    make_url_of_kind: Callable[[], str],
) -> None:
    """sqlite3 begins none before SAVEPOINT; one after `once` is harmless everywhere."""
    engine = engine_for(make_url_of_kind())
    once_table.create(engine)
    with engine.connect() as connection, contextlib.ExitStack() as stack:
        connection.begin()
        savepoint = connection.begin_nested()
        if engine.dialect.name == "sqlite":
            stack.enter_context(pytest.raises(ConfigurationError, match="savepoint"))
        claim(connection, "in it")
        savepoint.commit()
    with engine.connect() as connection:
        assert claim(connection, "before it")
        connection.begin_nested().commit()
    with engine.begin() as connection:
        assert claim(connection, "in it")
        assert claim(connection, "before it")


# --- waiting for another transaction --------------------------------------------------


class Waiter(threading.Thread):
    """Claims a key in a transaction of its own, which it commits."""

    def __init__(self, engine: Engine, key: str, **options: Any) -> None:
        super().__init__(daemon=True)
        self._engine = engine.execution_options(**options)
        self._key = key
        self.answer: Any = None
        self.error: BaseException | None = None
        self.connection_id = 0
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        """Claim, and write the effect if it is the first."""
        try:
            with self._engine.begin() as connection:
                self.connection_id = id_of(connection)
                self.has_begun.set()
                self.answer = claim(connection, self._key)
                if self.answer:
                    connection.execute(effects.insert().values(name=self._key))
        except DBAPIError as exc:
            self.error = exc

    def waits(self, engine: Engine) -> None:
        """Return when it stands still in the database."""
        assert self.has_begun.wait(30)
        if engine.dialect.name == "sqlite":  # which tells nobody
            always(self.is_alive, for_s=0.3, what="it waits")
            return
        query = {
            "postgresql": "SELECT count(*) FROM pg_stat_activity "
            "WHERE pid = :id AND wait_event_type = 'Lock'",
            "mariadb": "SELECT count(*) FROM information_schema.innodb_trx "
            "WHERE trx_mysql_thread_id = :id AND trx_state = 'LOCK WAIT'",
        }["postgresql" if engine.dialect.name == "postgresql" else "mariadb"]

        def look() -> bool:
            with engine.connect() as connection:
                found = connection.execute(text(query), {"id": self.connection_id})
                return bool(found.scalar())

        eventually(look, what="it waits", every_s=0.15)

    def ended(self) -> Any:
        """What it came to."""
        self.join(30)
        assert not self.is_alive()
        return self.error or self.answer


def id_of(connection: Connection) -> int:
    """The server's number of a connection."""
    query = {"postgresql": "SELECT pg_backend_pid()", "sqlite": "SELECT 0"}.get(
        connection.dialect.name, "SELECT connection_id()"
    )
    return int(connection.execute(text(query)).scalar_one())


def test_the_waiter_is_a_duplicate_when_the_first_commits(engine: Engine) -> None:
    """With the first one's result."""
    key = new_key()
    with engine.connect() as holder:
        claim(holder, key).save({"charge": 17})
        waiter = Waiter(engine, key)
        waiter.waits(engine)
        holder.commit()
        answer = waiter.ended()

    assert not answer
    assert answer.result == {"charge": 17}


def test_the_waiter_is_the_first_when_the_first_rolls_back(engine: Engine) -> None:
    """At once."""
    key = new_key()
    with engine.connect() as holder:
        claim(holder, key).save("never")
        holder.execute(effects.insert().values(name=key))
        waiter = Waiter(engine, key)
        waiter.waits(engine)
        holder.rollback()
        answer = waiter.ended()

    assert answer.is_first
    assert answer.result is None
    assert effects_in(engine, key) == 1


def test_the_waiter_takes_over_when_the_holders_backend_dies(
    urls: Callable[[str], str], server_kind: str
) -> None:
    """`pg_terminate_backend`, and KILL of MariaDB's."""
    engine = engine_for(urls(server_kind))
    effects.create(engine, checkfirst=True)
    key = new_key()
    kill = {"postgresql": "SELECT pg_terminate_backend(:id)", "mariadb": "KILL :id"}
    with engine.connect() as holder:
        number = id_of(holder)
        assert claim(holder, key)
        holder.execute(effects.insert().values(name=key))
        waiter = Waiter(engine, key)
        waiter.waits(engine)
        with engine.begin() as other:
            other.execute(text(kill[server_kind]), {"id": number})
        answer = waiter.ended()
        with pytest.raises(DBAPIError):
            holder.commit() or holder.execute(text("SELECT 1"))
        holder.invalidate()

    assert answer.is_first
    assert effects_in(engine, key) == 1


@pytest.fixture(params=["postgresql", "mariadb"])
def server_kind(request: Any) -> str:
    """A kind of database that is a server."""
    kind: str = request.param
    return kind


def start(*words: str) -> subprocess.Popen[str]:
    """Start a process of `once_process`."""
    return subprocess.Popen(
        [sys.executable, str(PROCESS), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def ending(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """End processes with the block."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)


def said(process: subprocess.Popen[str]) -> str:
    """The next line of a process."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_waiter_takes_over_when_the_holding_process_is_killed(
    url: str, engine: Engine
) -> None:
    """By SIGKILL; of its effect nothing is left."""
    key = new_key()
    holder = start("hold", url, key)
    with ending(holder):
        assert said(holder) == "held"
        waiter = Waiter(engine, key)
        waiter.waits(engine)
        holder.send_signal(signal.SIGKILL)
        answer = waiter.ended()

    assert answer.is_first
    assert effects_in(engine, key) == 1


def test_sixteen_processes_race_for_each_key(
    make_url_of_kind: Callable[[], str],
) -> None:
    """One winner each, and one effect."""
    rounds, url = 100, make_url_of_kind()
    engine = engine_for(url)
    once_table.create(engine)
    effects.create(engine)
    with start("race", url, str(rounds)) as racing:
        won = json.loads(said(racing))

    assert len(won) == 16
    assert sorted(itertools.chain(*won)) == [*range(rounds)]
    with engine.connect() as connection:
        names = list(connection.execute(select(effects.c.name)).scalars())
    assert sorted(map(int, names)) == [*range(rounds)]


# --- isolation levels -----------------------------------------------------------------


def test_mariadb_reads_a_result_that_is_newer_than_its_snapshot(
    urls: Callable[[str], str],
) -> None:
    """REPEATABLE READ is its default: a plain SELECT would find no result."""
    engine = engine_for(urls("mariadb"), isolation_level="REPEATABLE READ")
    key = new_key()
    with engine.connect() as late, engine.connect() as early:
        late.execute(text("SELECT count(*) FROM resilience_once"))  # its snapshot
        claim(early, key).save("new")
        early.commit()
        duplicate = claim(late, key)

    assert not duplicate
    assert duplicate.result == "new"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_postgresql_refuses_what_its_snapshot_cannot_see(
    urls: Callable[[str], str], level: str
) -> None:
    """With its own error, after which the transaction may be tried again."""
    engine = engine_for(urls("postgresql"), isolation_level=level)
    key = new_key()
    with engine.connect() as late, engine.connect() as early:
        late.execute(text("SELECT count(*) FROM resilience_once"))
        claim(early, key).save("new")
        early.commit()
        with pytest.raises(DBAPIError, match="could not serialize access"):
            claim(late, key)
        late.rollback()
        again = claim(late, key)

    assert not again
    assert again.result == "new"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_stricter_levels_know_the_first_and_the_duplicate(
    urls: Callable[[str], str], kind: str, level: str
) -> None:
    """Where nobody else is at it, there is nothing to refuse."""
    engine, key = engine_for(urls(kind), isolation_level=level), new_key()
    with engine.begin() as connection:
        assert claim(connection, key)
        assert not claim(connection, key)
    with engine.begin() as connection:
        assert not claim(connection, key)


def test_of_several_waiters_in_mariadb_one_is_the_first(
    urls: Callable[[str], str],
) -> None:
    """InnoDB ends the others with its deadlock error, and they may try again."""
    engine, key = engine_for(urls("mariadb")), new_key()
    effects.create(engine, checkfirst=True)
    with engine.connect() as holder:
        assert claim(holder, key)
        waiters = [Waiter(engine, key) for _ in range(4)]
        for waiter in waiters:
            waiter.waits(engine)
        holder.rollback()
        answers = [waiter.ended() for waiter in waiters]

    firsts = [answer for answer in answers if getattr(answer, "is_first", False)]
    for answer in answers:
        if isinstance(answer, DBAPIError):
            assert answer.orig is not None
            assert answer.orig.args[0] == 1213
    assert len(firsts) == 1
    assert effects_in(engine, key) == 1
    with engine.begin() as connection:
        assert not claim(connection, key)


# --- forgetting -----------------------------------------------------------------------


def age(engine: Engine, key: str, by_s: float) -> None:
    """Make a key older, by the database's clock."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE resilience_once SET created_at = created_at - :s WHERE name = :n"
            ),
            {"s": by_s, "n": key},
        )


def test_old_keys_are_forgotten_in_batches(engine: Engine) -> None:
    """The oldest first, in the caller's transaction, of one namespace."""
    keys = [new_key() for _ in range(5)]
    with engine.begin() as connection:
        for key in keys:
            claim(connection, key, "purged")
        claim(connection, keys[0], "other")
    for number, key in enumerate(keys[:4]):
        age(engine, key, by_s=1_000 + number)

    def purge(connection: Connection, limit: int) -> int:
        return purge_once(connection, older_than_s=900, limit=limit, namespace="purged")

    with engine.connect() as connection:
        assert purge(connection, 3) == 3
        connection.rollback()
        assert purge(connection, 3) == 3
        connection.commit()
        # Another namespace's key, the youngest of the old, and the young are left.
        assert not claim(connection, keys[0], "other")
        assert not claim(connection, keys[0], "purged")
        assert purge(connection, 3) == 1
        assert purge(connection, 3) == 0
        assert not claim(connection, keys[4], "purged")
        assert claim(connection, keys[3], "purged")


def test_the_age_is_of_the_databases_clock(engine: Engine) -> None:
    """In seconds of wall time, in whatever zone the server is."""
    key = new_key()
    with engine.begin() as connection:
        claim(connection, key, "young")
        assert purge_once(connection, older_than_s=5, namespace="young") == 0
    age(engine, key, by_s=6)
    with engine.begin() as connection:
        assert purge_once(connection, older_than_s=5, namespace="young") == 1


def test_an_async_session_purges(door: Door) -> None:
    """As every kind of session."""
    door.run(new_key())

    async def purge(door: AsyncDoor) -> int:
        async with AsyncSession(door.async_engine) as session:
            return await purge_once(session, older_than_s=3_600, namespace=NAMESPACE)

    if isinstance(door, AsyncDoor):
        assert asyncio.run(purge(door)) == 0
    else:
        with door.opened() as session:
            assert purge_once(session, older_than_s=3_600, namespace=NAMESPACE) == 0


@pytest.mark.parametrize(
    "words",
    [{"older_than_s": 0}, {"older_than_s": -1}, {"older_than_s": 9, "limit": 0}],
)
def test_what_would_forget_everything_is_refused(
    engine: Engine, words: dict[str, Any]
) -> None:
    """An age and a limit are positive."""
    with (
        engine.begin() as connection,
        pytest.raises(ConfigurationError, match="must be positive"),
    ):
        purge_once(connection, namespace=NAMESPACE, **words)


def test_a_key_that_is_purged_as_it_is_looked_at_is_claimed_again() -> None:
    """Between the insert that met it and the query for its result."""

    class Purged:
        vendor = "postgresql"
        writes = iter([0, 0, 1])

        def check(self) -> None: ...

        def write(self, sql: str, values: Any) -> int:
            return next(self.writes)

        def read(self, sql: str, values: Any) -> None:
            return None

    transaction: Any = Purged()
    assert once_sql.Claim(transaction, "shop", "key").is_first


def test_a_key_that_may_not_be_read_is_told() -> None:
    """Row security may hide it: that is not asked about for ever."""

    class Hidden:
        vendor = "postgresql"

        def check(self) -> None: ...

        def write(self, sql: str, values: Any) -> int:
            return 0

        def read(self, sql: str, values: Any) -> None:
            return None

    transaction: Any = Hidden()
    with pytest.raises(once_sql.StoreUnavailable, match="cannot read it"):
        once_sql.Claim(transaction, "shop", "key")


# --- whose namespace ------------------------------------------------------------------


def run_python(source: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = """
from sqlalchemy import create_engine, text
from sqlalchemy.pool import StaticPool
from celery import Celery
from celery_resilience import Resilience, ResilientTask, once
from celery_resilience.idempotency.once import sql_table as once_table

engine = create_engine(
    "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
)
once_table.create(engine)

def ask():
    try:
        with engine.begin() as connection:
            once(connection, "key")
            query = text("SELECT namespace FROM resilience_once")
            print(connection.execute(query).scalar())
            connection.rollback()
    except Exception as exc:
        print(type(exc).__name__, exc)
"""


def test_the_namespace_is_the_apps() -> None:
    """The current one's, installed or not; and in a task, the task's."""
    printed = run_python(
        ASK
        + """
ask()
shop = Celery("shop", set_as_current=False, broker="memory://")
shop.conf.update(task_always_eager=True, resilience_namespace="shop.eu")
task = shop.task(base=ResilientTask, name="ask", shared=False)(ask)
bank = Celery("bank", broker="memory://")
ask()
Resilience(bank)
ask()
task.delay()
ask()
"""
    ).splitlines()

    assert "ConfigurationError no Celery app is known here" in printed[0]
    assert "give namespace=" in printed[0]
    assert printed[1:] == ["bank", "bank", "shop.eu", "bank"]


def test_a_thread_has_the_namespace_of_the_only_app() -> None:
    """Celery's current app is one of each thread; of several none is guessed."""
    printed = run_python(
        ASK
        + """
from threading import Thread

def ask_in_a_thread():
    thread = Thread(target=ask)
    thread.start()
    thread.join()

shop = Celery("shop", broker="memory://")
ask_in_a_thread()
bank = Celery("bank", broker="memory://")
ask_in_a_thread()
bank.set_default()
ask_in_a_thread()
"""
    ).splitlines()

    assert printed[0] == "shop"
    assert "set_default()" in printed[1]
    assert "give namespace=" in printed[1]
    assert printed[2] == "bank"


def test_the_door_imports_no_library() -> None:
    """And a Connection needs nothing of SQLAlchemy's asyncio."""
    printed = run_python(
        """
import sys
from celery_resilience import once
print([n for n in ("sqlalchemy", "alembic") if n in sys.modules])
from sqlalchemy import create_engine
from celery_resilience.idempotency.once import sql_table as once_table
engine = create_engine("sqlite://")
with engine.begin() as connection:
    once_table.create(connection)
    print(bool(once(connection, "key", namespace="shop")))
print([n for n in ("sqlalchemy.ext.asyncio", "alembic") if n in sys.modules])
"""
    )

    assert printed.splitlines() == ["[]", "True", "[]"]


def test_an_alias_without_django_is_told_with_the_extra() -> None:
    """Not as an ImportError of somebody else's."""
    printed = run_python(
        """
import sys
sys.modules["django"] = None
from celery_resilience import once
try:
    once("default", "key", namespace="shop")
except ImportError as exc:
    print(exc)
"""
    )

    assert "pip install 'celery-resilience[django]'" in printed
