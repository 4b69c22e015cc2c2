"""Django keeps its connections between tasks as its settings say, and they are right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from celery import Celery
from django_project import SETTINGS, Project
from services import Service
from session_fleets import statement
from sqlalchemy import create_engine, text

TASKS = """
    import os
    from celery import shared_task
    from django.conf import settings
    from django.db import connections, transaction
    from celery_resilience import ResilientTask

    def task(**options):
        base = {} if settings.IS_PLAIN else {"base": ResilientTask}
        return shared_task(**base, **options)

    def ask(using, sql):
        with connections[using].cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchone()[0] if cursor.description else None

    @task()
    def backend(using):
        return ask(using, "SELECT pg_backend_pid()")

    @task()
    def says(using, sql):
        return ask(using, sql)

    @task()
    def save(using, name):
        with connections[using].cursor() as cursor:
            cursor.execute("INSERT INTO names (name) VALUES (%s)", [name])
        return name

    @task()
    def leave_atomic(using):
        transaction.atomic(using).__enter__()
        ask(using, "SELECT 1")

    @task()
    def leave_autocommit_off(using):
        transaction.set_autocommit(False, using)
        save.run(using, "lost")

    @task()
    def swallow_in_a_transaction(using):
        transaction.set_autocommit(False, using)
        try:
            ask(using, "SELECT 1 / 0")
        except Exception:
            pass

    @task()
    def fail_in_atomic(using):
        with transaction.atomic(using):
            save.run(using, "ghost")
            raise ValueError("no")

    @task(soft_time_limit=1)
    def slow(using):
        with transaction.atomic(using):
            ask(using, "SELECT pg_sleep(60) /* abandoned */")

    @task()
    def fork(using):
        before = backend.run(using)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(write, str(backend.run(using)).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as pipe:
            return [before, int(pipe.read() or 0), backend.run(using)]
    """

#: Options of a database whose connections Django keeps; and of those that Celery does.
KEPT = {"CONN_MAX_AGE": 600}
REUSE = {"CELERY_DB_REUSE_MAX": 1000}

LEAVES = ("leave_atomic", "leave_autocommit_off", "swallow_in_a_transaction")

#: The databases, with their options, and the other settings of the shops below. Each
#: shop has one worker, which several tests use, each with a database of its own.
SHOPS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "keeps": (
        {
            "default": KEPT,
            "query": KEPT,
            "fork": KEPT,
            "pool": {"OPTIONS": {"pool": {"min_size": 1, "max_size": 1}}},
        },
        {},
    ),
    "closes": ({"default": {}, "atomic": {}}, {}),
    "reuses": (
        dict.fromkeys(("default", "killed", "set", *LEAVES), KEPT),
        REUSE,
    ),
    "strict": ({"default": KEPT}, {"CELERY_RESILIENCE_SESSIONS": "strict"}),
}


class Shop:
    """
    A Django project with a worker, on PostgreSQL databases of its own.

    Args:
        urls: Of the databases, by Django's names for them.
        options: Of the connections, by these names.
        settings: Others.
    """

    def __init__(
        self,
        folder: Path,
        urls: dict[str, str],
        broker: str,
        *,
        is_plain: bool,
        options: dict[str, dict[str, Any]],
        settings: dict[str, Any],
    ) -> None:
        self._urls = urls
        prefix = {"global_keyprefix": f"{folder.name}:"}
        self.settings = {
            "DATABASES": {
                name: _of_django(url, options[name]) for name, url in urls.items()
            },
            "IS_PLAIN": is_plain,
            "CELERY_BROKER_URL": broker,
            "CELERY_BROKER_TRANSPORT_OPTIONS": prefix,
            "CELERY_RESULT_BACKEND": broker[:-1] + "1",
            **settings,
        }
        source = SETTINGS
        if is_plain:
            source = source.replace(', "celery_resilience.django"', "")
            source = source.replace("CELERY_RESILIENCE_STORE_URL", "NOTHING")
        self.project = Project(folder, tasks=TASKS, settings=source)
        self._app = Celery("shop", set_as_current=False)
        self._app.conf.update(
            broker_url=broker,
            broker_transport_options=prefix,
            result_backend=broker[:-1] + "1",
        )

    def close(self) -> None:
        """Close the connections of this process."""
        self._app.close()

    def done(self, name: str, using: str, *args: Any) -> Any:
        """What a task returns, or its exception in words."""
        sent = self._app.send_task(f"shop.tasks.{name}", (using, *args))
        value = sent.get(timeout=40, propagate=False)
        is_error = isinstance(value, Exception)
        return f"{type(value).__name__}: {value}" if is_error else value

    def told(self, name: str) -> list[str]:
        """The log's lines on what a task has left behind."""
        log = (self.project.folder / "worker.log").read_text()
        told = f"shop.tasks.{name}["
        return [
            line for line in log.splitlines() if "left behind" in line and told in line
        ]

    def rows(self, using: str, words: str) -> list[Any]:
        """What a query finds."""
        engine = create_engine(self._urls[using], isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            found = connection.execute(text(words))
            rows = [tuple(row) for row in found] if found.returns_rows else []
        engine.dispose()
        return rows

    def names(self, using: str) -> list[str]:
        """The rows that are there."""
        found = self.rows(using, "SELECT name FROM names ORDER BY id")
        return [name for (name,) in found]


def _of_django(url: str, options: dict[str, Any]) -> dict[str, Any]:
    parts = urlsplit(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path[1:],
        "USER": parts.username,
        "HOST": parts.hostname,
        "PORT": parts.port,
        **options,
    }


ShopMaker = Callable[..., Shop]


@pytest.fixture(scope="module")
def shop_of(
    servers: Callable[[str], Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ShopMaker]:
    """The shops of `SHOPS`, each with its worker, started when it is first asked for."""
    server = servers("postgresql").url
    made: dict[Any, Shop] = {}

    with contextlib.ExitStack() as stack:

        def get(kind: str, *flags: str, is_plain: bool = False) -> Shop:
            key = (kind, flags, is_plain)
            if key in made:
                return made[key]
            options, settings = SHOPS[kind]
            base = server.rpartition("/")[0]
            urls = {name: f"{base}/d{uuid4().hex[:12]}" for name in options}
            shop = made[key] = Shop(
                tmp_path_factory.mktemp("shop") / uuid4().hex[:12],
                urls,
                servers("redis").url,
                is_plain=is_plain,
                options=options,
                settings=settings,
            )
            for name, url in urls.items():
                statement(server, f"CREATE DATABASE {url.rpartition('/')[2]}")
                shop.rows(name, "CREATE TABLE names (id serial PRIMARY KEY, name text)")
            stack.callback(shop.close)
            worker = shop.project.worker(*flags, settings=shop.settings)
            stack.enter_context(worker)
            return shop

        yield get


def test_connections_are_kept_as_django_says(shop_of: ShopMaker) -> None:
    """CONN_MAX_AGE keeps one for the next task, 0 keeps none; plain Celery keeps none."""
    found = [
        {shop.done("backend", "default") for _ in range(4)}
        for shop in (
            shop_of("keeps"),
            shop_of("closes"),
            shop_of("keeps", is_plain=True),
        )
    ]

    assert [len(kept) for kept in found] == [1, 4, 4]


def test_a_killed_connection_that_is_reused_fails_no_task(shop_of: ShopMaker) -> None:
    """With CELERY_DB_REUSE_MAX it fails each of the next 999 of plain Celery's."""
    for is_plain in (False, True):
        shop = shop_of("reuses", is_plain=is_plain)
        pid = shop.done("backend", "killed")
        shop.rows("killed", f"SELECT pg_terminate_backend({pid})")
        found = [shop.done("backend", "killed") for _ in range(10)]

        failed = [one for one in found if isinstance(one, str)]
        assert len(failed) == (10 if is_plain else 0), found


@pytest.mark.parametrize("leave", LEAVES)
def test_a_transaction_that_is_left_harms_nobody(
    shop_of: ShopMaker, leave: str
) -> None:
    """The next task's row is saved; of plain Celery it is lost, or the task fails."""
    for is_plain in (False, True):
        shop = shop_of("reuses", is_plain=is_plain)
        shop.done(leave, leave)
        shop.done("save", leave, "mine")

        assert shop.names(leave) == ([] if is_plain else ["mine"])
        if not is_plain:
            (told,) = shop.told(leave)
            assert "tasks.py:" in told


def test_an_atomic_that_is_left_closes_no_connection_for_ever(
    shop_of: ShopMaker,
) -> None:
    """With Celery's defaults, every later task of plain Celery's fails."""
    for is_plain in (False, True):
        shop = shop_of("closes", is_plain=is_plain)
        shop.done("leave_atomic", "atomic")
        found = [shop.done("save", "atomic", "mine") for _ in range(3)]

        assert shop.names("atomic") == ([] if is_plain else ["mine"] * 3), found


def test_strict_fails_the_leaker(shop_of: ShopMaker) -> None:
    """And nobody else; a task that fails in `atomic()` leaves nothing."""
    shop = shop_of("strict")
    leaker = shop.done("leave_atomic", "default")
    failed = shop.done("fail_in_atomic", "default")
    saved = shop.done("save", "default", "mine")

    assert leaker.startswith("LeftBehind: the task left behind: atomic left")
    assert failed.startswith("ValueError")
    assert saved == "mine"
    assert shop.names("default") == ["mine"]


def test_a_pool_is_kept_and_right(shop_of: ShopMaker) -> None:
    """psycopg's pool lives between tasks, and gives nobody a dead connection."""
    for is_plain in (False, True):
        shop = shop_of("keeps", is_plain=is_plain)
        kept = [shop.done("backend", "pool") for _ in range(4)]
        shop.rows("pool", f"SELECT pg_terminate_backend({kept[-1]})")
        found = [
            shop.done("backend", "pool"),
            shop.done("leave_atomic", "pool"),
            shop.done("save", "pool", "mine"),
            shop.done("backend", "pool"),
        ]

        assert (len(set(kept)) == 1) is not is_plain
        if not is_plain:
            assert not [one for one in found[:1] + found[3:] if type(one) is str]
            assert shop.names("pool") == ["mine"]


def test_what_a_session_has_set_is_gone(shop_of: ShopMaker) -> None:
    """A kept connection has nothing of the task before; with plain reuse it has."""
    locks = """SELECT count(*) FROM pg_locks
        WHERE locktype = 'advisory' AND pid = pg_backend_pid()"""
    for is_plain in (False, True):
        shop = shop_of("reuses", is_plain=is_plain)
        shop.done("says", "set", "SET statement_timeout = '77s'")
        shown = shop.done("says", "set", "SHOW statement_timeout")
        shop.done("says", "set", "SELECT pg_advisory_lock(7)")
        held = shop.done("says", "set", locks)

        assert (shown, held) == (("77s", 1) if is_plain else ("0", 0))


def test_a_query_cut_off_by_a_soft_limit_is_cancelled(shop_of: ShopMaker) -> None:
    """Within `atomic()`, and the next task is right."""
    abandoned = """SELECT pid FROM pg_stat_activity WHERE state = 'active'
        AND query LIKE '%abandoned%' AND pid != pg_backend_pid()
        AND datname = current_database()"""
    for is_plain in (False, True):
        shop = shop_of("keeps", is_plain=is_plain)
        cut = shop.done("slow", "query")

        assert cut.startswith("SoftTimeLimitExceeded")
        assert bool(shop.rows("query", abandoned)) is is_plain
        assert shop.done("save", "query", "mine") == "mine"


def test_a_tasks_own_fork_has_connections_of_its_own(shop_of: ShopMaker) -> None:
    """The child's is another backend's, and the parent keeps its own."""
    before, forked, after = shop_of("keeps").done("fork", "fork")

    assert before == after
    assert forked not in (0, before)


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent"])
def test_every_pool_is_right(shop_of: ShopMaker, pool: str) -> None:
    """A transaction that is left, and rows that are saved after it."""
    shop = shop_of("keeps", f"--pool={pool}")
    shop.done("leave_atomic", "default")
    shop.done("save", "default", "mine")

    assert shop.names("default") == ["mine"]
