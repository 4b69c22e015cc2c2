"""The collector makes neither a loss nor a second record, wherever it dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import always, eventually
from services import Service
from sqlalchemy import create_engine, text

COUNT = 20


def with_failures(fleet: Fleet, count: int = COUNT) -> list[str]:
    """Fail some tasks, and stop the worker; nothing is collected yet."""
    worker = fleet.worker()
    ids = [fleet.send("boom").id for _ in range(count)]
    # A storm is summed up in the log, and not told one by one.
    eventually(lambda: sum(map(fleet.runs, ids)) == count, within_s=60)
    assert worker.stop() == 0
    return ids


@pytest.mark.parametrize(
    ("broker", "store"),
    [
        ("rabbitmq", "sqlite"),
        ("filesystem", "sqlite"),
        ("redis", "mariadb"),
    ],
)
@pytest.mark.parametrize(
    "point", ["after-take", "before-keep", "before-commit", "after-keep"]
)
def test_the_collector_is_killed(
    make_fleet: FleetMaker, broker: str, store: str, point: str
) -> None:
    """Between taking, upsert, commit and ack: every record once, with one attempt."""
    fleet = make_fleet(broker, store=store)
    ids = with_failures(fleet)

    killed = fleet.command("failed", "collect", "--once", kill_at=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert fleet.command("failed", "collect", "--once").returncode == 0

    records = fleet.records()
    assert set(records) == set(ids)
    assert all(len(record["attempts"]) == 1 for record in records.values())
    again = fleet.failed.collect()
    assert again.documents == 0


@pytest.mark.parametrize(
    ("broker", "store"),
    [("redis", "sqlite"), ("rabbitmq", "sqlite"), ("redis", "mariadb")],
)
def test_two_collectors_at_once(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """They share the work, and double nothing."""
    fleet = make_fleet(broker, store=store)
    ids = with_failures(fleet, 100)
    with fleet.start_commands(*[("failed", "collect", "--once")] * 3) as commands:
        codes = [command.wait(60) for command in commands]

    assert codes == [0, 0, 0]
    records = fleet.records()
    assert set(records) == set(ids)
    assert all(len(record["attempts"]) == 1 for record in records.values())


@pytest.mark.parametrize("store", ["postgresql", "mariadb"])
def test_the_store_is_down(
    make_fleet: FleetMaker, own_server: Callable[[str], Service], store: str
) -> None:
    """Nothing is acknowledged until it is back; a command exits 4 meanwhile."""
    database = own_server(store)
    fleet = make_fleet("redis", resilience_store_url=database.url)
    ids = with_failures(fleet, 5)
    database.kill()

    down = fleet.command("failed", "list")
    assert down.returncode == 4
    assert "unreachable" in down.stderr
    assert "Traceback" not in down.stderr
    database.start()

    assert set(fleet.records()) == set(ids)


def test_a_worker_collects_too(make_fleet: FleetMaker) -> None:
    """`--collect-failed` runs a process that ends with the worker, even a killed one."""
    fleet = make_fleet("redis")
    store = fleet.failed.store
    for how in ("stop", "kill"):
        worker = fleet.worker("--collect-failed")
        sent = fleet.send("boom")
        eventually(
            lambda sent=sent: store.resolve(sent.id),
            what=lambda worker=worker: worker.text,
        )
        collector = collector_of(worker)
        if how == "stop":
            assert worker.stop() == 0
        else:
            worker.signal(signal.SIGKILL)
        eventually(lambda pid=collector: not psutil.pid_exists(pid))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_collector_that_ends_is_started_again(
    make_fleet: FleetMaker, pool: str
) -> None:
    """The worker says so; nothing is lost meanwhile."""
    fleet = make_fleet("redis")
    store = fleet.failed.store
    worker = fleet.worker("--collect-failed", pool=pool)
    collector = collector_of(worker) if pool == "prefork" else worker.children()[0]
    os.kill(collector, signal.SIGKILL)
    sent = fleet.send("boom")

    eventually(lambda: store.resolve(sent.id), what=lambda: worker.text)
    assert f"the collector (pid {collector}) ended with exit code -9" in worker.text
    assert worker.stop() == 0


def test_a_worker_on_gevent_collects_too(make_fleet: FleetMaker) -> None:
    """One that ends there is not started again, and the worker says so."""
    fleet = make_fleet("redis")
    store = fleet.failed.store
    worker = fleet.worker("--collect-failed", pool="gevent")
    sent = fleet.send("boom")
    eventually(lambda: store.resolve(sent.id), what=lambda: worker.text)

    (collector,) = worker.children()
    os.kill(collector, signal.SIGKILL)
    eventually(lambda: "start the worker again, or" in worker.text)
    assert worker.stop() == 0


def backends(postgresql: Service) -> list[Any]:
    """The processes of a server that talk to its clients."""
    parents = [psutil.Process(process.pid) for process in postgresql.processes]
    return [child for parent in parents for child in parent.children(recursive=True)]


def test_a_store_that_hangs_does_not_hold_up_a_stop(
    make_fleet: FleetMaker, own_server: Callable[[str], Service]
) -> None:
    """The embedded collector is killed, and what it held is collected later."""
    postgresql = own_server("postgresql")
    fleet = make_fleet("redis", resilience_store_url=postgresql.url)
    store = fleet.failed.store
    worker = fleet.worker("--collect-failed")
    first = fleet.send("boom")
    eventually(lambda: store.resolve(first.id), what=lambda: worker.text)

    frozen = backends(postgresql)
    for process in frozen:
        process.suspend()
    try:
        second = fleet.send("boom")
        eventually(lambda: worker.text.count("task failed: boom") == 2)
        always(lambda: worker.is_alive, for_s=2, what="the collector begins to collect")
        assert worker.stop(within_s=20) == 0
    finally:
        for process in frozen:
            process.resume()
    assert fleet.record_of(second.id)["state"] == "unresolved"


def test_an_embedded_collector_waits_for_its_store(
    make_fleet: FleetMaker, own_server: Callable[[str], Service]
) -> None:
    """It says what is wrong, and goes on."""
    postgresql = own_server("postgresql")
    fleet = make_fleet("redis", resilience_store_url=postgresql.url)
    worker = fleet.worker("--collect-failed")
    postgresql.kill()
    sent = fleet.send("boom")
    eventually(lambda: "cannot collect" in worker.text, what=lambda: worker.text)
    postgresql.start()

    eventually(lambda: fleet.failed.store.resolve(sent.id), every_s=0.5, within_s=60)


def test_a_failed_queue_is_not_consumed_as_tasks(make_fleet: FleetMaker) -> None:
    """The worker refuses to start, and says how to empty it."""
    fleet = make_fleet("redis")
    worker = Worker(
        fleet, "-Q", f"{fleet.conf['resilience_namespace']}.failed", name="x"
    )
    fleet.workers.append(worker)
    worker.start(ready=False)

    assert worker.wait() != 0
    assert "a failed queue cannot be consumed as tasks" in worker.text
    assert "Traceback" not in worker.text


def test_a_failed_queue_is_not_added_to_a_running_worker(
    make_fleet: FleetMaker,
) -> None:
    """Nor by `celery control add_consumer`."""
    fleet = make_fleet("redis")
    worker = fleet.worker()
    failed_queue = f"{fleet.conf['resilience_namespace']}.failed"
    fleet.app.control.add_consumer(failed_queue)
    eventually(lambda: "refused to consume" in worker.text, what=lambda: worker.text)
    sent = fleet.send("boom")

    assert fleet.record_of(sent.id)["state"] == "unresolved"


def test_collect_failed_needs_a_store(make_fleet: FleetMaker) -> None:
    """Without one the worker refuses to start, naming the setting."""
    fleet = make_fleet("rabbitmq", resilience_store_url=None, result_backend=None)
    worker = Worker(fleet, "--collect-failed", name="x")
    fleet.workers.append(worker)
    worker.start(ready=False)

    assert worker.wait() != 0
    assert "resilience_store_url" in worker.text


def test_without_a_store_failed_tasks_stay_in_their_queue(
    make_fleet: FleetMaker,
) -> None:
    """Commands exit 2 and name the setting; once there is a store, all is there."""
    fleet = make_fleet("rabbitmq", resilience_store_url=None, result_backend=None)
    ids = with_failures(fleet, 3)
    refused = fleet.command("failed", "list")
    assert refused.returncode == 2
    assert "resilience_store_url" in refused.stderr

    later = Fleet(
        fleet.folder / "later",
        fleet.conf | {"resilience_store_url": f"sqlite:///{fleet.folder}/s.sqlite3"},
    )
    assert set(later.records()) == set(ids)


def test_something_else_on_a_failed_queue_is_kept(make_fleet: FleetMaker) -> None:
    """It is no envelope, but it is somebody's message."""
    fleet = make_fleet("redis")
    failed_queue = f"{fleet.conf['resilience_namespace']}.failed"
    fleet.app.tasks["ok"].apply_async(("x",), queue=failed_queue)
    with fleet.app.connection_for_write() as connection:
        connection.default_channel.client.lpush(failed_queue, b"not even json")

    found = fleet.failed.list(limit=None)
    assert {record.summary.reason for record in found} == {"malformed"}
    assert sorted(record.summary.task for record in found) == ["", "ok"]


def collector_of(worker: Worker) -> int:
    """The pid of a worker's embedded collector: the child that has no pool task."""

    def look() -> Any:
        children = psutil.Process(worker.pid).children()
        inspected = worker.fleet.app.control.inspect(timeout=1).stats() or {}
        pool = {
            pid for stats in inspected.values() for pid in stats["pool"]["processes"]
        }
        return [child.pid for child in children if child.pid not in pool]

    (pid,) = eventually(look, what="the collector's pid")
    return int(pid)


def test_a_newer_schema_is_refused(make_fleet: FleetMaker) -> None:
    """A store of a later release is not touched, and the command says so."""
    fleet = make_fleet("filesystem")
    fleet.records()
    engine = create_engine(fleet.conf["resilience_store_url"])
    with engine.begin() as connection:
        connection.execute(text("UPDATE resilience_schema SET version = 99"))
    engine.dispose()

    refused = fleet.command("failed", "list")
    assert refused.returncode == 2
    assert "version 99" in refused.stderr
    assert "upgrade celery-resilience" in refused.stderr
