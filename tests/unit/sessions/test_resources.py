"""What a run or a process opens is opened once, lazily, and closed in time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from celery_resilience import Resilience
from celery_resilience.errors import ConfigurationError
from celery_resilience.sessions import resources
from celery_resilience.sessions.run import Run, current


@pytest.fixture
def run() -> Iterator[Run]:
    """The run of a task."""
    made = Run("shop.ship", "1")
    token = current.set(made)
    yield made
    current.reset(token)


def test_a_runs_own_is_opened_once_and_closed_last_first(run: Run) -> None:
    """Nothing is opened before it is asked for."""
    told: list[str] = []
    resilience = Resilience()
    one = resilience.resource(lambda: told.append("open 1") or "one", told.append)
    two = resilience.resource(lambda: told.append("open 2") or "two", told.append)
    assert told == []

    assert (one(), two(), one()) == ("one", "two", "one")
    resources.close_all(run)

    assert told == ["open 1", "open 2", "two", "one"]


def test_a_close_that_raises_keeps_nobody_from_being_closed(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged."""
    told: list[Any] = []

    def fail(_: Any) -> None:
        raise OSError("cannot be closed")

    resources.Resource(lambda: "one", told.append)()
    resources.Resource(lambda: "two", fail)()
    resources.close_all(run)

    assert told == ["one"]
    assert "cannot be closed" in caplog.text


def test_a_childs_own_is_shared_by_its_runs(run: Run) -> None:
    """And closed when the process ends."""
    told: list[str] = []
    shared = resources.Resource(lambda: "one", told.append, "child")

    assert shared() == shared() == "one"
    resources.close_all(run)
    assert told == []
    resources.close_shared()

    assert told == ["one"]


def test_a_forked_child_opens_its_own_and_closes_nothing_of_its_parents() -> None:
    """What the parent has opened stays the parent's."""
    told: list[Any] = []
    shared = resources.Resource(lambda: os.getpid(), told.append, "child")
    mine = shared()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            found = shared()
            resources.close_shared()
            os.write(write, f"{found == os.getpid()} {told == [found]}".encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)

    assert os.read(read, 100) == b"True True"
    assert shared() == mine
    os.close(read)
    os.close(write)
    resources.close_shared()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((open, print, "thread"), 'scope must be "task" or "child"'),
        (("path", print, "task"), "open must be callable"),
        ((open, None, "task"), "close must be callable"),
    ],
)
def test_a_wrong_resource_is_refused_where_it_is_written(
    words: tuple[Any, Any, Any], told: str
) -> None:
    """Not when a task first asks for it."""
    with pytest.raises(ConfigurationError, match=told):
        resources.Resource(*words)
