"""Fleets that use a database, with plain ones beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import eventually
from sqlalchemy import Engine, create_engine, text

Databases = Callable[..., str]

#: Finds what a body was cut off in, and the server goes on with.
ABANDONED = """SELECT pid FROM pg_stat_activity
    WHERE state = 'active' AND query LIKE '%abandoned%' AND pid != pg_backend_pid()
    AND datname = current_database()"""


def statement(url: str, words: str) -> None:
    """Execute one outside any transaction."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(words))
    engine.dispose()


def rows(url: str, words: str) -> list[Any]:
    """What a query finds."""
    engine: Engine = create_engine(url)
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(text(words))]
    engine.dispose()
    return found


def eventually_none(url: str, words: str) -> None:
    """A query finds nothing, soon."""
    eventually(lambda: not rows(url, words), within_s=2, what=words)


def names(url: str) -> list[str]:
    """The rows that are there."""
    return [name for (name,) in rows(url, "SELECT name FROM session_rows ORDER BY id")]


def check_log(worker: Worker) -> None:
    """Nothing of ours has failed unseen."""
    assert "failed (told once)" not in worker.text, worker.text
    assert "could not be" not in worker.text, worker.text


class Both:
    """A resilient fleet with a worker, and a plain one, on databases of their own."""

    def __init__(
        self, make_fleet: FleetMaker, url: Callable[[], str], **conf: Any
    ) -> None:
        self._make = make_fleet
        self._url = url
        self._pool = conf.pop("pool", "prefork")
        self._concurrency = conf.pop("concurrency", 1)
        self._conf = conf
        self.workers: list[Worker] = []

    def __call__(self, *, is_plain: bool = False) -> tuple[Fleet, Worker, str]:
        url = self._url()
        fleet = self._make("redis", is_plain=is_plain, fleet_database=url, **self._conf)
        worker = fleet.worker(pool=self._pool, concurrency=self._concurrency)
        self.workers.append(worker)
        return fleet, worker, url

    def check(self) -> None:
        """Nothing of ours has failed unseen."""
        for worker in self.workers:
            check_log(worker)


BothMaker = Callable[..., Both]


def outcome(fleet: Fleet, name: str, *args: Any) -> Any:
    """What a task returns, or the exception that it raises."""
    result = fleet.send(name, *args)
    return result.get(timeout=30, propagate=False)


class Shelf:
    """
    One database, with its own tasks in a worker that several tests use.

    Attributes:
        url: Of the database.
    """

    def __init__(self, fleet: Fleet, worker: Worker, prefix: str, url: str) -> None:
        self.fleet = fleet
        self.worker = worker
        self.url = url
        self._prefix = prefix

    def outcome(self, name: str, *args: Any) -> Any:
        """What a task returns, or the exception that it raises."""
        return outcome(self.fleet, self._prefix + name, *args)

    def told(self) -> list[str]:
        """The log's lines on what its tasks have left behind."""
        told = f"task {self._prefix}"
        return [
            line
            for line in self.worker.text.splitlines()
            if "left behind" in line and told in line
        ]


class Shelves:
    """
    A resilient worker and a plain one, which several tests use.

    What one test's tasks leave behind is in a database, and in a session, of its own.

    Args:
        folder: For what the workers write.
        conf: Celery's settings for a fleet in a folder.
        words: Of each shelf by its name: `kind`, and perhaps `driver`, of its database;
            others are of `session_tasks.register`.
        new_database: Makes one, and returns its URL.
    """

    def __init__(
        self,
        folder: Path,
        conf: Callable[[Path], dict[str, Any]],
        words: dict[str, dict[str, Any]],
        new_database: Databases,
    ) -> None:
        self._folder = folder
        self._conf = conf
        self._words = words
        self._new_database = new_database
        self._workers: dict[tuple[bool, str], tuple[Fleet, Worker]] = {}

    def __call__(
        self, name: str, *, is_plain: bool = False, pool: str = "prefork"
    ) -> Shelf:
        if (is_plain, pool) not in self._workers:
            self._workers[is_plain, pool] = self._start(is_plain=is_plain, pool=pool)
        fleet, worker = self._workers[is_plain, pool]
        prefix = f"{name}."
        url = fleet.conf["fleet_databases"][prefix]["fleet_database"]
        return Shelf(fleet, worker, prefix, url)

    def _start(self, *, is_plain: bool, pool: str) -> tuple[Fleet, Worker]:
        folder = self._folder / f"{pool}{'-plain' if is_plain else ''}"
        databases = {}
        for name, words in self._words.items():
            more = dict(words)
            made = self._new_database(more.pop("kind"), more.pop("driver", "psycopg"))
            databases[f"{name}."] = {"fleet_database": made, **more}
        conf = {**self._conf(folder), "fleet_databases": databases}
        fleet = Fleet(folder, conf, is_plain=is_plain)
        return fleet, fleet.worker(pool=pool, concurrency=1)

    def close(self) -> None:
        """Nothing of ours has failed unseen; end them."""
        for fleet, _ in self._workers.values():
            fleet.close()
        for fleet, worker in self._workers.values():
            if not fleet.is_plain:
                check_log(worker)
