"""A process is not forked while a thread holds what its child would wait for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from polling import eventually
from sqlalchemy import literal, select

from celery_resilience import forks
from celery_resilience.forks import ForkGate, hold_handlers_at_forks
from celery_resilience.stores.sql import SqlDatabase


def forked(work: Callable[[], int]) -> int:
    """The exit code of a child, which *work* returns."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Forking(Thread):
    """A thread that forks; `exit_code` is the child's, None before."""

    def __init__(self, work: Callable[[], int] = lambda: 0) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.exit_code: int | None = None
        self.start()

    def run(self) -> None:
        """Fork once."""
        self.exit_code = forked(self._work)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqlDatabase]:
    """SQLite's."""
    database = SqlDatabase(f"sqlite:///{tmp_path / 'store.db'}")
    yield database
    database.close()


def one(database: SqlDatabase) -> int:
    """A query's answer."""
    with database.reading() as connection:
        return int(connection.execute(select(literal(1))).scalar_one())


def kept_inside(enter: Any) -> tuple[Thread, Event]:
    """A thread that is inside until the event is set."""
    is_inside, leaves = Event(), Event()

    def stay() -> None:
        with enter:
            is_inside.set()
            leaves.wait(30)

    thread = Thread(target=stay, daemon=True)
    thread.start()
    assert is_inside.wait(10)
    return thread, leaves


@pytest.mark.parametrize("kind", ["reading", "writing", "unforked"])
def test_a_fork_waits_for_the_threads_that_are_within_sqlite(
    database: SqlDatabase, kind: str
) -> None:
    """The child then asks the same database, and is answered."""
    thread, leaves = kept_inside(getattr(database, kind)())

    forking = Forking(lambda: one(database))
    forking.join(0.3)
    assert forking.exit_code is None
    leaves.set()

    thread.join()
    assert eventually(lambda: forking.exit_code) == 1


@pytest.mark.parametrize("method", ["run", "run_once"])
def test_a_statement_is_within_sqlite(
    database: SqlDatabase, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Statements have connections of their own."""
    is_inside, leaves = Event(), Event()
    statements = database.statements
    run = statements._run

    def slow(*args: Any) -> Any:
        is_inside.set()
        leaves.wait(30)
        return run(*args)

    monkeypatch.setattr(statements, "_run", slow)
    words: tuple[Any, ...] = ({},) if method == "run" else ()
    thread = Thread(target=getattr(statements, method), args=(select(1), *words))
    thread.start()
    assert is_inside.wait(10)

    forking = Forking()
    forking.join(0.3)
    assert forking.exit_code is None
    leaves.set()

    thread.join()
    assert eventually(lambda: forking.exit_code is not None)
    assert forking.exit_code == 0


def test_no_thread_enters_while_a_fork_waits() -> None:
    """Busy threads would keep it waiting; one that is inside may enter again."""
    gate = ForkGate()
    entered: list[str] = []
    is_inside, again, leaves = Event(), Event(), Event()

    def stay() -> None:
        with gate.inside():
            is_inside.set()
            again.wait(30)
            with gate.inside():
                entered.append("again")
            leaves.wait(30)

    def come() -> None:
        with gate.inside():
            entered.append("other")

    Thread(target=stay, daemon=True).start()
    assert is_inside.wait(10)
    forking = Forking()
    eventually(lambda: gate._forks)
    other = Thread(target=come, daemon=True)
    other.start()
    again.set()
    eventually(lambda: entered)
    other.join(0.2)
    assert entered == ["again"]
    leaves.set()

    other.join(10)
    assert entered == ["again", "other"]
    assert eventually(lambda: forking.exit_code is not None)


def test_a_thread_that_is_inside_may_fork(database: SqlDatabase) -> None:
    """It does not wait for itself; its child begins outside and leaves nothing."""

    def in_the_child() -> int:
        return one(database) + forked(lambda: 1)

    started = time.monotonic()
    with database.reading():
        assert forked(in_the_child) == 2

    assert one(database) == 1
    assert time.monotonic() - started < 5


def test_a_child_that_was_forked_inside_leaves_its_parents_visit_alone() -> None:
    """The `with` ends in it too."""
    gate = ForkGate()

    def in_the_child() -> int:
        visit = gate.enter()
        gate.leave(visit)
        return len(gate._visits)

    with gate.inside():
        pid = os.fork()
    if not pid:
        os._exit(in_the_child())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not gate._visits


def test_a_fork_does_not_wait_for_ever() -> None:
    """For a pager, say, that nobody looks at."""
    gate = ForkGate(fork_waits_s=0.2)
    _, leaves = kept_inside(gate.inside())

    assert forked(lambda: 0) == 0
    leaves.set()


def test_what_a_parent_had_open_is_kept_in_its_child(database: SqlDatabase) -> None:
    """Closed there, a connection would wait for a mutex or drop the parent's locks."""
    one(database)
    parents = database._engine

    def in_the_child() -> int:
        one(database)
        return int(database._parents == [parents])

    assert forked(in_the_child) == 1
    assert database._parents == []


#: Forks while three threads log, until a child hangs; prints how many did not.
LOGGING = """
import logging, os, sys, threading
from celery_resilience.forks import hold_handlers_at_forks

if sys.argv[1] == "held":
    hold_handlers_at_forks()
handler = logging.StreamHandler(open(os.devnull, "w"))
logging.getLogger("shop").addHandler(handler)
log = logging.getLogger("shop.orders")

def talk():
    while True:
        log.warning("x" * 200)

for _ in range(3):
    threading.Thread(target=talk, daemon=True).start()
ended = 0
for _ in range(60):
    pid = os.fork()
    if not pid:
        log.warning("a child's first words")
        os._exit(0)
    try:
        signalled = threading.Timer(5, os.kill, (pid, 9))
        signalled.start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        signalled.cancel()
    if code:
        break
    ended += 1
sys.stdout.write(str(ended))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["held", "as Python does it"])
def test_a_child_may_log_whoever_logged_as_it_was_forked(how: str) -> None:
    """A thread of Sentry's or of the app's own; without us, some child hangs."""
    done = subprocess.run(
        # Python 3.12 warns of what is tried here.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", LOGGING, how],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.stderr == ""
    assert (int(done.stdout) == 60) == (how == "held")


def test_a_thread_that_a_fork_waits_for_may_log(database: SqlDatabase) -> None:
    """Held before it has left SQLite, its handler would be waited for in a circle."""
    hold_handlers_at_forks()
    logger = logging.getLogger("shop.inside")
    handler = logging.FileHandler(os.devnull)
    logger.addHandler(handler)
    is_inside, logs = Event(), Event()

    def stay() -> None:
        with database.reading():
            is_inside.set()
            logs.wait(30)
            logger.warning("a slow query")

    thread = Thread(target=stay, daemon=True)
    thread.start()
    assert is_inside.wait(10)
    started = time.monotonic()
    forking = Forking()
    eventually(lambda: forks.sqlite_gate._forks)
    logs.set()

    assert eventually(lambda: forking.exit_code is not None)
    assert time.monotonic() - started < forks.FORK_WAITS_S / 2
    thread.join()
    logger.removeHandler(handler)
    handler.close()


def test_a_handler_that_is_held_for_ever_does_not_keep_a_fork_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its thread may wait for a server."""
    monkeypatch.setattr(forks, "HANDLERS_WAIT_S", 0.2)
    hold_handlers_at_forks()
    handler = logging.StreamHandler()
    logger = logging.getLogger("shop.held")
    logger.addHandler(handler)
    assert handler.lock is not None
    _, leaves = kept_inside(handler.lock)

    assert forked(lambda: 0) == 0

    leaves.set()
    logger.removeHandler(handler)
