"""The next task never inherits a broken transaction or a dead connection."""

from __future__ import annotations

import pytest
from conftest import FleetMaker
from polling import eventually
from session_fleets import (
    BothMaker,
    Databases,
    Shelves,
    names,
    outcome,
    rows,
)

KINDS = ("postgresql", "sqlite", "mariadb")

#: What a task sets in a server's session, how the next one asks for it, what it finds
#: in a new one, and the word for it.
CHANGES = {
    "setting": (
        "SET statement_timeout = '77s'",
        "SHOW statement_timeout",
        "0",
        "SET",
    ),
    "lock": (
        "SELECT pg_advisory_lock(7)",
        """SELECT count(*) FROM pg_locks
        WHERE locktype = 'advisory' AND pid = pg_backend_pid()""",
        0,
        "advisory lock",
    ),
    "table": (
        "CREATE TEMPORARY TABLE of_mine (id int)",
        "SELECT to_regclass('of_mine') IS NOT NULL",
        False,
        "temporary table",
    ),
    "listen": (
        "LISTEN somebody",
        "SELECT count(*) FROM pg_listening_channels()",
        0,
        "LISTEN",
    ),
}

OF_POSTGRESQL = ("raw", "thread", "closed", "reads", "handled", "nests", *CHANGES)

#: Finds who is in a transaction, and does nothing.
IDLE_IN_TRANSACTION = """SELECT pid FROM pg_stat_activity
    WHERE state LIKE 'idle in%' AND datname = current_database()"""

#: The databases of the tests below; see `Shelves`.
SHELVES = {
    **{
        f"ghost-{kind}-{flushes}": {"kind": kind}
        for kind in KINDS
        for flushes in (True, False)
    },
    **{f"swallow-{kind}": {"kind": kind} for kind in ("postgresql", "sqlite")},
    **{name: {"kind": "postgresql"} for name in OF_POSTGRESQL},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flushes", [True, False])
def test_a_failed_tasks_row_is_never_saved(
    shelf: Shelves, kind: str, flushes: bool
) -> None:
    """The next task's commit saves its own row; of plain Celery, the ghost too."""
    for is_plain in (False, True):
        mine = shelf(f"ghost-{kind}-{flushes}", is_plain=is_plain)
        mine.outcome("s.add_and_fail", "ghost", flushes)
        mine.outcome("s.save", "mine")

        assert names(mine.url) == (["ghost", "mine"] if is_plain else ["mine"])


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_a_swallowed_error_poisons_nobody(shelf: Shelves, kind: str) -> None:
    """Twenty tasks after it are right; of plain Celery, none."""
    for is_plain in (False, True):
        mine = shelf(f"swallow-{kind}", is_plain=is_plain)
        mine.outcome("s.save", "one")
        mine.outcome("s.swallow", "one")
        results = [mine.outcome("s.save", f"later {n}") for n in range(20)]

        assert mine.fleet.notes("swallowed")
        failures = [r for r in results if isinstance(r, Exception)]
        assert len(failures) == (20 if is_plain else 0), failures[:1]
        assert len(names(mine.url)) == (1 if is_plain else 21)
        told = [line for line in mine.told() if "open transaction" in line]
        assert bool(told) is not is_plain


@pytest.mark.parametrize("name", CHANGES)
def test_a_servers_session_is_as_new_for_the_next_task(
    shelf: Shelves, name: str
) -> None:
    """What a task has set is undone when it ends, and told of with its name."""
    change, ask, clean, kind = CHANGES[name]

    for is_plain in (False, True):
        mine = shelf(name, is_plain=is_plain)
        mine.outcome("s.changes", change)
        found = mine.outcome("s.asks", ask)

        assert (found == clean) is not is_plain
        if not is_plain:
            (told,) = mine.told()
            assert "WARNING" in told
            assert f"task {name}.s.changes[" in told
            assert kind in told
            assert "session_tasks.py:" in told


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
    assert not rows(url, IDLE_IN_TRANSACTION)


def test_a_connection_that_is_not_returned_is_told_of(shelf: Shelves) -> None:
    """With where it was taken."""
    mine = shelf("raw")
    mine.outcome("s.raw_left")

    (told,) = mine.told()
    assert "open transaction" in told
    assert "session_tasks.py:" in told
    assert not rows(mine.url, IDLE_IN_TRANSACTION)


@pytest.mark.parametrize("store", ["postgresql", "mariadb", "sqlite"])
def test_the_stores_own_connections_are_no_tasks(
    make_fleet: FleetMaker, store: str
) -> None:
    """They are asked around a body, and kept; a body may be asked for places too."""
    fleet = make_fleet("redis", store=store, resilience_sessions="strict")
    if store == "sqlite":
        fleet.conf["resilience_store_url"] = f"sqlite:///{fleet.folder}/store.sqlite3"
    worker = fleet.worker(concurrency=1)

    results = [fleet.send("charge", order) for order in range(4)]
    results.append(fleet.send("stream_numbers", 100))

    for result in results:
        eventually(result.ready, within_s=30)
        assert result.state == "SUCCESS", worker.text[-3000:]
    assert "left behind" not in worker.text


def test_another_thread_of_the_task_is_left_alone(shelf: Shelves) -> None:
    """It has its own session, which it ends itself."""
    mine = shelf("thread")
    found = mine.outcome("s.thread", "of a thread")

    assert found is None
    assert names(mine.url) == ["of a thread"]


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


def test_a_transaction_is_closed_before_its_result_is_there(shelf: Shelves) -> None:
    """Whoever has the result finds nobody idle in a transaction."""
    for is_plain in (False, True):
        mine = shelf("closed", is_plain=is_plain)
        for _ in range(5):
            assert mine.outcome("s.names") == []
            assert bool(rows(mine.url, IDLE_IN_TRANSACTION)) is is_plain


def test_what_a_task_returns_may_read_from_its_session(shelf: Shelves) -> None:
    """The result is stored after the body: its objects are as in plain Celery."""
    for is_plain in (False, True):
        mine = shelf("reads", is_plain=is_plain)
        assert mine.outcome("s.returns_row", "expired") == "expired"
        assert mine.outcome("s.returns_read", "expired") == "expired"
        if not is_plain:
            assert isinstance(mine.outcome("s.save", "next"), int)
            assert names(mine.url) == ["expired", "next"]


def test_a_failed_task_is_rolled_back_before_its_on_failure(shelf: Shelves) -> None:
    """What that saves is saved, without the half of the body."""
    for is_plain in (False, True):
        mine = shelf("handled", is_plain=is_plain)
        mine.outcome("s.handled", "half")
        mine.outcome("s.names")

        saved = names(mine.url)
        assert saved == (["half", "failed: no"] if is_plain else ["failed: no"])


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


def test_a_task_within_a_task_leaves_its_callers_session_alone(shelf: Shelves) -> None:
    """Applied or called, itself too: the outermost one's end is the end."""
    mine = shelf("nests")
    mine.outcome("s.nests", "mine")

    own = ["mine", "mine, applied", "mine, called", "mine, itself"]
    assert names(mine.url) == own
    assert mine.told() == []
