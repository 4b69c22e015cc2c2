"""The next task never inherits a broken transaction or a dead connection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from celery.exceptions import TimeoutError as CeleryTimeout
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import eventually
from services import Service
from sqlalchemy import Engine, create_engine, text

Databases = Callable[..., str]


@pytest.fixture
def database(servers: Callable[[str], Service], tmp_path: Any) -> Databases:
    """URLs of empty databases of a test's own, on shared servers."""

    def get(kind: str, driver: str = "psycopg") -> str:
        if kind == "sqlite":
            url = f"sqlite:///{tmp_path}/rows{uuid4().hex[:8]}.sqlite3"
        else:
            server = servers(kind).url
            name = f"s{uuid4().hex[:12]}"
            statement(server, f"CREATE DATABASE {name}")
            url = server.rpartition("/")[0] + f"/{name}"
            url = url.replace("+psycopg:", f"+{driver}:")
        from session_tasks import Base

        engine = create_engine(url.replace("+asyncpg", "+psycopg"))
        Base.metadata.create_all(engine)
        engine.dispose()
        return url

    return get


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


@pytest.fixture
def both_of(make_fleet: FleetMaker) -> Iterator[BothMaker]:
    """Makes them; at the end it looks at what their workers have logged."""
    made: list[Both] = []

    def make(url: Callable[[], str], **conf: Any) -> Both:
        made.append(Both(make_fleet, url, **conf))
        return made[-1]

    yield make
    for both in made:
        both.check()


def outcome(fleet: Fleet, name: str, *args: Any) -> Any:
    """What a task returns, or the exception that it raises."""
    result = fleet.send(name, *args)
    return result.get(timeout=30, propagate=False)


@pytest.mark.parametrize("kind", ["postgresql", "sqlite", "mariadb"])
@pytest.mark.parametrize("flushes", [True, False])
def test_a_failed_tasks_row_is_never_saved(
    both_of: BothMaker, database: Databases, kind: str, flushes: bool
) -> None:
    """The next task's commit saves its own row; of plain Celery, the ghost too."""
    both = both_of(lambda: database(kind))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        outcome(fleet, "s.add_and_fail", "ghost", flushes)
        outcome(fleet, "s.save", "mine")

        assert names(url) == (["ghost", "mine"] if is_plain else ["mine"])


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_swallowed_error_poisons_nobody(
    both_of: BothMaker, database: Databases, kind: str
) -> None:
    """Twenty tasks after it are right; of plain Celery, none."""
    both = both_of(lambda: database(kind))

    for is_plain in (False, True):
        fleet, worker, url = both(is_plain=is_plain)
        outcome(fleet, "s.save", "one")
        outcome(fleet, "s.swallow", "one")
        results = [outcome(fleet, "s.save", f"later {n}") for n in range(20)]

        assert fleet.notes("swallowed")
        failures = [r for r in results if isinstance(r, Exception)]
        assert len(failures) == (20 if is_plain else 0), failures[:1]
        assert len(names(url)) == (1 if is_plain else 21)
        assert ("left behind: open transaction" in worker.text) is not is_plain


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


ABANDONED = """SELECT pid FROM pg_stat_activity
    WHERE state = 'active' AND query LIKE '%abandoned%' AND pid != pg_backend_pid()"""


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


@pytest.mark.parametrize(
    ("change", "ask", "clean", "kind"),
    [
        ("SET statement_timeout = '77s'", "SHOW statement_timeout", "0", "SET"),
        (
            "SELECT pg_advisory_lock(7)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
            0,
            "advisory lock",
        ),
        (
            "CREATE TEMPORARY TABLE of_mine (id int)",
            "SELECT to_regclass('of_mine') IS NOT NULL",
            False,
            "temporary table",
        ),
        (
            "LISTEN somebody",
            "SELECT count(*) FROM pg_listening_channels()",
            0,
            "LISTEN",
        ),
    ],
)
def test_a_servers_session_is_as_new_for_the_next_task(
    both_of: BothMaker,
    database: Databases,
    change: str,
    ask: str,
    clean: Any,
    kind: str,
) -> None:
    """What a task has set is undone when it ends, and told of with its name."""
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, worker, _ = both(is_plain=is_plain)
        outcome(fleet, "s.changes", change)
        found = outcome(fleet, "s.asks", ask)

        assert (found == clean) is not is_plain
        told = [line for line in worker.text.splitlines() if "left behind" in line]
        if not is_plain:
            assert len(told) == 1
            assert "WARNING" in told[0]
            assert "task s.changes[" in told[0]
            assert kind in told[0]
            assert "session_tasks.py:" in told[0]


def test_strict_fails_the_leaker_and_nobody_else(
    both_of: BothMaker, database: Databases
) -> None:
    """Its row is not saved; the task after it is right."""
    both = both_of(lambda: database("postgresql"), resilience_sessions="strict")

    fleet, _, url = both()
    leaker = outcome(fleet, "s.add_and_return", "left")
    after = outcome(fleet, "s.save", "mine")

    assert type(leaker).__name__ == "LeftBehind"
    assert "open transaction" in str(leaker)
    assert isinstance(after, int)
    assert names(url) == ["mine"]


def test_off_is_plain_celery(both_of: BothMaker, database: Databases) -> None:
    """The ghost is saved, as it is without us."""
    both = both_of(lambda: database("sqlite"), resilience_sessions="off")

    fleet, _, url = both()
    outcome(fleet, "s.add_and_fail", "ghost", True)
    outcome(fleet, "s.save", "mine")

    assert names(url) == ["ghost", "mine"]


@pytest.mark.parametrize(
    ("pool", "concurrency"), [("threads", 2), ("gevent", 4), ("solo", 1)]
)
def test_every_pool_is_clean(
    both_of: BothMaker, database: Databases, pool: str, concurrency: int
) -> None:
    """Ghosts, swallowed errors and open transactions; each thread has its own."""
    both = both_of(
        lambda: database("postgresql"),
        pool=pool,
        concurrency=concurrency,
        fleet_engine={"pool_size": 2, "max_overflow": 0, "pool_timeout": 5},
    )

    fleet, _, url = both()
    outcome(fleet, "s.save", "one")
    sent = [fleet.send("s.add_and_fail", f"ghost {n}", True) for n in range(4)]
    sent += [fleet.send("s.swallow", "one") for _ in range(4)]
    sent += [fleet.send("s.names") for _ in range(8)]
    for one in sent:
        one.get(timeout=30, propagate=False)
    saved = [fleet.send("s.save", f"mine {n}") for n in range(8)]
    results = [one.get(timeout=30, propagate=False) for one in saved]

    assert not [one for one in results if isinstance(one, Exception)], results
    assert set(names(url)) == {"one", *(f"mine {n}" for n in range(8))}
    open_ones = """SELECT pid FROM pg_stat_activity WHERE state LIKE 'idle in%'"""
    assert not rows(url, open_ones)


def test_a_connection_that_is_not_returned_is_told_of(
    both_of: BothMaker, database: Databases
) -> None:
    """With where it was taken."""
    both = both_of(lambda: database("postgresql"))

    fleet, worker, url = both()
    outcome(fleet, "s.raw_left")

    (told,) = [line for line in worker.text.splitlines() if "left behind" in line]
    assert "open transaction" in told
    assert "session_tasks.py:" in told
    open_ones = """SELECT pid FROM pg_stat_activity WHERE state LIKE 'idle in%'"""
    assert not rows(url, open_ones)


def test_another_thread_of_the_task_is_left_alone(
    both_of: BothMaker, database: Databases
) -> None:
    """It has its own session, which it ends itself."""
    both = both_of(lambda: database("postgresql"))

    fleet, _, url = both()
    found = outcome(fleet, "s.thread", "of a thread")

    assert found is None
    assert names(url) == ["of a thread"]


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


def test_a_body_may_be_the_first_to_import_sqlalchemy(
    both_of: BothMaker, database: Databases
) -> None:
    """What it leaves is undone all the same."""
    both = both_of(lambda: database("postgresql"), fleet_is_late=True)

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        outcome(fleet, "late", "s.add_and_fail", "ghost", True)
        outcome(fleet, "late", "s.save", "mine")

        assert (names(url) == ["mine"]) is not is_plain


def test_a_transaction_is_closed_before_its_result_is_there(
    both_of: BothMaker, database: Databases
) -> None:
    """Whoever has the result finds nobody idle in a transaction."""
    waits = "SELECT pid FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        for _ in range(5):
            assert outcome(fleet, "s.names") == []
            mine = f"{waits} AND datname = '{url.rpartition('/')[2]}'"
            assert bool(rows(url, mine)) is is_plain


def test_what_a_task_returns_may_read_from_its_session(
    both_of: BothMaker, database: Databases
) -> None:
    """The result is stored after the body: its objects are as in plain Celery."""
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        assert outcome(fleet, "s.returns_row", "expired") == "expired"
        assert outcome(fleet, "s.returns_read", "expired") == "expired"
        if not is_plain:
            assert isinstance(outcome(fleet, "s.save", "next"), int)
            assert names(url) == ["expired", "next"]


def test_a_failed_task_is_rolled_back_before_its_on_failure(
    both_of: BothMaker, database: Databases
) -> None:
    """What that saves is saved, without the half of the body."""
    both = both_of(lambda: database("postgresql"))

    for is_plain in (False, True):
        fleet, _, url = both(is_plain=is_plain)
        outcome(fleet, "s.handled", "half")
        outcome(fleet, "s.names")

        assert names(url) == (["half", "failed: no"] if is_plain else ["failed: no"])


def test_what_a_task_and_a_child_open_is_closed_in_time(
    both_of: BothMaker, database: Databases
) -> None:
    """A run's when its body has ended, a child's when the child ends."""
    both = both_of(lambda: database("sqlite"))

    fleet, worker, _ = both()
    for _ in range(2):
        outcome(fleet, "s.resources")
    worker.stop()

    (child,) = {pid for event, pid in fleet.notes() if event == "body"}
    each = ["open task", "open child", "body", "close task"]
    assert fleet.notes() == [
        *([event, child] for event in each),
        *([event, child] for event in each if event != "open child"),
        ["close child", child],
    ]


def test_a_task_within_a_task_leaves_its_callers_session_alone(
    both_of: BothMaker, database: Databases
) -> None:
    """Applied or called: the outermost one's end is the end."""
    both = both_of(lambda: database("postgresql"))

    fleet, worker, url = both()
    outcome(fleet, "s.nests", "mine")

    assert names(url) == ["mine", "mine, applied", "mine, called"]
    assert "left behind" not in worker.text
