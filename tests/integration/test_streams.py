"""Many rows are read in bounded memory, and from where an earlier run stopped."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import FleetMaker
from django_project import Project
from fleet_runner import Fleet
from polling import eventually
from sqlalchemy import create_engine, text

#: A broker, and the store of its places.
FLEETS = [("redis", "redis"), ("rabbitmq", "postgresql"), ("filesystem", "sqlite")]

#: In pages of ten.
ROWS = 100


@pytest.fixture
def orders(tmp_path: Path) -> str:
    """The URL of a database with orders that nobody has worked at."""
    url = f"sqlite:///{tmp_path}/shop.sqlite3"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE orders (id INTEGER PRIMARY KEY, done INT)")
        )
        connection.execute(
            text("INSERT INTO orders VALUES (:id, 0)"), [{"id": n} for n in range(ROWS)]
        )
    engine.dispose()
    return url


def done(url: str) -> Counter[int]:
    """How many orders were worked at how often."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = Counter(connection.execute(text("SELECT done FROM orders")).scalars())
    engine.dispose()
    return found


def result_of(fleet: Fleet, task_id: str) -> Any:
    """What a task returned, once it has."""
    result = fleet.app.AsyncResult(task_id)
    eventually(result.ready, within_s=60, what=lambda: fleet.workers[0].text[-3000:])
    return result.get(timeout=1)


def seen(fleet: Fleet) -> list[int]:
    """The rows in the order in which they were worked at."""
    return [line[1] for line in fleet.notes("row")]


@pytest.mark.parametrize(("broker", "store"), FLEETS)
@pytest.mark.parametrize("how", ["kill", "retry"])
def test_the_next_run_goes_on_after_the_last_full_page(
    make_fleet: FleetMaker, orders: str, broker: str, store: str, how: str
) -> None:
    """A killed child and a retry: what was committed is not done again."""
    fleet = make_fleet(broker, store="sqlite" if store == "redis" else store)
    fleet.worker(concurrency=1)

    task_id = fleet.send("enrich", orders, how, 57).id

    assert result_of(fleet, task_id) == ROWS - 50
    assert seen(fleet) == [*range(58), *range(50, ROWS)]
    assert done(orders) == {1: ROWS}


@pytest.mark.parametrize(("broker", "store"), FLEETS)
def test_a_worker_that_stops_hands_the_rest_over(
    make_fleet: FleetMaker, orders: str, tmp_path: Path, broker: str, store: str
) -> None:
    """At the end of a page, though the whole process group is told to end."""
    fleet = make_fleet(broker, store="sqlite" if store == "redis" else store)
    first = fleet.worker(concurrency=1)
    gate = tmp_path / "gate"
    task_id = fleet.send("enrich", orders, "", 25, str(gate)).id
    eventually(lambda: seen(fleet)[-1:] == [25], within_s=30)

    os.killpg(first.pid, signal.SIGTERM)
    eventually(lambda: "stopping (SIGTERM)" in first.text, within_s=10)
    gate.touch()
    assert first.wait(within_s=20) == 0
    fleet.worker(concurrency=1)

    assert result_of(fleet, task_id) == ROWS - 30
    assert seen(fleet) == list(range(ROWS))
    assert done(orders) == {1: ROWS}
    assert first.outcomes()["snoozed"] == 1


def test_plain_celery_begins_anew(make_fleet: FleetMaker, orders: str) -> None:
    """The test above would see it."""
    fleet = make_fleet("redis", is_plain=True)
    fleet.worker(concurrency=1)

    task_id = fleet.send("enrich", orders, "kill", 57).id

    assert result_of(fleet, task_id) == ROWS
    assert seen(fleet) == [*range(58), *range(ROWS)]


def test_a_replay_goes_on_where_the_failed_run_stopped(
    make_fleet: FleetMaker, orders: str
) -> None:
    """It is the same task."""
    fleet = make_fleet("redis")
    fleet.worker(concurrency=1)
    task_id = fleet.send("enrich", orders, "raise", 35).id
    record = fleet.record_of(task_id)

    fleet.failed.replay([record["id"]])

    eventually(lambda: done(orders) == {1: ROWS}, within_s=30)
    assert seen(fleet) == [*range(36), *range(30, ROWS)]


def test_a_message_that_comes_again_does_nothing_twice(
    make_fleet: FleetMaker, orders: str
) -> None:
    """Its task has ended, and its acknowledgement was lost."""
    fleet = make_fleet("redis")
    fleet.worker(concurrency=1)
    for _ in range(2):
        fleet.send("enrich", orders, task_id="same")
    eventually(lambda: len(fleet.notes("enrich")) == 2, within_s=30)
    fleet.workers[0].stop()

    assert seen(fleet) == list(range(ROWS))
    assert done(orders) == {1: ROWS}


def test_a_fleet_without_a_store_says_that_each_run_begins_anew(
    make_fleet: FleetMaker, orders: str
) -> None:
    """Nothing is promised that is not kept."""
    fleet = make_fleet("rabbitmq", resilience_store_url=None)
    worker = fleet.worker(concurrency=1)

    assert result_of(fleet, fleet.send("enrich", orders).id) == ROWS

    assert (
        "there is no store: a stream of enrich begins anew in each run" in worker.text
    )


# --- Django ---------------------------------------------------------------------------

MODELS = """
    from django.db import models

    class Order(models.Model):
        done = models.IntegerField(default=0)
    """

TASKS = """
    import os, signal
    from celery import shared_task
    from django.conf import settings
    from django.db import transaction
    from django.db.models import F
    from celery_resilience import ResilientTask
    from shop.models import Order

    @shared_task(
        base=ResilientTask, bind=True, acks_late=True, reject_on_worker_lost=True
    )
    def enrich(self):
        for order in self.resilience.stream(Order.objects.order_by("-id"), size=10):
            Order.objects.filter(pk=order.pk).update(done=F("done") + 1)
            if order.pk == 27 and not (settings.FOLDER / "killed").exists():
                (settings.FOLDER / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

    @shared_task(base=ResilientTask, bind=True)
    def enrich_within(self):
        with transaction.atomic():
            for order in self.resilience.stream(Order.objects.all(), size=10):
                pass

    @shared_task(base=ResilientTask, bind=True)
    def enrich_slice(self):
        for order in self.resilience.stream(Order.objects.all()[:5]):
            pass
    """


def test_a_queryset_is_a_stream(tmp_path: Path) -> None:
    """By its primary key; Django commits each statement, so that a page is not undone."""
    project = Project(tmp_path / "project", models=MODELS, tasks=TASKS)
    made = project.script(
        """
        from django.core.management import call_command
        call_command("migrate", run_syncdb=True, verbosity=0)
        from shop.models import Order
        from shop.tasks import enrich, enrich_slice, enrich_within
        Order.objects.bulk_create(Order() for _ in range(50))
        for task in (enrich, enrich_within, enrich_slice):
            task.delay()
        """
    )
    assert made.returncode == 0, made.stderr

    with project.worker():
        eventually(lambda: project.failed_messages() == 2, within_s=60)
        counts = eventually(lambda: _done(project), within_s=60)

    # The page of the row at which it was killed is done again as far as it had come.
    assert counts == [1] * 20 + [2] * 7 + [1] * 23
    shown = project.manage("failed_tasks", "list", "-o", "jsonl").stdout
    assert "a page ends within atomic()" in shown
    assert "a QuerySet that is sliced has no pages" in shown


def _done(project: Project) -> list[int] | None:
    engine = create_engine(f"sqlite:///{project.folder}/shop.sqlite3")
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT done FROM shop_order ORDER BY id"))
        found = list(rows.scalars())
    engine.dispose()
    return found if 0 not in found else None
