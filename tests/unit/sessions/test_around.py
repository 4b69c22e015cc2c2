"""Around a body in one process: what is left is undone, and told of once."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Integer, String, create_engine, select, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import StaticPool

from celery_resilience import events
from celery_resilience.errors import LeftBehind
from celery_resilience.sessions.run import current
from celery_resilience.sessions.task import Sessions


class Base(DeclarativeBase):
    """The tables of these tests."""


class Row(Base):
    """One of them."""

    __tablename__ = "rows"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(20))


REQUEST = SimpleNamespace(id="17", is_eager=False)
TASK = SimpleNamespace(name="shop.ship", request=REQUEST)


class Around:
    """A room, and a session of the process, on a database in memory."""

    def __init__(self, room: Sessions, url: str) -> None:
        self.room = room
        self.engine = create_engine(url)
        Base.metadata.create_all(self.engine)
        self.session = scoped_session(sessionmaker(self.engine, expire_on_commit=False))

    def run(self, body: Any, exc: BaseException | None = None) -> Any:
        """Run a body, as far as `__call__` goes."""
        self.room.before(TASK, REQUEST)
        result = body()
        self.room.after(TASK, REQUEST, exc)
        return result

    def names(self) -> list[str]:
        """What is committed."""
        with Session(self.engine) as session:
            return list(session.scalars(select(Row.name)))


@pytest.fixture
def around(tmp_path: Any) -> Iterator[Around]:
    """With the setting "auto"."""
    made = Around(Sessions(), f"sqlite:///{tmp_path}/rows.sqlite3")
    current.set(None)
    yield made
    made.session.remove()
    made.engine.dispose()
    current.set(None)


@pytest.fixture
def told() -> Iterator[list[dict[str, Any]]]:
    """What is told of leaks."""
    found: list[dict[str, Any]] = []

    def hear(**facts: Any) -> None:
        found.append(facts)

    stop = events.observe("sessions.leaked", hear)
    yield found
    stop()


def test_a_body_that_ends_its_transaction_is_left_alone(
    around: Around, told: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is told, and its rows are there."""

    def body() -> None:
        around.session.add(Row(name="mine"))
        around.session.commit()

    around.run(body)

    assert around.names() == ["mine"]
    assert told == []
    assert caplog.records == []


@pytest.mark.parametrize("flushes", [True, False])
def test_what_is_not_committed_is_rolled_back_and_told_of(
    around: Around,
    told: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    flushes: bool,
) -> None:
    """In one WARNING, with the line that began it."""

    def body() -> None:
        around.session.add(Row(name="left"))
        if flushes:
            around.session.flush()

    around.run(body)
    around.session.commit()

    assert around.names() == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "celery_resilience.sessions"
    assert record.getMessage().startswith(
        "task shop.ship[17] left behind: open transaction, open for 0."
    )
    (facts,) = told
    assert (facts["task"], facts["task_id"], facts["has_raised"]) == (
        "shop.ship",
        "17",
        False,
    )
    (leak,) = facts["leaks"]
    assert leak["kind"] == "open transaction"
    assert leak["open_s"] >= 0
    assert f"{__file__}:{body.__code__.co_firstlineno + 1}" == leak["where"]


def test_a_body_that_has_raised_is_told_of_quietly(
    around: Around, caplog: pytest.LogCaptureFixture
) -> None:
    """It was cut off in what it did; its failure is told of elsewhere."""
    caplog.set_level(logging.INFO, "celery_resilience.sessions")

    around.run(lambda: around.session.add(Row(name="half")), ValueError("no"))

    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert not around.session().in_transaction()


def test_strict_fails_who_has_returned_and_no_other(around: Around) -> None:
    """After it is undone."""
    around.room = Sessions(is_strict=True)

    with pytest.raises(LeftBehind, match="left behind: open transaction"):
        around.run(lambda: around.session.add(Row(name="left")))
    assert not around.session().in_transaction()
    around.run(lambda: around.session.add(Row(name="half")), ValueError("no"))


def test_a_session_begins_anew_once_the_result_is_stored(around: Around) -> None:
    """Until then the result may read from its objects."""

    def body() -> Row:
        row = Row(name="mine")
        around.session.add(row)
        around.session.commit()
        return row

    row = around.run(body)
    around.session.expire(row)
    assert row.name == "mine"
    assert row in around.session
    around.room.after_result(TASK, REQUEST.id)

    assert row not in around.session
    assert not around.session().in_transaction()


def test_a_run_begins_without_what_came_after_the_last(around: Around) -> None:
    """As where no signal has told of its end."""
    around.run(lambda: around.session.execute(text("SELECT 1")) and None)
    around.session.add(Row(name="of a handler"))

    around.run(lambda: around.session.commit())

    assert around.names() == []


def test_what_a_receiver_of_prerun_has_begun_is_the_bodys(
    around: Around, told: list[Any]
) -> None:
    """It is not cut off before the body, and is ended with it."""
    around.session.add(Row(name="of a receiver"))

    around.run(around.session.commit)
    around.room.after_result(TASK, REQUEST.id)

    assert around.names() == ["of a receiver"]
    assert told == []
    around.session.add(Row(name="of another"))
    around.run(lambda: None)
    around.session.commit()
    assert around.names() == ["of a receiver"]


def test_a_task_that_applies_itself_keeps_its_session(around: Around) -> None:
    """The inner one's end is not the outer one's, though they have one name."""

    def body() -> None:
        around.session.add(Row(name="outer"))
        around.session.flush()
        around.room.after_result(TASK, "of the inner one")
        around.session.commit()

    around.run(body)

    assert around.names() == ["outer"]


def test_what_was_begun_around_a_body_that_did_not_run_is_ended(
    around: Around, told: list[Any]
) -> None:
    """A duplicate's: its receivers may have used a session, and nobody is blamed."""
    around.session.add(Row(name="of a receiver"))
    around.session.flush()
    inner = SimpleNamespace(name="of another", request=SimpleNamespace(is_eager=True))
    around.room.after_result(inner, "of the inner one")
    assert around.session().in_transaction()

    around.room.after_result(TASK, REQUEST.id)

    assert current.get() is None
    assert not around.session().in_transaction()
    assert around.names() == []
    around.run(around.session.commit)
    assert around.names() == []
    assert told == []


def test_a_connection_is_rolled_back_and_stays_whoevers_it_is(
    around: Around, told: list[dict[str, Any]]
) -> None:
    """A module may keep it over tasks."""
    kept: list[Any] = []

    def body() -> None:
        kept.append(around.engine.connect())
        kept[0].execute(text("INSERT INTO rows (name) VALUES ('left')"))

    around.run(body)
    around.run(lambda: kept[0].execute(text("INSERT INTO rows (name) VALUES ('x')")))
    around.run(lambda: kept[0].commit())

    assert around.names() == []
    assert [leak["kind"] for facts in told for leak in facts["leaks"]] == [
        "open transaction",
        "open transaction",
    ]
    kept[0].close()


def test_a_raw_connection_that_is_not_returned_is_told_of(
    around: Around, told: list[dict[str, Any]]
) -> None:
    """With where it was taken."""
    kept: list[Any] = []

    def body() -> None:
        kept.append(around.engine.raw_connection())
        kept[0].cursor().execute("INSERT INTO rows (name) VALUES ('left')")

    around.run(body)

    kept[0].commit()
    kept[0].close()
    assert around.names() == []
    (leak,) = told[0]["leaks"]
    assert leak["kind"] == "connection not returned"
    assert leak["where"] == f"{__file__}:{body.__code__.co_firstlineno + 1}"


def test_a_database_in_memory_is_kept(around: Around) -> None:
    """It is nowhere else, even if a temporary table is left in it."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)

    def body() -> None:
        with engine.begin() as connection:
            connection.execute(text("CREATE TEMP TABLE mine (id int)"))
            connection.execute(text("INSERT INTO rows (name) VALUES ('kept')"))

    around.run(body)

    with engine.connect() as connection:
        assert connection.execute(text("SELECT name FROM rows")).scalar() == "kept"
    engine.dispose()


def test_a_temporary_table_in_a_file_is_gone(
    around: Around, told: list[dict[str, Any]]
) -> None:
    """With the connection that had it."""

    def body() -> None:
        around.session.execute(text("CREATE TEMP TABLE mine (id int)"))
        around.session.commit()

    around.run(body)

    assert [leak["kind"] for leak in told[0]["leaks"]] == ["temporary table"]
    with around.engine.connect() as connection:
        found = connection.execute(text("SELECT count(*) FROM sqlite_temp_master"))
        assert found.scalar() == 0


def test_a_child_asks_no_connection_of_its_parents(tmp_path: Path) -> None:
    """SQLite's may be locked for ever there; one in memory is known as such, and kept."""
    source = """
        import os, sys
        from sqlalchemy import create_engine, text
        from sqlalchemy.pool import StaticPool
        from celery_resilience.sessions import sqlalchemy_runs

        sqlalchemy_runs.attach()
        engines = [
            create_engine(f"sqlite:///{sys.argv[1]}"),
            create_engine("sqlite://", poolclass=StaticPool),
        ]
        asked = []
        for engine in engines:
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE mine (id int)"))
                raw = connection.connection.driver_connection
            raw.set_trace_callback(asked.append)
        if not os.fork():
            assert asked == [], asked
            for engine in engines:
                with engine.begin() as connection:
                    connection.execute(text("SELECT * FROM mine"))
            print([sql for sql in asked if sql.startswith("SELECT")], flush=True)
            os._exit(0)
        os.wait()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), str(tmp_path / "file.db")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    # Of the two that are watched, only that in memory is used there.
    assert (done.stdout, done.stderr) == ("['SELECT * FROM mine']\n", "")


def test_the_orm_is_heard_once_it_is_imported() -> None:
    """Not before: our own stores import the rest of SQLAlchemy, and it costs memory."""
    source = """
        import sys
        from types import SimpleNamespace
        from sqlalchemy import create_engine, text
        from celery_resilience.sessions.run import current
        from celery_resilience.sessions.task import Sessions

        room, task = Sessions(), SimpleNamespace(name="shop.ship")
        assert "sqlalchemy.orm" not in sys.modules

        def run(body):
            room.before(task, SimpleNamespace(id="17"))
            body()
            room.after(task, SimpleNamespace(id="17"), None)

        def body():
            from sqlalchemy.orm import Session
            sessions.append(Session(create_engine("sqlite://")))
            sessions[-1].execute(text("CREATE TABLE mine (id int)"))
            sessions[-1].execute(text("INSERT INTO mine VALUES (1)"))

        sessions = []
        run(body)
        run(body)
        print([session.in_transaction() for session in sessions])
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stdout == "[False, False]\n", done.stderr
    assert done.stderr.count("left behind: open transaction") == 1, done.stderr


def test_a_body_that_imports_sqlalchemy_leaves_nothing_either() -> None:
    """Its session was listened to by nobody, and is ended all the same."""
    source = """
        import sys
        from types import SimpleNamespace
        from celery_resilience.sessions.task import Sessions

        room, task = Sessions(), SimpleNamespace(name="shop.ship")
        assert "sqlalchemy" not in sys.modules
        room.before(task, SimpleNamespace(id="17"))
        from sqlalchemy import create_engine, text
        from sqlalchemy.orm import Session

        session = Session(create_engine("sqlite://"))
        session.execute(text("CREATE TABLE mine (id int)"))
        session.execute(text("INSERT INTO mine VALUES (1)"))
        room.after(task, SimpleNamespace(id="17"), None)
        print(session.in_transaction())
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("False\n", "")


def test_django_without_settings_is_nobodys_business() -> None:
    """A library may import it; it is listened to once it has settings."""
    source = """
        import django.db
        from django.conf import settings
        from types import SimpleNamespace
        from celery_resilience.sessions.run import current
        from celery_resilience.sessions.task import Sessions

        room, task = Sessions(), SimpleNamespace(name="shop.ship")
        room.before(task, SimpleNamespace(id="17"))
        sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
        settings.configure(DATABASES={"default": sqlite})
        django.setup()
        room.after(task, SimpleNamespace(id="17"), None)
        room.before(task, SimpleNamespace(id="18"))
        django.db.transaction.atomic().__enter__()
        room.after(task, SimpleNamespace(id="18"), None)
        print(django.db.connection.in_atomic_block)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stdout == "False\n", done.stderr
    assert "left behind: atomic left" in done.stderr
    assert "Traceback" not in done.stderr
