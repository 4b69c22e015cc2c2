"""Tasks of the test app that use a database as many apps do: one scoped session.

Each leaves behind what its name says.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded
from retrying import SOON_S
from sqlalchemy import Integer, String, create_engine, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import (
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from celery_resilience import Resilience


class Base(DeclarativeBase):
    """The tables of the tests."""


class Row(Base):
    """One effect."""

    __tablename__ = "session_rows"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)

    def __json__(self) -> str:
        """For kombu, which asks the object after its task has ended."""
        return self.name


def register(
    app: Any, base: Any, note: Any, conf: dict[str, Any], prefix: str = ""
) -> None:
    """
    Give *app* the tasks below.

    Args:
        conf: `fleet_database`: the URL; `fleet_engine`: options of the engine;
            `fleet_connects`: connect where the app is imported, before any fork;
            `fleet_is_async`: the tasks of `register_async` instead.
        prefix: Of the tasks' names, where the app has them for several databases.
    """
    url = conf["fleet_database"]
    if conf.get("fleet_is_async"):
        register_async(app, base, conf, prefix)
        return
    engine = create_engine(url, **conf.get("fleet_engine", {}))
    session = scoped_session(sessionmaker(engine))
    if conf.get("fleet_connects"):
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def task(name: str, **options: Any) -> Any:
        return app.task(
            base=base, bind=True, shared=False, name=prefix + name, **options
        )

    def backend() -> int:
        return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())

    def terminate(pid: int) -> None:
        other = create_engine(url)
        with other.begin() as connection:
            connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        other.dispose()

    @task(name="s.save")
    def save(self: Any, name: str) -> int:
        session.add(Row(name=name))
        session.commit()
        return os.getpid()

    @task(name="s.names")
    def names(self: Any) -> list[str]:
        return list(session.scalars(select(Row.name).order_by(Row.id)))

    @task(name="s.add_and_fail")
    def add_and_fail(self: Any, name: str, flushes: bool) -> None:
        session.add(Row(name=name))
        if flushes:
            session.flush()
        raise ValueError("after the row, before the commit")

    @task(name="s.add_and_return")
    def add_and_return(self: Any, name: str) -> None:
        session.add(Row(name=name))
        session.flush()

    @task(name="s.swallow")
    def swallow(self: Any, name: str) -> None:
        session.add(Row(name=name))
        try:
            session.commit()
        except IntegrityError:
            note("swallowed", self.request.id)

    @task(name="s.backend")
    def task_backend(self: Any) -> int:
        return backend()

    @task(name="s.killed_in_query")
    def killed_in_query(self: Any) -> None:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    @task(name="s.killed_before_commit")
    def killed_before_commit(self: Any, name: str) -> None:
        session.add(Row(name=name))
        session.flush()
        terminate(backend())
        session.commit()

    @task(name="s.killed_in_commit")
    def killed_in_commit(self: Any, name: str) -> None:
        # Its COMMIT waits for a deferred trigger, and tells so by a lock.
        for statement in _SLOW_COMMIT:
            session.execute(text(statement))
        session.add(Row(name=name))
        session.flush()
        pid = backend()

        def kill() -> None:
            other = create_engine(url, isolation_level="AUTOCOMMIT")
            with other.connect() as connection:
                while not connection.execute(text(_COMMITS), {"pid": pid}).scalar():
                    time.sleep(0.01)
            terminate(pid)
            other.dispose()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            session.commit()
        finally:
            killer.join()

    @task(name="s.killed_after_commit")
    def killed_after_commit(self: Any, name: str) -> None:
        session.add(Row(name=name))
        pid = backend()
        session.commit()
        terminate(pid)

    @task(name="s.slow", soft_time_limit=1)
    def slow(self: Any, how: str = "") -> str:
        try:
            session.execute(text("SELECT pg_sleep(60) /* abandoned */"))
        except SoftTimeLimitExceeded:
            if how == "goes_on":
                session.rollback()
                return str(backend())
            raise
        return ""

    @task(name="s.slow_mysql", soft_time_limit=1)
    def slow_mysql(self: Any) -> None:
        session.execute(text("SELECT SLEEP(60) /* abandoned */"))

    @task(name="s.changes")
    def changes(self: Any, statement: str) -> None:
        session.execute(text(statement))
        session.commit()

    @task(name="s.asks")
    def asks(self: Any, statement: str) -> Any:
        found = session.execute(text(statement)).scalar()
        session.rollback()
        return found

    @task(name="s.selects")
    def selects(self: Any, number: int) -> int:
        for count in range(100):
            asked = text("SELECT CAST(:number AS INTEGER) * 1000 + :count")
            found = session.execute(asked, {"number": number, "count": count})
            assert found.scalar_one() == number * 1000 + count
        session.commit()
        return os.getpid()

    @task(name="s.forks")
    def forks(self: Any) -> list[int]:
        before = backend()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.write(write, str(backend()).encode())
                status = 0
            finally:
                os._exit(status)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as pipe:
            return [before, int(pipe.read() or 0), backend()]

    @task(name="s.raw_left")
    def raw_left(self: Any, keep: str = "") -> None:
        connection = engine.connect()
        connection.execute(text("SELECT 1"))
        _kept.append(connection)

    def opened(scope: Any) -> Any:
        return Resilience(app).resource(
            lambda: note(f"open {scope}", os.getpid()),
            lambda _: note(f"close {scope}", os.getpid()),
            scope=scope,
        )

    if base is not Task:
        of_task, of_child = opened("task"), opened("child")

    @task(name="s.resources")
    def resources(self: Any) -> None:
        for resource in (of_task, of_child, of_task, of_child):
            resource()
        note("body", os.getpid())
        raise ValueError("all the same")

    @task(name="s.nests")
    def nests(self: Any, name: str) -> None:
        session.add(Row(name=name))
        session.flush()
        if "," in name:
            return
        app.tasks[f"{prefix}s.add_and_return"].apply(args=(f"{name}, applied",))
        app.tasks[f"{prefix}s.add_and_return"](f"{name}, called")
        self.apply(args=(f"{name}, itself",))
        session.commit()

    @task(name="s.returns_row")
    def returns_row(self: Any, name: str) -> Row:
        row = Row(name=name)
        session.add(row)
        session.commit()
        return row

    @task(name="s.returns_read")
    def returns_read(self: Any, name: str) -> Any:
        return session.scalar(select(Row).where(Row.name == name))

    class Handled(base):  # type: ignore[misc]
        """A task that saves how it failed."""

        def on_failure(self, exc: Any, task_id: Any, *_: Any) -> None:
            session.add(Row(name=f"failed: {exc}"))
            session.commit()

    @app.task(base=Handled, name=f"{prefix}s.handled", shared=False)
    def handled(name: str) -> None:
        session.add(Row(name=name))
        session.flush()
        raise ValueError("no")

    @task(name="s.thread")
    def thread(self: Any, name: str) -> None:
        ended = []

        def other() -> None:
            session.add(Row(name=name))
            session.commit()
            session.remove()
            ended.append(True)

        session.execute(text("SELECT 1"))
        running = threading.Thread(target=other)
        running.start()
        running.join()
        session.rollback()
        assert ended


def register_async(app: Any, base: Any, conf: dict[str, Any], prefix: str) -> None:
    """Tasks of an asynchronous engine, with the loop that the task asks for."""
    engine = create_async_engine(conf["fleet_database"])

    async def backend() -> int:
        async with engine.connect() as connection:
            asked = await connection.execute(text("SELECT pg_backend_pid()"))
            return int(asked.scalar_one())

    def task(name: str, **options: Any) -> Any:
        return app.task(
            base=base, bind=True, shared=False, name=prefix + name, **options
        )

    @task(name="a.asyncio_run")
    def asyncio_run(self: Any) -> int:
        return asyncio.run(backend())

    @task(name="a.run")
    def run(self: Any) -> int:
        pid: int = self.resilience.run(backend())
        return pid

    @task(name="a.body")
    async def body(self: Any) -> int:
        return await backend()

    @task(name="a.retried", autoretry_for=(ValueError,), default_retry_delay=SOON_S)
    async def retried(self: Any) -> int:
        if self.request.retries == 0:
            raise ValueError("again")
        return await backend()

    session = async_scoped_session(
        async_sessionmaker(engine), scopefunc=lambda: "the only one"
    )

    @task(name="a.add_and_fail")
    async def add_and_fail(self: Any, name: str) -> None:
        session.add(Row(name=name))
        await session.flush()
        raise ValueError("after the row, before the commit")

    @task(name="a.save")
    async def save(self: Any, name: str) -> None:
        session.add(Row(name=name))
        await session.commit()

    @task(name="a.slow", soft_time_limit=1)
    async def slow(self: Any) -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(60) /* abandoned */"))


#: Let the COMMIT of this transaction last; without it there is neither of them.
_SLOW_COMMIT = (
    """CREATE FUNCTION waits() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$""",
    """CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON session_rows
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION waits()""",
)

#: Whether a backend is in its COMMIT.
_COMMITS = """SELECT count(*) FROM pg_stat_activity
    WHERE pid = :pid AND state = 'active' AND query = 'COMMIT'"""

#: Connections that nobody gives back.
_kept: list[Any] = []
