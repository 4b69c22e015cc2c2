"""Killed backends, abandoned queries, forks and event loops: connections that live."""

from __future__ import annotations

import contextlib

import pytest
from celery.exceptions import TimeoutError as CeleryTimeout
from session_fleets import (
    ABANDONED,
    BothMaker,
    Databases,
    eventually_none,
    names,
    outcome,
    rows,
    statement,
)


def test_a_killed_backend_is_noticed_before_it_is_used(
    both_of: BothMaker, database: Databases
) -> None:
    """Killed between tasks, no task fails; of plain Celery, each one does."""
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        first = outcome(fleet, "s.backend")
        rows(url, f"SELECT pg_terminate_backend({first})")
        found = [outcome(fleet, "s.backend") for _ in range(3)]

        failures = [one for one in found if isinstance(one, Exception)]
        assert len(failures) == (3 if is_plain else 0), failures
        assert first not in found


def test_a_killed_connection_of_mariadb_is_noticed_too(
    both_of: BothMaker, database: Databases
) -> None:
    """Where the driver's own state does not tell."""
    both = both_of(lambda: database("mariadb"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        first = outcome(fleet, "s.asks", "SELECT connection_id()")
        statement(url, f"KILL {first}")
        found = outcome(fleet, "s.asks", "SELECT connection_id()")

        assert isinstance(found, Exception) is is_plain


def test_a_backend_killed_within_a_task_harms_that_task_alone(
    both_of: BothMaker, database: Databases
) -> None:
    """In a query, before the commit, and after it; each time the next task is right."""
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        in_query = outcome(fleet, "s.killed_in_query")
        after_query = outcome(fleet, "s.save", "after the query")
        in_commit = outcome(fleet, "s.killed_before_commit", "half")
        after_commit = outcome(fleet, "s.save", "after the commit")
        committed = outcome(fleet, "s.killed_after_commit", "whole")
        at_last = outcome(fleet, "s.save", "at last")

        assert isinstance(in_query, Exception)
        assert isinstance(in_commit, Exception)
        if is_plain:
            assert isinstance(after_query, Exception)
            assert isinstance(after_commit, Exception)
            assert names(url) == []
        else:
            later = [after_query, after_commit, committed, at_last]
            assert not [one for one in later if isinstance(one, Exception)]
            told = ["after the query", "after the commit", "whole", "at last"]
            assert names(url) == told


def test_a_query_cut_off_by_a_soft_limit_is_cancelled_on_the_server(
    both_of: BothMaker, database: Databases
) -> None:
    """It is gone when the result is there, and the next task is right."""
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        cut = outcome(fleet, "s.slow")

        assert type(cut).__name__ == "SoftTimeLimitExceeded", cut
        if is_plain:
            assert rows(url, ABANDONED)
            assert isinstance(outcome(fleet, "s.backend"), Exception)
        else:
            eventually_none(url, ABANDONED)
            assert isinstance(outcome(fleet, "s.backend"), int)
            assert isinstance(outcome(fleet, "s.slow", "goes_on"), str)


def test_a_query_cut_off_is_cancelled_on_mariadb_too(
    both_of: BothMaker, database: Databases
) -> None:
    """Where the driver only closes its socket, and the server goes on."""
    abandoned = """SELECT id FROM information_schema.processlist
        WHERE info LIKE '%abandoned%' AND id != connection_id()"""
    both = both_of(lambda: database("mariadb"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        cut = outcome(fleet, "s.slow_mysql")

        assert type(cut).__name__ == "SoftTimeLimitExceeded", cut
        if is_plain:
            assert rows(url, abandoned)
        else:
            eventually_none(url, abandoned)
            assert outcome(fleet, "s.asks", "SELECT 1") == 1


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
                found = [one.get(timeout=8, propagate=False) for one in sent]
            assert sum(isinstance(one, int) for one in found) < 8
        else:
            found = [one.get(timeout=30, propagate=False) for one in sent]
            assert all(isinstance(one, int) for one in found), found


def test_a_tasks_own_fork_has_connections_of_its_own(
    both_of: BothMaker, database: Databases
) -> None:
    """Three asks, and the child's is another backend's; the parent keeps its own."""
    both = both_of(lambda: database("postgresql"))

    fleet, _, _ = both()
    before, forked, after = outcome(fleet, "s.forks")

    assert before == after
    assert forked not in (0, before)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_asynchronous_engine_keeps_its_connections(
    both_of: BothMaker, database: Databases, driver: str, pool: str
) -> None:
    """On the loop of `self.resilience.run`, and of an `async def` body, one backend."""
    both = both_of(
        lambda: database("postgresql", driver),
        fleet_is_async=True,
        pool=pool,
    )

    fleet, _, url = both()
    kept = [outcome(fleet, name) for name in ("a.run", "a.body", "a.retried")]
    outcome(fleet, "a.add_and_fail", "ghost")
    outcome(fleet, "a.save", "mine")
    own = [outcome(fleet, "a.asyncio_run") for _ in range(3)]

    assert len(set(kept)) == 1, kept
    assert all(isinstance(one, int) for one in own), own
    assert names(url.replace("+asyncpg", "+psycopg")) == ["mine"]


def test_a_pool_of_asyncpg_survives_a_loop_for_each_task(
    both_of: BothMaker, database: Databases
) -> None:
    """Where the tasks call `asyncio.run`; plain Celery's second task fails."""
    both = both_of(lambda: database("postgresql", "asyncpg"), fleet_is_async=True)

    for is_plain in (False, True):
        fleet, _, _ = both(is_plain=is_plain)
        found = [outcome(fleet, "a.asyncio_run") for _ in range(3)]

        assert all(isinstance(one, int) for one in found) is not is_plain, found


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_an_asynchronous_query_cut_off_is_cancelled(
    both_of: BothMaker, database: Databases, driver: str
) -> None:
    """The coroutine is cancelled, and its driver tells the server."""
    both = both_of(lambda: database("postgresql", driver), fleet_is_async=True)

    fleet, _, url = both()
    cut = outcome(fleet, "a.slow")

    assert type(cut).__name__ == "SoftTimeLimitExceeded", cut
    eventually_none(url.replace("+asyncpg", "+psycopg"), ABANDONED)
    assert isinstance(outcome(fleet, "a.run"), int)
