"""Every effect exactly once, however often children are killed around the commit."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from conftest import FleetMaker
from effects import Base, Effect, engine_for
from fleet_runner import Fleet, Worker
from polling import eventually
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.engine import make_url

from celery_resilience.idempotency.once import sql_table as once_table

#: `ONCE_TASKS=2000` for a long look.
TASKS = int(os.environ.get("ONCE_TASKS", "200"))

#: Tasks that end between two kills, however fast the machine is.
TASKS_PER_KILL = 5


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, servers: Callable[[str], Any], tmp_path: Path) -> str:
    """The user's own database, with their table and that of `once`."""
    url = f"sqlite:///{tmp_path}/shop.sqlite3"
    if request.param != "sqlite":
        server, name = servers(request.param).url, f"once_{uuid4().hex[:8]}"
        engine = create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        url = str(make_url(server).set(database=name))
    Base.metadata.create_all(engine_for(url))
    once_table.create(engine_for(url))
    return url


def effects(url: str) -> Counter[int]:
    """How often each number had its effect."""
    query = select(Effect.number, func.count()).group_by(Effect.number)
    with engine_for(url).connect() as connection:
        return Counter({number: count for number, count in connection.execute(query)})


def kill_one(worker: Worker, chance: random.Random) -> int:
    """Kill one child, whatever it is doing."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess, IndexError):
        os.kill(chance.choice(worker.children()), signal.SIGKILL)
        return 1
    return 0


def run_under_fire(
    fleet: Fleet, url: str, numbers: range, *, is_keyed: bool
) -> tuple[int, list[Any]]:
    """
    Kill children at random moments until every task has ended.

    Returns:
        How many were killed, and what each task returned.
    """
    worker = fleet.worker(concurrency=4)
    results = [fleet.send("row_of_its_own", url, n, is_keyed) for n in numbers]
    waiting, killed, chance = list(results), 0, random.Random(17)

    def look() -> bool:
        nonlocal killed
        waiting[:] = [result for result in waiting if not result.ready()]
        if len(numbers) - len(waiting) > TASKS_PER_KILL * killed:
            killed += kill_one(worker, chance)
        return not waiting

    eventually(look, within_s=120 + len(numbers) * 0.6, what="all have ended")
    assert worker.stop() == 0
    return killed, [result.get(timeout=1) for result in results]


def test_every_effect_is_had_exactly_once(make_fleet: FleetMaker, url: str) -> None:
    """And a run that is a duplicate returns what the first has saved."""
    fleet = make_fleet("redis", resilience_max_crashes=1_000)
    killed, returned = run_under_fire(fleet, url, range(TASKS), is_keyed=True)

    assert killed > 10
    assert effects(url) == Counter(range(TASKS))
    query = select(Effect.id).order_by(Effect.number)
    with engine_for(url).connect() as connection:
        assert returned == list(connection.execute(query).scalars())


def test_plain_celery_has_some_effects_twice(make_fleet: FleetMaker, url: str) -> None:
    """So that the test above is seen to kill where it hurts."""
    fleet, tasks, done = make_fleet("redis", is_plain=True), TASKS // 2, 0
    found: Counter[int] = Counter()
    # One task in forty is hit between its commit and its acknowledgement.
    while done < 5 * tasks and len(found) == found.total():
        numbers = range(done, done + tasks)
        killed, _ = run_under_fire(fleet, url, numbers, is_keyed=False)
        assert killed > 10
        done = numbers.stop
        found = effects(url)

    assert found.keys() == set(range(done))
    assert max(found.values()) > 1
