"""Fleets that use a database, with plain ones beside them."""

from __future__ import annotations

from collections.abc import Callable
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
            assert "failed (told once)" not in worker.text, worker.text
            assert "could not be" not in worker.text, worker.text


BothMaker = Callable[..., Both]


def outcome(fleet: Fleet, name: str, *args: Any) -> Any:
    """What a task returns, or the exception that it raises."""
    result = fleet.send(name, *args)
    return result.get(timeout=30, propagate=False)
