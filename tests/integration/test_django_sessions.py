"""Django keeps its connections between tasks as its settings say, and they are right."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from django_project import SETTINGS, Project
from services import Service
from sqlalchemy import create_engine, text

TASKS = """
    import os
    from celery import shared_task
    from celery.exceptions import SoftTimeLimitExceeded
    from django.conf import settings
    from django.db import IntegrityError, connection, transaction
    from celery_resilience import ResilientTask

    def task(**options):
        base = {} if settings.IS_PLAIN else {"base": ResilientTask}
        return shared_task(**base, **options)

    def ask(sql):
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0] if cursor.description else None

    @task()
    def backend():
        return ask("SELECT pg_backend_pid()")

    @task()
    def says(sql):
        return ask(sql)

    @task()
    def save(name):
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO names (name) VALUES (%s)", [name])
        return name

    @task()
    def leave_atomic():
        transaction.atomic().__enter__()
        ask("SELECT 1")

    @task()
    def leave_autocommit_off():
        transaction.set_autocommit(False)
        save.run("lost")

    @task()
    def swallow_in_a_transaction():
        transaction.set_autocommit(False)
        try:
            ask("SELECT 1 / 0")
        except Exception:
            pass

    @task()
    def fail_in_atomic():
        with transaction.atomic():
            save.run("ghost")
            raise ValueError("no")

    @task(soft_time_limit=1)
    def slow():
        with transaction.atomic():
            ask("SELECT pg_sleep(60) /* abandoned */")

    @task()
    def fork():
        before = backend.run()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write, str(backend.run()).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as pipe:
            return [before, int(pipe.read() or 0), backend.run()]
    """

SEND = """
    import json
    from shop import tasks

    def done(name, *args):
        result = getattr(tasks, name).delay(*args)
        value = result.get(timeout=40, propagate=False)
        if isinstance(value, Exception):
            return f"{type(value).__name__}: {value}"
        return value

    def sent(work):
        print(json.dumps(work))
    """


class Shop:
    """
    A Django project with a worker, on a PostgreSQL database of its own.

    Args:
        database: Options of the connection.
        settings: Others.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        broker: str,
        *,
        is_plain: bool,
        database: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        self.url = url
        parts = urlsplit(url)
        self.settings = {
            "DATABASES": {
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": parts.path[1:],
                    "USER": parts.username,
                    "HOST": parts.hostname,
                    "PORT": parts.port,
                    **database,
                }
            },
            "IS_PLAIN": is_plain,
            "CELERY_BROKER_URL": broker,
            "CELERY_BROKER_TRANSPORT_OPTIONS": {"global_keyprefix": f"{folder.name}:"},
            "CELERY_RESULT_BACKEND": broker[:-1] + "1",
            **settings,
        }
        source = SETTINGS
        if is_plain:
            source = source.replace(', "celery_resilience.django"', "")
            source = source.replace("CELERY_RESILIENCE_STORE_URL", "NOTHING")
        self.project = Project(folder / "project", tasks=TASKS, settings=source)

    def run(self, *lines: str) -> list[Any]:
        """What each expression gives, evaluated in a process that sends."""
        listed = ", ".join(f"({line})" for line in lines)
        ran = self.project.script(
            f"{SEND_LINES}\nsent([{listed}])", settings=self.settings
        )
        assert ran.returncode == 0, ran.stderr
        found: list[Any] = json.loads(ran.stdout)
        return found

    @property
    def log(self) -> str:
        """What its worker has logged."""
        return (self.project.folder / "worker.log").read_text()

    def rows(self, words: str) -> list[Any]:
        """What a query finds."""
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            found = connection.execute(text(words))
            rows = [tuple(row) for row in found] if found.returns_rows else []
        engine.dispose()
        return rows

    def names(self) -> list[str]:
        """The rows that are there."""
        return [name for (name,) in self.rows("SELECT name FROM names ORDER BY id")]


SEND_LINES = "\n".join(line.removeprefix("    ") for line in SEND.splitlines())

ShopMaker = Callable[..., contextlib.AbstractContextManager[Shop]]


@pytest.fixture
def open_shop(servers: Callable[[str], Service], tmp_path: Path) -> ShopMaker:
    """Makes shops with a worker each."""

    @contextlib.contextmanager
    def make(
        *flags: str,
        is_plain: bool = False,
        database: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Iterator[Shop]:
        server = servers("postgresql").url
        name = f"d{uuid4().hex[:12]}"
        shop = Shop(
            tmp_path / name,
            server.rpartition("/")[0] + f"/{name}",
            servers("redis").url,
            is_plain=is_plain,
            database=database or {},
            settings=settings,
        )
        engine = create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        shop.rows("CREATE TABLE names (id serial PRIMARY KEY, name text)")
        with shop.project.worker(*flags, settings=shop.settings):
            yield shop

    return make


REUSE = {"CELERY_DB_REUSE_MAX": 1000}
KEPT = {"CONN_MAX_AGE": 600}


def test_connections_are_kept_as_django_says(open_shop: ShopMaker) -> None:
    """CONN_MAX_AGE keeps one for the next task, 0 keeps none; plain Celery keeps none."""
    asks = ["done('backend')"] * 4
    with open_shop(database=KEPT) as shop:
        kept = shop.run(*asks)
    with open_shop() as shop:
        closed = shop.run(*asks)
    with open_shop(is_plain=True, database=KEPT) as shop:
        plain = shop.run(*asks)

    assert len(set(kept)) == 1
    assert len(set(closed)) == 4
    assert len(set(plain)) == 4


def test_a_killed_connection_that_is_reused_fails_no_task(open_shop: ShopMaker) -> None:
    """With CELERY_DB_REUSE_MAX it fails each of the next 999 of plain Celery's."""
    for is_plain in (False, True):
        with open_shop(is_plain=is_plain, database=KEPT, **REUSE) as shop:
            (pid,) = shop.run("done('backend')")
            shop.rows(f"SELECT pg_terminate_backend({pid})")
            found = shop.run(*["done('backend')"] * 10)

        failed = [one for one in found if isinstance(one, str)]
        assert len(failed) == (10 if is_plain else 0), found


@pytest.mark.parametrize(
    "leave", ["leave_atomic", "leave_autocommit_off", "swallow_in_a_transaction"]
)
def test_a_transaction_that_is_left_harms_nobody(
    open_shop: ShopMaker, leave: str
) -> None:
    """The next task's row is saved; of plain Celery it is lost, or the task fails."""
    for is_plain in (False, True):
        with open_shop(is_plain=is_plain, database=KEPT, **REUSE) as shop:
            shop.run(f"done('{leave}')", "done('save', 'mine')")
            saved = shop.names()
            log = shop.log

        assert saved == ([] if is_plain else ["mine"])
        told = [line for line in log.splitlines() if "left behind" in line]
        if not is_plain:
            assert len(told) == 1
            assert f"shop.tasks.{leave}[" in told[0]
            assert "tasks.py:" in told[0]


def test_an_atomic_that_is_left_closes_no_connection_for_ever(
    open_shop: ShopMaker,
) -> None:
    """With Celery's defaults, every later task of plain Celery's fails."""
    for is_plain in (False, True):
        with open_shop(is_plain=is_plain) as shop:
            found = shop.run("done('leave_atomic')", *["done('save', 'mine')"] * 3)
            saved = shop.names()

        assert saved == ([] if is_plain else ["mine"] * 3), found


def test_strict_fails_the_leaker(open_shop: ShopMaker) -> None:
    """And nobody else; a task that fails in `atomic()` leaves nothing."""
    with open_shop(database=KEPT, CELERY_RESILIENCE_SESSIONS="strict") as shop:
        leaker, failed, saved = shop.run(
            "done('leave_atomic')", "done('fail_in_atomic')", "done('save', 'mine')"
        )

        assert leaker.startswith("LeftBehind: the task left behind: atomic left")
        assert failed.startswith("ValueError")
        assert saved == "mine"
        assert shop.names() == ["mine"]


def test_a_pool_is_kept_and_right(open_shop: ShopMaker) -> None:
    """psycopg's pool lives between tasks, and gives nobody a dead connection."""
    pool = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 1}}}
    for is_plain in (False, True):
        with open_shop(is_plain=is_plain, database=pool) as shop:
            kept = shop.run(*["done('backend')"] * 4)
            shop.rows(f"SELECT pg_terminate_backend({kept[-1]})")
            found = shop.run(
                "done('backend')",
                "done('leave_atomic')",
                "done('save', 'mine')",
                "done('backend')",
            )

            assert (len(set(kept)) == 1) is not is_plain
            if not is_plain:
                assert not [one for one in found[:1] + found[3:] if type(one) is str]
                assert shop.names() == ["mine"]


def test_what_a_session_has_set_is_gone(open_shop: ShopMaker) -> None:
    """A kept connection has nothing of the task before; with plain reuse it has."""
    shown = "done('says', 'SHOW statement_timeout')"
    locks = (
        """done('says', "SELECT count(*) FROM pg_locks WHERE locktype='advisory'")"""
    )
    for is_plain in (False, True):
        with open_shop(is_plain=is_plain, database=KEPT, **REUSE) as shop:
            found = shop.run(
                """done('says', "SET statement_timeout = '77s'")""",
                shown,
                "done('says', 'SELECT pg_advisory_lock(7)')",
                locks,
            )

        assert (found[1], found[3]) == (("77s", 1) if is_plain else ("0", 0)), found


def test_a_query_cut_off_by_a_soft_limit_is_cancelled(open_shop: ShopMaker) -> None:
    """Within `atomic()`, and the next task is right."""
    abandoned = """SELECT pid FROM pg_stat_activity WHERE state = 'active'
        AND query LIKE '%abandoned%' AND pid != pg_backend_pid()"""
    for is_plain in (False, True):
        with open_shop(is_plain=is_plain, database=KEPT) as shop:
            (cut,) = shop.run("done('slow')")

            assert cut.startswith("SoftTimeLimitExceeded")
            assert bool(shop.rows(abandoned)) is is_plain
            (saved,) = shop.run("done('save', 'mine')")
            assert saved == "mine"


def test_a_tasks_own_fork_has_connections_of_its_own(open_shop: ShopMaker) -> None:
    """The child's is another backend's, and the parent keeps its own."""
    with open_shop(database=KEPT) as shop:
        ((before, forked, after),) = shop.run("done('fork')")

    assert before == after
    assert forked not in (0, before)


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_every_pool_is_right(open_shop: ShopMaker, pool: str) -> None:
    """A transaction that is left, and rows that are saved after it."""
    with open_shop(f"--pool={pool}", database=KEPT) as shop:
        shop.run("done('leave_atomic')", "done('save', 'mine')")

        assert shop.names() == ["mine"]
