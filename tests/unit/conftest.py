"""Databases for the unit tests, and how much hypothesis tries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from kombu import pools
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from celery_resilience.batches.redis_store import RedisCheckpointStore
from celery_resilience.batches.sql_store import SqlCheckpointStore
from celery_resilience.batches.store import CheckpointStore
from celery_resilience.crashes.redis_store import RedisStartStore
from celery_resilience.crashes.sql_store import SqlStartStore
from celery_resilience.crashes.store import StartStore
from celery_resilience.failed.redis_store import RedisFailedTaskStore
from celery_resilience.failed.sql_store import SqlFailedTaskStore
from celery_resilience.failed.store import FailedTaskStore
from celery_resilience.idempotency.redis_store import LIMITS, RedisKeyStore
from celery_resilience.idempotency.sql_store import SqlKeyStore
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.shelf.redis_store import RedisShelfStore
from celery_resilience.shelf.sql_store import SqlShelfStore
from celery_resilience.shelf.store import ShelfStore
from celery_resilience.stores.redis import RedisServer
from celery_resilience.stores.sql import SqlDatabase

# No deadline: two cores are shared with servers, and a slow example is no bug.
settings.register_profile("unit", max_examples=80, deadline=None)
settings.load_profile("unit")

_numbers = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def no_connections_of_others() -> None:
    """
    A forked process would close what another file of tests has left open in this one.

    kombu waits for the answer of a BRPOP there, which this process has had.
    """
    pools.reset()


MakeUrl = Callable[[], str]


@pytest.fixture(scope="session")
def postgresql_url(servers: Any) -> MakeUrl:
    """Makes databases on one private PostgreSQL, each empty."""
    return lambda: empty_database(servers("postgresql").url)


@pytest.fixture(scope="session")
def mariadb_url(servers: Any) -> MakeUrl:
    """Makes databases on one private MariaDB, each empty."""
    return lambda: empty_database(servers("mariadb").url)


def empty_database(server_url: str) -> str:
    """The URL of a new database on a server."""
    name = f"unit{next(_numbers)}"
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return str(make_url(server_url).set(database=name))


SQL_KINDS = ("sqlite", "postgresql", "mariadb")


def _make_url_of(kind: str, request: Any) -> MakeUrl:
    if kind == "sqlite":
        factory = request.getfixturevalue("tmp_path_factory")
        folder: Path = factory.mktemp("sqlite")
        return lambda: f"sqlite:///{folder}/{next(_numbers)}.sqlite3"
    found: MakeUrl = request.getfixturevalue(f"{kind}_url")
    return found


@pytest.fixture(scope="session", params=SQL_KINDS)
def make_url_of_kind(request: Any) -> MakeUrl:
    """Makes URLs of empty databases; every test runs on each kind."""
    return _make_url_of(request.param, request)


@pytest.fixture(scope="module")
def database(make_url_of_kind: MakeUrl) -> Iterator[SqlDatabase]:
    """One database for a file of tests; each test has a namespace of its own."""
    database = SqlDatabase(make_url_of_kind())
    yield database
    database.close()


class Backend:
    """
    Every room's store in one server or database.

    Args:
        url: Of Redis or of a database.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened: list[Any] = []

    def failed(self, namespace: str) -> FailedTaskStore:
        """The failed tasks of an app."""
        if self._url.startswith("redis"):
            return RedisFailedTaskStore(self._redis(namespace))
        return SqlFailedTaskStore(self._database(), namespace)

    def starts(self, namespace: str) -> StartStore:
        """The starts of an app."""
        if self._url.startswith("redis"):
            return RedisStartStore(self._redis(namespace), keep_s=3_600)
        return SqlStartStore(self._database(), namespace)

    def keys(self, namespace: str) -> KeyStore:
        """The idempotency keys of an app."""
        if self._url.startswith("redis"):
            return RedisKeyStore(self._redis(namespace, **LIMITS))
        return SqlKeyStore(self._database(), namespace)

    def checkpoints(self, namespace: str) -> CheckpointStore:
        """The places that the tasks of an app have come to."""
        if self._url.startswith("redis"):
            return RedisCheckpointStore(self._redis(namespace))
        return SqlCheckpointStore(self._database(), namespace)

    def shelf(self, namespace: str) -> ShelfStore:
        """The snoozed messages of an app that wait."""
        if self._url.startswith("redis"):
            return RedisShelfStore(self._redis(namespace))
        return SqlShelfStore(self._database(), namespace)

    def close(self) -> None:
        """Close every connection."""
        for opened in self._opened:
            opened.close()

    def _redis(self, namespace: str, **limits: float) -> RedisServer:
        server = RedisServer(self._url, namespace, **limits)
        self._opened.append(server)
        return server

    def _database(self) -> SqlDatabase:
        if not self._opened:
            self._opened.append(SqlDatabase(self._url))
        database: SqlDatabase = self._opened[0]
        return database


@pytest.fixture(scope="module", params=[*SQL_KINDS, "redis"])
def backend(request: Any) -> Iterator[Backend]:
    """One backend of each kind for a file; each test has a namespace of its own."""
    if request.param == "redis":
        url = request.getfixturevalue("servers")("redis").url
    else:
        url = _make_url_of(request.param, request)()
    backend = Backend(url)
    yield backend
    backend.close()


#: Nothing answers there.
AWAY = (
    *("postgresql://h@127.0.0.1:9/db", "mysql://h@127.0.0.1:9/db"),
    "redis://127.0.0.1:9/0",
)


@pytest.fixture(params=AWAY, ids=["postgresql", "mysql", "redis"])
def backend_that_is_away(request: Any) -> Iterator[Backend]:
    """A backend that nobody can reach."""
    backend = Backend(request.param)
    yield backend
    backend.close()
