"""The engine below every SQL store: schema versions, processes, errors."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread, Timer
from typing import Any

import pytest
from polling import always, eventually
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.engine import make_url

from celery_resilience.crashes import sql_store as crashes
from celery_resilience.errors import (
    MissingExtra,
    SchemaMismatch,
    StoreUnavailable,
)
from celery_resilience.failed import sql_table as failed
from celery_resilience.stores.sql import SqlDatabase, schema_versions

ROOMS: dict[str, Any] = {
    "failed": (failed.VERSION, failed.TABLES),
    "crashes": (crashes.VERSION, crashes.TABLES),
}

fork = multiprocessing.get_context("fork")


@pytest.fixture
def url(make_url_of_kind: Callable[[], str]) -> str:
    """An empty database, of each kind."""
    return make_url_of_kind()


@pytest.fixture
def open_database(url: str) -> Iterator[Callable[..., SqlDatabase]]:
    """Opens the database, and closes it after the test."""
    opened: list[SqlDatabase] = []

    def open_it(**options: Any) -> SqlDatabase:
        database = SqlDatabase(url, **options)
        opened.append(database)
        return database

    yield open_it
    for database in opened:
        database.close()


def run_sql(url: str, *statements: str) -> None:
    """What an administrator types."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def tables_of(url: str) -> set[str]:
    """The tables that are there."""
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names


def in_child(work: Callable[[], Any]) -> Any:
    """What *work* returned in a forked child, or its traceback."""
    reader, writer = fork.Pipe(duplex=False)

    def run() -> None:
        try:
            writer.send(work())
        except BaseException:
            writer.send(traceback.format_exc())
        os._exit(0)

    process = fork.Process(target=run)
    process.start()
    process.join()
    writer.close()
    with reader:
        return reader.recv()


# --- the schema -----------------------------------------------------------------------


def test_missing_tables_are_made_on_first_use(open_database: Any, url: str) -> None:
    """Only those of the room that asks, with their version."""
    database = open_database()

    database.ready("crashes", *ROOMS["crashes"])

    assert tables_of(url) == {"resilience_schema", "resilience_starts"}
    with database.reading() as connection:
        assert connection.execute(schema_versions.select()).all() == [("crashes", 1)]


def test_ready_again_asks_nobody(open_database: Any, url: str) -> None:
    """The happy path costs no query: it would not even notice a dropped table."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    run_sql(url, "DROP TABLE resilience_schema")

    database.ready("crashes", *ROOMS["crashes"])

    assert "resilience_schema" not in tables_of(url)


def test_tables_that_are_there_are_used(open_database: Any) -> None:
    """Also where nothing may be made."""
    open_database().ready("failed", *ROOMS["failed"])

    open_database(create_schema=False).ready("failed", *ROOMS["failed"])

    assert open_database().ddl(ROOMS)


@pytest.mark.parametrize("has_another_room", [False, True])
def test_missing_tables_are_refused_where_none_may_be_made(
    open_database: Any, url: str, has_another_room: bool
) -> None:
    """The refusal names the command that prints them, and nothing was made."""
    if has_another_room:
        open_database().ready("crashes", *ROOMS["crashes"])
    before = tables_of(url)

    with pytest.raises(SchemaMismatch) as refused:
        open_database(create_schema=False).ready("failed", *ROOMS["failed"])

    assert "the tables of 'failed' are missing" in str(refused.value)
    assert "resilience_create_schema is False" in str(refused.value)
    assert "celery -A app resilience schema --sql" in str(refused.value)
    assert tables_of(url) == before


@pytest.mark.parametrize(
    ("found", "advice"),
    [(7, "upgrade celery-resilience here"), (0, "upgrade the tables")],
)
@pytest.mark.parametrize("create_schema", [True, False])
def test_tables_of_another_version_are_refused(
    open_database: Any, url: str, found: int, advice: str, create_schema: bool
) -> None:
    """With both versions and which side to upgrade; nothing is read or written."""
    open_database().ready("failed", *ROOMS["failed"])
    run_sql(url, f"UPDATE resilience_schema SET version = {found}")

    with pytest.raises(SchemaMismatch) as refused:
        open_database(create_schema=create_schema).ready("failed", *ROOMS["failed"])

    said = str(refused.value)
    assert f"version {found}" in said
    assert f"knows version {failed.VERSION}" in said
    assert advice in said


def test_a_refusal_is_not_remembered(open_database: Any, url: str) -> None:
    """Once the tables are right, the same process goes on."""
    database = open_database(create_schema=False)
    with pytest.raises(SchemaMismatch):
        database.ready("failed", *ROOMS["failed"])
    open_database().ready("failed", *ROOMS["failed"])

    database.ready("failed", *ROOMS["failed"])

    assert "resilience_failed" in tables_of(url)


def test_the_printed_statements_make_the_tables(open_database: Any, url: str) -> None:
    """`schema --sql` is complete: nothing is left to make, and versions are right."""
    ddl = open_database().ddl(ROOMS)
    statements = [s for s in ddl.split(";\n") if s.strip()]
    run_sql(url, *statements)

    database = open_database(create_schema=False)

    for room, (version, tables) in ROOMS.items():
        database.ready(room, version, tables)
    made = {table.name for _, tables in ROOMS.values() for table in tables}
    assert tables_of(url) == made | {"resilience_schema"}


def test_the_printed_statements_make_every_index(
    open_database: Any, url: str, make_url_of_kind: Any
) -> None:
    """The same as the package makes by itself."""

    def indexes(at: str) -> Any:
        engine = create_engine(at)
        found = {
            table: sorted(str(i["name"]) for i in inspect(engine).get_indexes(table))
            for table in ("resilience_failed", "resilience_starts")
        }
        engine.dispose()
        return found

    run_sql(url, *[s for s in open_database().ddl(ROOMS).split(";\n") if s.strip()])
    other = make_url_of_kind()
    database = SqlDatabase(other)
    for room, (version, tables) in ROOMS.items():
        database.ready(room, version, tables)
    database.close()

    assert indexes(url) == indexes(other)
    assert len(indexes(url)["resilience_failed"]) >= 5


def open_once(url: str) -> None:
    """Let SQLite write its log ahead; opening a new file at once: the end of this file."""
    database = SqlDatabase(url)
    with database.reading():
        pass
    database.close()


def test_several_processes_may_make_the_tables_at_once(url: str) -> None:
    """A fleet starts all at once on an empty database."""
    open_once(url)
    start = fork.Barrier(6)
    answers = fork.SimpleQueue()

    def make(room: str) -> None:
        database = SqlDatabase(url)
        start.wait()
        try:
            database.ready(room, *ROOMS[room])
            answers.put("ready")
        except BaseException:
            answers.put(traceback.format_exc())
        os._exit(0)

    processes = [
        fork.Process(target=make, args=(room,)) for room in ["failed", "crashes"] * 3
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [answers.get() for _ in processes] == ["ready"] * 6
    engine = create_engine(url)
    with engine.connect() as connection:
        versions = connection.execute(schema_versions.select()).all()
    engine.dispose()
    assert sorted(versions) == [("crashes", 1), ("failed", 1)]


def test_tables_whose_maker_died_get_their_indexes(
    mariadb_url: Callable[[], str],
) -> None:
    """On MySQL each statement is a transaction: a table may be there without them."""
    url, other = mariadb_url(), mariadb_url()
    whole, broken = SqlDatabase(other), SqlDatabase(url)
    whole.ready("failed", *ROOMS["failed"])
    made = [s for s in broken.ddl(ROOMS).split(";\n") if "CREATE TABLE" in s]
    run_sql(url, *made)

    broken.ready("failed", *ROOMS["failed"])

    names = []
    for database in (whole, broken):
        with database.reading() as connection:
            found = inspect(connection).get_indexes("resilience_failed")
        names.append(sorted(str(index["name"]) for index in found))
        database.close()
    assert names[0] == names[1]
    assert len(names[0]) >= 5


def test_tables_are_made_by_one_process_at_a_time(
    mariadb_url: Callable[[], str],
) -> None:
    """MySQL's own locks end with each statement: the others wait for the last one."""
    url = mariadb_url()
    engine = create_engine(url)
    lock = "CONCAT('resilience:', MD5(DATABASE()))"
    database = SqlDatabase(url)
    making = Thread(target=database.ready, args=("crashes", *ROOMS["crashes"]))
    with engine.connect() as connection:
        connection.execute(text(f"SELECT GET_LOCK({lock}, 1)"))
        making.start()
        always(lambda: tables_of(url) == set(), for_s=0.3)
        connection.execute(text(f"SELECT RELEASE_LOCK({lock})"))
    making.join()
    engine.dispose()

    assert tables_of(url) == {"resilience_schema", "resilience_starts"}
    with database.reading() as connection:
        taken = connection.execute(text(f"SELECT IS_USED_LOCK({lock})")).scalar()
    database.close()
    assert taken is None


def test_the_printed_statements_are_taken_by_the_client(
    servers: Any, mariadb_url: Callable[[], str]
) -> None:
    """`resilience schema --sql | mariadb` makes what the package then uses."""
    server, url = servers("mariadb"), mariadb_url()
    client = server.program("mariadb")
    if client is None and os.environ.get("CI") != "true":
        pytest.skip("missing mariadb: there is no client beside the container")
    assert client is not None, "mariadb, the client, is missing"
    database = SqlDatabase(url, create_schema=False)
    done = subprocess.run(
        [
            *(client, "--no-defaults", "--protocol=tcp", "--host=127.0.0.1"),
            *(f"--port={server.port}", "--user=root", make_url(url).database),
        ],
        input=database.ddl(ROOMS),
        text=True,
        capture_output=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    for room, (version, tables) in ROOMS.items():
        database.ready(room, version, tables)
    with database.reading() as connection:
        collations = connection.execute(
            text(
                "SELECT DISTINCT collation_name FROM information_schema.columns "
                "WHERE table_schema = DATABASE() AND collation_name IS NOT NULL"
            )
        )
        assert collations.scalars().all() == ["utf8mb4_nopad_bin"]
    database.close()


# --- transactions ---------------------------------------------------------------------


def write_and_fail(database: SqlDatabase) -> None:
    """A transaction whose caller has a fault."""
    with database.writing() as connection:
        connection.execute(schema_versions.insert().values(room="lost", version=1))
        raise KeyError


def test_what_is_written_is_there_and_what_failed_is_not(open_database: Any) -> None:
    """Committed at the end, rolled back with an exception."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    insert = schema_versions.insert()

    with database.writing() as connection:
        connection.execute(insert.values(room="kept", version=1))
    with pytest.raises(KeyError):
        write_and_fail(database)

    with database.reading() as connection:
        rooms = {row.room for row in connection.execute(schema_versions.select())}
    assert rooms == {"crashes", "kept"}


def test_writers_wait_for_each_other(open_database: Any) -> None:
    """A transaction that reads first and writes then loses no update."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    with database.writing() as connection:
        connection.execute(schema_versions.insert().values(room="n", version=0))
    start = Barrier(4)
    row = schema_versions.c.room == "n"
    errors: list[BaseException] = []

    def add() -> None:
        start.wait()
        try:
            for _ in range(5):
                with database.writing() as connection:
                    read = schema_versions.select().where(row).with_for_update()
                    version = connection.execute(read).one().version
                    connection.execute(
                        schema_versions.update().where(row).values(version=version + 1)
                    )
        except Exception as exc:
            errors.append(exc)

    threads = [Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    with database.reading() as connection:
        found = connection.execute(schema_versions.select().where(row)).one()
    assert found.version == 20


def test_who_is_given_up_in_a_deadlock_is_repeated(open_database: Any) -> None:
    """Two transactions lock two rows in opposite orders, and both are committed."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    with database.writing() as connection:
        rows = [{"room": room, "version": 0} for room in ("a", "b")]
        connection.execute(schema_versions.insert(), rows)
    both_have_one = Barrier(2, timeout=1)
    tries: list[str] = []

    def add_to(*rooms: str) -> Callable[[Any], None]:
        def work(connection: Any) -> None:
            tries.append(rooms[0])
            for room in rooms:
                connection.execute(
                    schema_versions.update()
                    .where(schema_versions.c.room == room)
                    .values(version=schema_versions.c.version + 1)
                )
                # SQLite has one writer: the other comes when this one is done.
                with contextlib.suppress(BrokenBarrierError):
                    both_have_one.wait()

        return work

    works = [add_to("a", "b"), add_to("b", "a")]
    errors: list[BaseException] = []

    def run(work: Callable[[Any], None]) -> None:
        try:
            database.write(work)
        except BaseException as exc:
            errors.append(exc)

    threads = [Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(tries) == (2 if database.is_sqlite else 3)
    with database.reading() as connection:
        found = {row.room: row.version for row in connection.execute(select_versions())}
    assert (found["a"], found["b"]) == (2, 2)


def select_versions() -> Any:
    """Every room's version."""
    return schema_versions.select()


@pytest.mark.parametrize(
    ("number", "is_repeated"), [(1213, True), (1205, True), (1054, False)]
)
def test_a_transaction_is_not_repeated_for_ever(
    mariadb_url: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    is_repeated: bool,
) -> None:
    """A deadlock, a lock that is held too long; anything else fails at once."""
    monkeypatch.setattr("celery_resilience.stores.sql.TRIES", 3)
    database = SqlDatabase(mariadb_url())
    tries = []

    def work(connection: Any) -> None:
        tries.append(1)
        signal = f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {number}"
        connection.execute(text(f"{signal}, MESSAGE_TEXT = 'no luck'"))

    with pytest.raises(StoreUnavailable, match="no luck"):
        database.write(work)
    database.close()

    assert len(tries) == (3 if is_repeated else 1)


def test_a_connection_that_the_server_closed_is_replaced(
    postgresql_url: Callable[[], str], mariadb_url: Callable[[], str]
) -> None:
    """It did so while nobody used it: the next call does not notice."""
    closing = {
        postgresql_url(): "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        mariadb_url(): "",
    }
    for url, kill in closing.items():
        database = SqlDatabase(url)
        database.ready("crashes", *ROOMS["crashes"])
        if not kill:
            with database.reading() as connection:
                number = connection.execute(text("SELECT CONNECTION_ID()")).scalar()
            kill = f"KILL {number}"
        run_sql(url, kill)

        with database.reading() as connection:
            assert len(connection.execute(select_versions()).all()) == 1
        database.close()


def test_now_is_the_databases_wall_time(open_database: Any) -> None:
    """In seconds, and it goes on inside a transaction."""
    database = open_database()

    with database.reading() as connection:
        times = [
            connection.execute(select(database.now())).scalar_one() for _ in range(2)
        ]

    assert abs(times[0] - time.time()) < 60
    assert times[1] > times[0]


def test_texts_are_the_same_only_byte_for_byte(open_database: Any) -> None:
    """Not by their case, accents or trailing spaces; an emoji is a text too."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    rooms = ["a", "A", "á", "a ", "a\t", "😀", "😁", "ß", "ss"]

    with database.writing() as connection:
        rows = [{"room": room, "version": 1} for room in rooms]
        connection.execute(schema_versions.insert(), rows)

    for room in rooms:
        column = schema_versions.c.room
        for is_it in (column == room, column.like(room)):
            with database.reading() as connection:
                found = connection.execute(select(column).where(is_it)).scalars()
                # SQLite's LIKE knows no case of ASCII's: `needs_python` says so.
                assert {f for f in found if f == room or not database.is_sqlite} == {
                    room
                }


def test_a_urls_own_charset_is_not_used(mariadb_url: Callable[[], str]) -> None:
    """Texts are UTF-8 in every store, whatever the rest of the app speaks."""
    database = SqlDatabase(mariadb_url() + "?charset=latin1")
    database.ready("crashes", *ROOMS["crashes"])

    with database.writing() as connection:
        connection.execute(schema_versions.insert(), {"room": "😀", "version": 1})

    with database.reading() as connection:
        found = connection.execute(select(schema_versions.c.room)).scalars().all()
    database.close()
    assert set(found) == {"crashes", "😀"}


def test_who_looks_for_what_is_not_there_holds_nobody_up(
    postgresql_url: Callable[[], str], mariadb_url: Callable[[], str]
) -> None:
    """MySQL's default isolation locks the gap, and collectors would deadlock in it."""
    for url in (postgresql_url(), mariadb_url()):
        database = SqlDatabase(url)
        database.ready("crashes", *ROOMS["crashes"])
        missing = select_versions().where(schema_versions.c.room == "m")
        done: list[bool] = []

        def insert(database: Any = database, done: Any = done) -> None:
            other = schema_versions.insert().values(room="n", version=1)
            database.write(lambda connection: connection.execute(other))
            done.append(True)

        thread = Thread(target=insert)
        with database.writing() as connection:
            connection.execute(missing.with_for_update())
            thread.start()
            eventually(lambda done=done: done, within_s=5)
        thread.join()
        database.close()


def test_a_text_that_is_too_long_is_refused(
    postgresql_url: Callable[[], str], mariadb_url: Callable[[], str]
) -> None:
    """Not cut in silence, as a MySQL that is not strict would."""
    for url in (postgresql_url(), mariadb_url()):
        database = SqlDatabase(url)
        database.ready("crashes", *ROOMS["crashes"])
        row = {"room": "x" * 33, "version": 1}

        for insert in (
            lambda c, row=row: c.execute(schema_versions.insert(), row),
            lambda c, row=row, d=database: d.insert_new(c, schema_versions, [row]),
        ):
            with pytest.raises(StoreUnavailable, match="too long"):
                database.write(insert)
        database.close()


def test_only_what_is_new_is_inserted(open_database: Any) -> None:
    """What is there stays as it is, and is told of, by itself and among others."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])

    def insert(version: int, *rooms: str) -> bool:
        rows = [{"room": name, "version": version} for name in rooms]
        return bool(
            database.write(lambda c: database.insert_new(c, schema_versions, rows))
        )

    assert insert(1, "a")
    assert insert(1, "b", "c")
    assert not insert(2, "a")
    assert not insert(2, "b", "d")
    assert not insert(2, "b", "c")
    with database.reading() as connection:
        found = {r.room: r.version for r in connection.execute(select_versions())}
    assert [found[room] for room in ("a", "b", "c")] == [1, 1, 1]


# --- processes ------------------------------------------------------------------------


def test_a_forked_child_uses_no_connection_of_its_parent(open_database: Any) -> None:
    """Two processes on one socket would read each other's answers."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    parents = database._engine

    def in_the_child() -> Any:
        with database.reading() as connection:
            rows = connection.execute(schema_versions.select()).all()
        is_own = database._engine is not parents
        database.close()
        return is_own, [tuple(row) for row in rows]

    assert in_child(in_the_child) == (True, [("crashes", 1)])
    with database.reading() as connection:
        assert connection.execute(schema_versions.select()).all() == [("crashes", 1)]
    assert database._engine is parents


def test_a_child_that_is_forked_inside_a_transaction_has_its_own(
    open_database: Any,
) -> None:
    """And the parent's goes on when the child has ended."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])

    def in_the_child() -> Any:
        with database.reading() as connection:
            rows = connection.execute(schema_versions.select()).all()
        database.close()
        gc.collect()
        return len(rows)

    with database.writing() as connection:
        connection.execute(schema_versions.insert().values(room="mine", version=1))
        seen = in_child(in_the_child)
        connection.execute(schema_versions.insert().values(room="more", version=1))

    assert seen == 1
    with database.reading() as connection:
        assert len(connection.execute(schema_versions.select()).all()) == 3


def test_a_child_checks_the_schema_anew(open_database: Any, url: str) -> None:
    """What the parent knew may be old."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])
    run_sql(url, "UPDATE resilience_schema SET version = 9")

    answer = in_child(lambda: database.ready("crashes", *ROOMS["crashes"]))

    assert "SchemaMismatch" in answer


def test_a_closed_database_opens_again(open_database: Any) -> None:
    """A command closes after each call."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])

    database.close()
    database.close()

    with database.reading() as connection:
        assert len(connection.execute(schema_versions.select()).all()) == 1


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [("postgresql", "postgresql+psycopg"), ("mysql", "mysql+pymysql")],
)
def test_a_database_that_does_not_answer_is_unavailable(name: str, shown: str) -> None:
    """Nobody listens: StoreUnavailable, with the URL and without its password."""
    database = SqlDatabase(f"{name}://shop:hunter2@127.0.0.1:9/db")

    with pytest.raises(StoreUnavailable) as away:
        database.ready("failed", *ROOMS["failed"])

    assert f"{shown}://shop:***@127.0.0.1:9/db" in str(away.value)
    assert "hunter2" not in "".join(traceback.format_exception(away.value))


def test_a_folder_that_is_missing_is_unavailable(tmp_path: Path) -> None:
    """With the path that was tried."""
    database = SqlDatabase(f"sqlite:///{tmp_path}/none/x.sqlite3")

    with pytest.raises(StoreUnavailable, match=r"none/x\.sqlite3"):
        database.ready("failed", *ROOMS["failed"])


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    """And not a traceback of the driver's."""
    (tmp_path / "x.sqlite3").write_bytes(b"not a database at all" * 100)
    database = SqlDatabase(f"sqlite:///{tmp_path}/x.sqlite3")

    with pytest.raises(StoreUnavailable, match="not a database"):
        database.ready("failed", *ROOMS["failed"])
    database.close()


def test_a_statement_that_fails_is_unavailable(open_database: Any) -> None:
    """Inside a transaction too; the driver's own text is told."""
    database = open_database()

    with (
        pytest.raises(StoreUnavailable, match="nowhere") as away,
        database.reading() as connection,
    ):
        connection.execute(text("SELECT * FROM nowhere"))

    assert away.value.__cause__ is not None


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_server_that_dies_is_unavailable(own_server: Any, kind: str) -> None:
    """In the middle of a transaction, of its commit, or of a list; and comes back."""
    server = own_server(kind)
    database = SqlDatabase(server.url)
    database.ready("crashes", *ROOMS["crashes"])
    insert = crashes.starts.insert()
    row = {
        "namespace": "n",
        "message": "m",
        "worker": "w" * 99,
        "is_alone": False,
        "started_at": 1,
    }

    def in_a_statement(connection: Any) -> None:
        server.kill()
        connection.execute(insert, row)

    def at_the_commit(connection: Any) -> None:
        connection.execute(insert, row)
        server.kill()

    def in_a_list(connection: Any) -> None:
        query = crashes.starts.select().execution_options(yield_per=2)
        with contextlib.closing(connection.execute(query)) as rows:
            next(rows)
            server.kill()
            rows.all()

    database.write(lambda connection: connection.execute(insert, [row] * 20_000))
    for dies in (in_a_statement, at_the_commit, in_a_list):
        with pytest.raises(StoreUnavailable):
            database.write(dies)
        with pytest.raises(StoreUnavailable):
            database.write(lambda connection: connection.execute(insert, row))
        server.start()

    with database.reading() as connection:
        found = connection.execute(select(crashes.starts.c.number)).scalars().all()
    database.close()
    assert len(found) == 20_000


def test_a_server_that_answers_nothing_is_unavailable(
    servers: Any, mariadb_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is connected already or not: nobody waits for ever."""
    monkeypatch.setattr("celery_resilience.stores.sql_dialects.ANSWER_TIMEOUT_S", 1)
    url = mariadb_url()
    connected, new = SqlDatabase(url), SqlDatabase(url)
    connected.ready("crashes", *ROOMS["crashes"])
    servers("mariadb").freeze()
    try:
        for database in (connected, new):
            with pytest.raises(StoreUnavailable), database.reading():
                pass
    finally:
        servers("mariadb").thaw()

    for database in (connected, new):
        with database.reading() as connection:
            assert len(connection.execute(select_versions()).all()) == 1
        database.close()


def test_a_connection_that_breaks_at_its_commit_is_unavailable(
    mariadb_url: Callable[[], str],
) -> None:
    """While the server lives; no row is blamed for it."""
    url = mariadb_url()
    database = SqlDatabase(url)
    database.ready("crashes", *ROOMS["crashes"])

    def broken(connection: Any) -> None:
        row = {"room": "x", "version": 1}
        connection.execute(schema_versions.insert(), row)
        number = connection.execute(text("SELECT CONNECTION_ID()")).scalar()
        run_sql(url, f"KILL {number}")

    with pytest.raises(StoreUnavailable) as away:
        database.write(broken)
    database.close()

    assert "max_allowed_packet" not in str(away.value)


def test_a_wrong_password_is_told_without_it(mariadb_url: Callable[[], str]) -> None:
    """Neither in the message nor in what a log shows of its causes."""
    url = make_url(mariadb_url()).set(username="shop", password="hunter2")
    database = SqlDatabase(url.render_as_string(hide_password=False))

    with pytest.raises(StoreUnavailable, match="Access denied") as denied:
        database.ready("failed", *ROOMS["failed"])
    database.close()

    assert "hunter2" not in "".join(traceback.format_exception(denied.value))


def test_an_error_of_the_caller_is_his_own(open_database: Any) -> None:
    """Only the database's errors mean that it did not answer."""
    with pytest.raises(ZeroDivisionError), open_database().reading():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [("postgresql", "psycopg", "postgres"), ("mysql", "pymysql", "mysql")],
)
def test_a_missing_driver_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str, library: str, extra: str
) -> None:
    """With what to install, and without the password."""
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    database = SqlDatabase(f"{kind}://shop:hunter2@h/db")

    with pytest.raises(MissingExtra) as missing:
        database.ready("failed", *ROOMS["failed"])

    assert f"celery-resilience[{extra}]" in str(missing.value)
    assert library in str(missing.value)
    assert "hunter2" not in str(missing.value)


def test_a_postgresql_url_needs_no_drivers_name() -> None:
    """psycopg is the one that the extra installs."""
    assert "postgresql+psycopg://h/db" in SqlDatabase("postgresql://h/db")._shown()
    assert "+psycopg2" in SqlDatabase("postgresql+psycopg2://h/db")._shown()


@pytest.mark.parametrize(
    "url", ["mysql://h/db", "mariadb://h/db", "mariadb+pymysql://h/db"]
)
def test_a_mysql_url_needs_no_drivers_name(url: str) -> None:
    """pymysql is the one that the extra installs, for MariaDB too."""
    assert "mysql+pymysql://h/db" in SqlDatabase(url)._shown()
    assert "+mysqldb" in SqlDatabase("mariadb+mysqldb://h/db")._shown()


def test_a_text_that_no_database_takes_is_a_store_error(open_database: Any) -> None:
    """A lone surrogate; a collector would end in a UnicodeEncodeError."""
    database = open_database()
    database.ready("crashes", *ROOMS["crashes"])

    with pytest.raises(StoreUnavailable), database.writing() as connection:
        connection.execute(schema_versions.insert().values(room="\ud800", version=1))


def test_a_new_sqlite_file_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    """
    SQLite's busy timeout does not hold for `PRAGMA journal_mode=WAL`.

    Of processes that open a new file together some fail at once, "database is
    locked": a fleet's first start, or a worker beside the first command.
    """
    path = tmp_path / "x.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    release = Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    database = SqlDatabase(f"sqlite:///{path}")
    try:
        with database.reading() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1
    finally:
        release.join()
        other.close()
        database.close()


def test_threads_that_come_at_once_share_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is overwritten leaves its connections open."""
    open_once(f"sqlite:///{tmp_path}/x.sqlite3")
    database = SqlDatabase(f"sqlite:///{tmp_path}/x.sqlite3")
    make, together = database._make_engine, Barrier(2)
    engines: list[Any] = []

    def make_slowly() -> Any:
        with contextlib.suppress(BrokenBarrierError):
            together.wait(timeout=2)
        engines.append(make())
        return engines[-1]

    monkeypatch.setattr(database, "_make_engine", make_slowly)

    def read() -> None:
        with database.reading():
            pass

    threads = [Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.dispose()

    assert len(engines) == 1


@pytest.mark.parametrize("name", ["postgresql+psycopg2", "mysql+mysqldb"])
def test_another_missing_driver_is_not_promised_by_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """celery-resilience[postgres] does not bring psycopg2, nor [mysql] mysqlclient."""
    for library in ("psycopg2", "MySQLdb"):
        monkeypatch.setitem(sys.modules, library, None)
    database = SqlDatabase(f"{name}://h/db")

    with pytest.raises(MissingExtra) as missing:
        database.ready("failed", *ROOMS["failed"])

    assert "celery-resilience[" not in str(missing.value)


def test_a_file_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command and each worker would wait half a minute for it."""
    monkeypatch.setattr("celery_resilience.stores.sql.LOCK_TIMEOUT_S", 1)
    path = tmp_path / "x.sqlite3"
    sqlite3.connect(path).close()
    database = SqlDatabase(f"sqlite:///file:{path}?mode=ro&uri=true")
    started = time.monotonic()

    with pytest.raises(StoreUnavailable), database.reading():
        pass
    waited_s = time.monotonic() - started
    database.close()

    assert waited_s < 0.5
