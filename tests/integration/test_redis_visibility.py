"""On Redis, what a live worker holds is not given to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import FleetMaker, conf_for
from fleet_runner import Fleet, Worker
from polling import eventually
from services import Service
from tcp_proxy import Proxy

VISIBILITY_S = 2
OPTIONS = {
    "visibility_timeout": VISIBILITY_S,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


def with_short_visibility(fleet: Fleet) -> Fleet:
    """Let what is not renewed come back within seconds."""
    fleet.conf["broker_transport_options"].update(OPTIONS)
    return fleet


def ran_once(fleet: Fleet, ids: list[str]) -> bool:
    return all(fleet.runs(id) == 1 for id in ids)


def slept(fleet: Fleet) -> int:
    return len(fleet.notes("slept"))


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_long_and_prefetched_tasks_run_once(make_fleet: FleetMaker, pool: str) -> None:
    """Longer than the visibility timeout, running and waiting; plain ones do not."""
    fleet = with_short_visibility(make_fleet("redis", worker_prefetch_multiplier=4))
    workers = [fleet.worker(pool=pool, concurrency=1) for _ in range(2)]
    ids = [fleet.send("sleep", 3 * VISIBILITY_S).id for _ in range(4)]

    eventually(lambda: slept(fleet) >= len(ids), within_s=90)
    for worker in workers:
        assert worker.stop() == 0
    assert ran_once(fleet, ids), fleet.notes("sleep")


def test_countdowns_run_once(make_fleet: FleetMaker) -> None:
    """Longer than the visibility timeout: one run each on two workers."""
    fleet = with_short_visibility(make_fleet("redis"))
    for _ in range(2):
        fleet.worker(concurrency=1)
    ids = [fleet.send("ok", countdown=4 * VISIBILITY_S).id for _ in range(6)]

    eventually(lambda: len(fleet.notes("ok")) >= len(ids), within_s=60)
    for worker in fleet.workers:
        assert worker.stop() == 0
    assert ran_once(fleet, ids), fleet.notes("ok")


def test_plain_celery_runs_them_several_times(make_fleet: FleetMaker) -> None:
    """The test bites: without us the same tasks run more than once."""
    fleet = with_short_visibility(make_fleet("redis", is_plain=True))
    for _ in range(2):
        fleet.worker(concurrency=1)
    ids = [fleet.send("sleep", 3 * VISIBILITY_S).id for _ in range(2)]
    ids += [fleet.send("ok", countdown=4 * VISIBILITY_S).id for _ in range(2)]

    eventually(lambda: any(fleet.runs(id) > 1 for id in ids), within_s=60)


def test_a_drain_longer_than_the_timeout_runs_once(make_fleet: FleetMaker) -> None:
    """A worker that was asked to stop still holds what it runs."""
    for pool in ("prefork", "threads"):
        fleet = with_short_visibility(make_fleet("redis"))
        stopping = fleet.worker(pool=pool, concurrency=1)
        sent = fleet.send("sleep", 4 * VISIBILITY_S)
        eventually(lambda fleet=fleet, sent=sent: fleet.runs(sent.id) == 1)
        fleet.worker(concurrency=1)

        assert stopping.stop() == 0
        eventually(lambda fleet=fleet: slept(fleet) == 1)
        assert fleet.runs(sent.id) == 1, pool


def test_a_dead_worker_holds_nothing(make_fleet: FleetMaker) -> None:
    """What a killed worker ran comes back after the visibility timeout."""
    fleet = with_short_visibility(make_fleet("redis"))
    worker = fleet.worker(concurrency=1)
    sent = fleet.send("sleep", 1)
    eventually(lambda: fleet.runs(sent.id) == 1)
    worker.kill()

    fleet.worker(concurrency=1)
    eventually(lambda: slept(fleet) == 1, within_s=60)
    assert fleet.runs(sent.id) == 2


@pytest.fixture
def cut_fleet(own_server: Callable[[str], Service], tmp_path: Any) -> Any:
    """A fleet that reaches its Redis through a proxy, which can be cut."""
    opened: list[Any] = []

    def make(**more: Any) -> tuple[Fleet, Proxy]:
        server = own_server("redis")
        proxy = Proxy(server.port)
        results = tmp_path / "own-results"
        results.mkdir()
        conf = conf_for(
            "redis", tmp_path, server, result_backend=f"file://{results}", **more
        )
        conf["broker_url"] = f"redis://127.0.0.1:{proxy.port}/0"
        fleet = Fleet(tmp_path, conf)
        opened.extend((fleet, proxy))
        return fleet, proxy

    yield make
    for it in opened:
        it.close()


def reconnected(worker: Worker, times: int = 1) -> bool:
    return worker.text.count("Connected to redis") > times


def took_over(worker: Worker) -> int:
    """How often it has taken over, on a new connection, what it held."""
    return worker.text.count("after a lost connection")


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_running_task_survives_a_lost_connection(cut_fleet: Any, pool: str) -> None:
    """It goes on, runs once, and is acknowledged on the new connection."""
    fleet, proxy = cut_fleet()
    worker = fleet.worker(pool=pool, concurrency=2)
    end = fleet.folder / "end"
    sent = fleet.send("sleep", 60, str(end))
    eventually(lambda: fleet.runs(sent.id) == 1)

    proxy.cut()
    eventually(lambda: reconnected(worker), what=lambda: worker.text)
    end.touch()

    eventually(lambda: slept(fleet) == 1)
    eventually(lambda: unacked(fleet) == 0, what="the ack on the new connection")
    assert queued(fleet) == 0
    assert worker.stop() == 0
    assert fleet.runs(sent.id) == 1


def test_a_task_that_ends_while_disconnected_is_acknowledged(cut_fleet: Any) -> None:
    """Its ack waits for the new connection."""
    fleet, proxy = cut_fleet()
    worker = fleet.worker(pool="threads", concurrency=2)
    end = fleet.folder / "end"
    sent = fleet.send("sleep", 60, str(end))
    eventually(lambda: fleet.runs(sent.id) == 1)

    proxy.refuse()
    eventually(lambda: "onnection" in worker.text.split("ready.")[-1])
    end.touch()
    eventually(lambda: slept(fleet) == 1)
    proxy.accept()

    eventually(lambda: unacked(fleet) == 0, what=lambda: worker.text)
    assert queued(fleet) == 0
    assert worker.stop() == 0
    assert fleet.runs(sent.id) == 1


def test_what_had_not_started_is_given_back(cut_fleet: Any) -> None:
    """At once, not after the visibility timeout; and it runs once."""
    fleet, proxy = cut_fleet(worker_prefetch_multiplier=4)
    worker = fleet.worker(concurrency=1)
    end = fleet.folder / "end"
    first = fleet.send("sleep", 60, str(end))
    waiting = [fleet.send("ok").id for _ in range(3)]
    later = fleet.send("ok", countdown=3)
    eventually(lambda: fleet.runs(first.id) == 1)
    eventually(lambda: unacked(fleet) >= 4)

    proxy.cut()
    eventually(lambda: reconnected(worker), what=lambda: worker.text)
    end.touch()

    eventually(lambda: len(fleet.notes("ok")) == 4, within_s=60)
    eventually(lambda: unacked(fleet) == 0)
    assert worker.stop() == 0
    assert ran_once(fleet, [first.id, later.id, *waiting])
    counts = worker.outcomes()
    assert counts["received"] == counts["succeeded"] + counts["requeued"]


def test_a_task_that_is_cancelled_with_the_connection_is_given_back(
    cut_fleet: Any,
) -> None:
    """Celery has cut it off; nobody would ever acknowledge it here."""
    fleet, proxy = cut_fleet(worker_cancel_long_running_tasks_on_connection_loss=True)
    worker = fleet.worker(concurrency=1)
    end = fleet.folder / "end"
    sent = fleet.send("sleep", 60, str(end))
    eventually(lambda: fleet.runs(sent.id) == 1)

    proxy.cut()
    eventually(lambda: fleet.runs(sent.id) == 2, what=lambda: worker.text)
    end.touch()

    eventually(lambda: slept(fleet) == 1)
    eventually(lambda: unacked(fleet) == 0)
    assert queued(fleet) == 0
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 2, "requeued": 1, "succeeded": 1}


def test_what_a_pool_was_given_survives_two_lost_connections(cut_fleet: Any) -> None:
    """Celery has forgotten it since the first one; the pool runs it all the same."""
    fleet, proxy = cut_fleet(worker_prefetch_multiplier=2)
    worker = fleet.worker(pool="threads", concurrency=1)
    end = fleet.folder / "end"
    ids = [fleet.send("sleep", 60, str(end)).id for _ in range(2)]
    eventually(lambda: fleet.notes("sleep"))
    eventually(lambda: unacked(fleet) == 2)

    def is_cut(times: int) -> bool:
        if took_over(worker) >= times:
            return True
        # Again: the connection that consumes may not have been made yet.
        proxy.cut()
        return False

    for times in (1, 2):
        eventually(lambda times=times: is_cut(times), within_s=60, every_s=3)
    end.touch()

    eventually(lambda: slept(fleet) == 2)
    eventually(lambda: unacked(fleet) == 0)
    assert queued(fleet) == 0
    assert worker.stop() == 0
    assert ran_once(fleet, ids)


def test_a_connection_that_breaks_while_it_takes_over(cut_fleet: Any) -> None:
    """What it had not come to is taken over by the next one."""
    fleet, proxy = cut_fleet(worker_prefetch_multiplier=4)
    worker = fleet.worker(concurrency=1)
    end = fleet.folder / "end"
    first = fleet.send("sleep", 60, str(end)).id
    waiting = [fleet.send("ok").id for _ in range(3)]
    eventually(lambda: fleet.runs(first) == 1)
    eventually(lambda: unacked(fleet) == 4)

    proxy.refuse_at(b"HGET")  # the first word of giving a message back
    proxy.cut()
    eventually(lambda: worker.text.count("onnection to broker lost") == 2)
    assert took_over(worker) == 0
    proxy.accept()
    eventually(lambda: took_over(worker) == 1)
    end.touch()

    eventually(lambda: len(fleet.notes("ok")) == 3, what=lambda: worker.text)
    eventually(lambda: unacked(fleet) == 0)
    assert queued(fleet) == 0
    assert worker.stop() == 0
    assert ran_once(fleet, [first, *waiting])


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_unknown_task_that_is_held_outlives_its_connection(
    cut_fleet: Any, pool: str
) -> None:
    """Kept once, rejected on the new connection, and the worker lives."""
    fleet, proxy = cut_fleet()
    worker = fleet.worker(pool=pool)
    failed_queue = f"{fleet.conf['resilience_namespace']}.failed"
    with fleet.app.connection_for_write() as connection:
        client = connection.default_channel.client
        client.set(failed_queue, "no list, so that nothing can be pushed")
        sent = fleet.app.send_task("no.such.task")
        eventually(lambda: "cannot publish" in worker.text, what=lambda: worker.text)

        proxy.refuse()
        eventually(lambda: "onnection to broker lost" in worker.text)
        proxy.accept()
        client.delete(failed_queue)

    eventually(lambda: took_over(worker), what=lambda: worker.text)
    eventually(lambda: unacked(fleet) == 0, what=lambda: worker.text)
    assert fleet.record_of(sent.id)["reason"] == "unknown_task"
    assert worker.stop() == 0
    assert worker.outcomes() == {"received": 1, "failed": 1}


def test_plain_celery_starts_a_second_copy(
    own_server: Callable[[str], Service], tmp_path: Any
) -> None:
    """The test bites: the running message is given back when the connection breaks."""
    server = own_server("redis")
    proxy = Proxy(server.port)
    conf = conf_for("redis", tmp_path, server, result_backend=None)
    conf["broker_url"] = f"redis://127.0.0.1:{proxy.port}/0"
    fleet = Fleet(tmp_path, conf, is_plain=True)
    try:
        worker = fleet.worker(concurrency=2)
        end = fleet.folder / "end"
        sent = fleet.send("sleep", 60, str(end))
        eventually(lambda: fleet.runs(sent.id) == 1)
        proxy.cut()
        eventually(lambda: fleet.runs(sent.id) == 2, what=lambda: worker.text)
        end.touch()
    finally:
        fleet.close()
        proxy.close()


def unacked(fleet: Fleet) -> int:
    """Messages that a worker holds."""
    with fleet.app.connection_for_read() as connection:
        channel = connection.default_channel
        return int(channel.client.hlen(channel.unacked_key))


def queued(fleet: Fleet) -> int:
    """Messages that wait."""
    with fleet.app.connection_for_read() as connection:
        channel = connection.default_channel
        return int(channel.client.llen(fleet.conf["task_default_queue"]))
