"""Killed backends, abandoned queries, forks and event loops: connections that live."""

from __future__ import annotations

import contextlib

import pytest
from celery.exceptions import TimeoutError as CeleryTimeout
from session_fleets import (
    ABANDONED,
    BothMaker,
    Databases,
    Shelves,
    eventually_none,
    names,
    rows,
    statement,
)

ASYNCHRONOUS = ("asyncpg", "psycopg")

#: The databases of the tests below; see `Shelves`.
SHELVES = {
    **{name: {"kind": "postgresql"} for name in ("idle", "within", "query", "forks")},
    "idle-mariadb": {"kind": "mariadb"},
    "query-mariadb": {"kind": "mariadb"},
    **{
        f"async-{driver}": {
            "kind": "postgresql",
            "driver": driver,
            "fleet_is_async": True,
        }
        for driver in ASYNCHRONOUS
    },
}


def test_a_killed_backend_is_noticed_before_it_is_used(shelf: Shelves) -> None:
    """Killed between tasks, no task fails; of plain Celery, each one does."""
    for is_plain in (False, True):
        mine = shelf("idle", is_plain=is_plain)
        first = mine.outcome("s.backend")
        rows(mine.url, f"SELECT pg_terminate_backend({first})")
        found = [mine.outcome("s.backend") for _ in range(3)]

        failures = [one for one in found if isinstance(one, Exception)]
        assert len(failures) == (3 if is_plain else 0), failures
        assert first not in found


def test_a_killed_connection_of_mariadb_is_noticed_too(shelf: Shelves) -> None:
    """Where the driver's own state does not tell."""
    for is_plain in (False, True):
        mine = shelf("idle-mariadb", is_plain=is_plain)
        first = mine.outcome("s.asks", "SELECT connection_id()")
        statement(mine.url, f"KILL {first}")
        found = mine.outcome("s.asks", "SELECT connection_id()")

        assert isinstance(found, Exception) is is_plain


def test_a_backend_killed_within_a_task_harms_that_task_alone(shelf: Shelves) -> None:
    """In a query, before, in and after the commit; each time the next task is right."""
    for is_plain in (False, True):
        mine = shelf("within", is_plain=is_plain)
        in_query = mine.outcome("s.killed_in_query")
        after_query = mine.outcome("s.save", "after the query")
        before_commit = mine.outcome("s.killed_before_commit", "half")
        later = mine.outcome("s.save", "before the commit")
        in_commit = mine.outcome("s.killed_in_commit", "three quarters")
        after_commit = mine.outcome("s.save", "in the commit")
        committed = mine.outcome("s.killed_after_commit", "whole")
        at_last = mine.outcome("s.save", "at last")

        assert isinstance(in_query, Exception)
        assert isinstance(before_commit, Exception)
        assert isinstance(in_commit, Exception)
        well = [after_query, later, after_commit, committed, at_last]
        failures = [one for one in well if isinstance(one, Exception)]
        if is_plain:
            assert len(failures) == len(well)
            assert names(mine.url) == []
        else:
            assert "terminating connection" in str(in_commit)
            assert failures == []
            assert names(mine.url) == [
                "after the query",
                "before the commit",
                "in the commit",
                "whole",
                "at last",
            ]


def test_a_query_cut_off_by_a_soft_limit_is_cancelled_on_the_server(
    shelf: Shelves,
) -> None:
    """It is gone when the result is there, and the next task is right."""
    for is_plain in (False, True):
        mine = shelf("query", is_plain=is_plain)
        cut = mine.outcome("s.slow")

        assert type(cut).__name__ == "SoftTimeLimitExceeded", cut
        if is_plain:
            assert rows(mine.url, ABANDONED)
            assert isinstance(mine.outcome("s.backend"), Exception)
        else:
            eventually_none(mine.url, ABANDONED)
            assert isinstance(mine.outcome("s.backend"), int)
            assert isinstance(mine.outcome("s.slow", "goes_on"), str)


def test_a_query_cut_off_is_cancelled_on_mariadb_too(shelf: Shelves) -> None:
    """Where the driver only closes its socket, and the server goes on."""
    abandoned = """SELECT id FROM information_schema.processlist
        WHERE info LIKE '%abandoned%' AND id != connection_id()"""

    for is_plain in (False, True):
        mine = shelf("query-mariadb", is_plain=is_plain)
        cut = mine.outcome("s.slow_mysql")

        assert type(cut).__name__ == "SoftTimeLimitExceeded", cut
        if is_plain:
            assert rows(mine.url, abandoned)
        else:
            eventually_none(mine.url, abandoned)
            assert mine.outcome("s.asks", "SELECT 1") == 1


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_an_engine_connected_before_the_fork_is_each_childs_own(
    both_of: BothMaker, database: Databases, driver: str
) -> None:
    """Eight of eight tasks are right; of plain Celery, hardly one is."""
    both = both_of(
        lambda: database("postgresql", driver),
        fleet_connects=True,
        concurrency=4,
        task_time_limit=20,
    )

    for is_plain in (False, True):
        fleet, _, _ = both(is_plain=is_plain)
        sent = [fleet.send("s.selects", number) for number in range(8)]
        if is_plain:
            found = [None] * 8
            with contextlib.suppress(CeleryTimeout):
                # Some hang.
                found = [one.get(timeout=3, propagate=False) for one in sent]
            assert sum(isinstance(one, int) for one in found) < 8
        else:
            found = [one.get(timeout=30, propagate=False) for one in sent]
            assert all(isinstance(one, int) for one in found), found


def test_a_tasks_own_fork_has_connections_of_its_own(shelf: Shelves) -> None:
    """Three asks, and the child's is another backend's; the parent keeps its own."""
    before, forked, after = shelf("forks").outcome("s.forks")

    assert before == after
    assert forked not in (0, before)


@pytest.mark.parametrize("driver", ASYNCHRONOUS)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_asynchronous_engine_keeps_its_connections(
    shelf: Shelves, driver: str, pool: str
) -> None:
    """On the loop of `self.resilience.run`, and of an `async def` body, one backend."""
    mine = shelf(f"async-{driver}", pool=pool)
    kept = [mine.outcome(name) for name in ("a.run", "a.body", "a.retried")]
    mine.outcome("a.add_and_fail", "ghost")
    mine.outcome("a.save", "mine")
    own = [mine.outcome("a.asyncio_run") for _ in range(3)]

    assert len(set(kept)) == 1, kept
    assert all(isinstance(one, int) for one in own), own
    assert names(mine.url.replace("+asyncpg", "+psycopg")) == ["mine"]


def test_a_pool_of_asyncpg_survives_a_loop_for_each_task(shelf: Shelves) -> None:
    """Where the tasks call `asyncio.run`; plain Celery's second task fails."""
    for is_plain in (False, True):
        mine = shelf("async-asyncpg", is_plain=is_plain)
        found = [mine.outcome("a.asyncio_run") for _ in range(3)]

        assert all(isinstance(one, int) for one in found) is not is_plain, found


@pytest.mark.parametrize("driver", ASYNCHRONOUS)
def test_an_asynchronous_query_cut_off_is_cancelled(
    shelf: Shelves, driver: str
) -> None:
    """The coroutine is cancelled, and its driver tells the server."""
    mine = shelf(f"async-{driver}")
    cut = mine.outcome("a.slow")

    assert type(cut).__name__ == "SoftTimeLimitExceeded", cut
    eventually_none(mine.url.replace("+asyncpg", "+psycopg"), ABANDONED)
    assert isinstance(mine.outcome("a.run"), int)
