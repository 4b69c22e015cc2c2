"""What a broker gave up is collected, told apart, and replayed like any failure."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import FleetMaker, conf_for
from fleet_runner import Fleet, Worker
from kombu import Producer, Queue
from polling import eventually

TYPES = ("classic", "quorum")


def declare(fleet: Fleet, *queues: str, **arguments: Any) -> None:
    """Make queues that the app does not know."""
    with fleet.app.connection_for_write() as connection:
        for name in queues:
            queue = Queue(name, durable=True, queue_arguments=arguments or None)
            queue(connection.default_channel).declare()


def depth(fleet: Fleet, queue: str) -> int:
    """How many messages wait in a queue of RabbitMQ."""
    with fleet.app.connection_for_read() as connection:
        return int(connection.default_channel.queue_declare(queue, passive=True)[1])


def publish(fleet: Fleet, queue: str, task_id: str = "", **options: Any) -> None:
    """Put a message on a queue; a task message if it has an id."""
    headers = {"task": "ok", "id": task_id, "lang": "py"} if task_id else {}
    with fleet.app.connection_for_write() as connection:
        Producer(connection.default_channel).publish(
            options.pop("body", b"[[7], {}, {}]"),
            exchange="",
            routing_key=queue,
            headers=headers,
            content_type="application/json",
            content_encoding="utf-8",
            **options,
        )


def effects(fleet: Fleet, task_id: str) -> int:
    """How often a task had its effect."""
    return sum(1 for line in fleet.notes("effect") if line[1] == task_id)


# --- RabbitMQ -------------------------------------------------------------------------


@dataclass
class Dead:
    """A fleet of plain Celery whose messages have died, and their task ids."""

    fleet: Fleet
    name: str
    dead: str
    ids: dict[str, str]


@pytest.fixture(scope="module", params=TYPES)
def dead(
    request: pytest.FixtureRequest, servers: Any, tmp_path_factory: Any
) -> Iterator[Dead]:
    """Every kind of death, of messages in queues and a dead-letter queue of a type."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    conf = conf_for("rabbitmq", folder, servers("rabbitmq"))
    name = conf["task_default_queue"]
    dead = f"{name}.dead"
    dies = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    conf["fleet_queues"] = {
        name: {"x-queue-type": kind, **dies},
        f"{name}.limited": {"x-queue-type": "quorum", "x-delivery-limit": 1, **dies},
    }
    conf["resilience_collect_queues"] = [dead]
    plain = Fleet(folder, conf, is_plain=True)
    fleet = Fleet(folder, conf)
    try:
        declare(plain, dead, **{"x-queue-type": kind})
        declare(plain, f"{name}.late", **{"x-message-ttl": 1, **dies})
        declare(plain, f"{name}.full", **{"x-max-length": 1, **dies})
        worker = plain.worker(concurrency=1)
        cured = str(folder / "cured")
        ids = {
            "delayed": plain.send("rejected_unless", cured, countdown=1).id,
            "rejected": plain.send("rejected_unless", cured).id,
            "limited": plain.send("killed_unless", cured, queue=f"{name}.limited").id,
            "expired": "id-expired",
            "maxlen": "id-maxlen",
        }
        publish(plain, f"{name}.late", ids["expired"])
        publish(plain, f"{name}.full", ids["maxlen"])
        publish(plain, f"{name}.full", "the newer one")
        publish(plain, f"{name}.late", body=b"hello")
        eventually(lambda: depth(plain, dead) == len(ids) + 1, what=lambda: worker.text)
        assert worker.stop() == 0
        yield Dead(fleet, name, dead, ids)
    finally:
        plain.close()
        fleet.close()


def test_each_death_has_its_reason_and_its_origin(dead: Dead) -> None:
    """By task id; one attempt each, from the queue where it died."""
    records = dead.fleet.records(failed_queue=dead.dead)
    found = {
        name: (records[id]["reason"], records[id]["queue"])
        for name, id in dead.ids.items()
    }

    assert found == {
        "delayed": ("rejected", dead.name),
        "rejected": ("rejected", dead.name),
        "limited": ("worker_lost", f"{dead.name}.limited"),
        "expired": ("expired", f"{dead.name}.late"),
        "maxlen": ("rejected", f"{dead.name}.full"),
    }
    assert {len(record["attempts"]) for record in records.values()} == {1}
    limited = records[dead.ids["limited"]]
    assert "its delivery limit of 1" in limited["message"]
    assert limited["args"] == f"('{dead.fleet.folder}/cured',)"
    assert records[dead.ids["delayed"]]["routing_key"] == dead.name
    assert records[""]["reason"] == "malformed"
    assert len(records) == len(dead.ids) + 1
    assert depth(dead.fleet, dead.dead) == 0


def test_a_replay_goes_to_its_origin_once_and_at_once(dead: Dead) -> None:
    """No death, count or delay goes along; what it dies of again is one more attempt."""
    fleet, ids = dead.fleet, [dead.ids[n] for n in ("delayed", "rejected", "limited")]
    records = fleet.records()
    expired = records[dead.ids["expired"]]
    assert fleet.failed.replay([expired["id"]]).sent == [expired["id"]]
    eventually(lambda: depth(fleet, dead.dead) == 1, what="it expired again")
    again = fleet.failed.get(expired["id"])
    assert (again.summary.state, len(again.attempts)) == ("unresolved", 2)
    assert again.summary.queue == f"{dead.name}.late"

    worker = fleet.worker(concurrency=1)
    (fleet.folder / "cured").touch()
    sent = fleet.failed.replay([records[id]["id"] for id in ids]).sent
    assert len(sent) == len(ids)
    eventually(lambda: all(effects(fleet, id) for id in ids), what=lambda: worker.text)
    eventually(
        lambda: {fleet.records()[id]["state"] for id in ids} == {"resolved"},
        every_s=0.2,
    )
    assert worker.stop() == 0
    assert [effects(fleet, id) for id in ids] == [1, 1, 1]
    assert worker.outcomes() == {"received": 3, "succeeded": 3}


def test_what_we_kept_and_the_broker_moved_is_one_failure(
    make_fleet: FleetMaker, servers: Any
) -> None:
    """A rejected task of ours is captured, and its message dies all the same."""
    fleet = make_fleet("rabbitmq")
    name = fleet.conf["task_default_queue"]
    dies = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{name}.dead"}
    fleet = make_fleet(
        "rabbitmq",
        task_default_queue=name,
        fleet_queues={name: dies},
        resilience_collect_queues=[f"{name}.dead"],
    )
    declare(fleet, f"{name}.dead")
    worker = fleet.worker()
    sent = fleet.send("rejected")
    eventually(lambda: depth(fleet, f"{name}.dead") == 1, what=lambda: worker.text)

    record = fleet.record_of(sent.id)

    assert depth(fleet, f"{name}.dead") == 0
    assert len(record["attempts"]) == 1
    assert record["exception"] == "celery.exceptions.Reject"
    assert record["failed_queue"] == fleet.conf["resilience_namespace"] + ".failed"
    fleet.failed.replay([record["id"]])
    eventually(lambda: depth(fleet, f"{name}.dead") == 1, what=lambda: worker.text)
    assert len(fleet.records()[sent.id]["attempts"]) == 2


def test_a_delayed_task_that_we_kept_is_replayed_at_once(
    make_fleet: FleetMaker,
) -> None:
    """RabbitMQ's native delay has left its marks on the message."""
    fleet = make_fleet("rabbitmq-quorum")
    name = fleet.conf["task_default_queue"]
    worker = fleet.worker()
    cured = fleet.folder / "cured"
    sent = fleet.send("boom_unless", str(cured), countdown=2)
    record = fleet.record_of(sent.id)
    original = fleet.failed.get(record["id"]).original
    assert original.headers["x-first-death-queue"].startswith("celery_delayed_")
    assert (record["exchange"], record["routing_key"]) == ("", name)

    cured.touch()
    fleet.failed.replay([record["id"]])

    eventually(lambda: effects(fleet, sent.id), what=lambda: worker.text, within_s=2)
    eventually(lambda: fleet.records()[sent.id]["state"] == "resolved", every_s=0.2)
    assert effects(fleet, sent.id) == 1


# --- any broker -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broker", "point"),
    [
        ("rabbitmq", "after-take"),
        ("rabbitmq", "after-keep"),
        ("redis", "after-keep"),
        ("filesystem", "after-keep"),
    ],
)
def test_the_collector_is_killed(
    make_fleet: FleetMaker, broker: str, point: str
) -> None:
    """Between taking, commit and ack: every record once, with one attempt."""
    fleet = make_fleet(broker)
    name = fleet.conf["task_default_queue"]
    dead = f"{name}.dead"
    fleet.conf["resilience_collect_queues"] = [dead]
    fleet = Fleet(fleet.folder, fleet.conf)
    declare(fleet, dead)
    if broker == "rabbitmq":
        dies = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
        declare(fleet, name, **{"x-message-ttl": 1, **dies})
    for number in range(5):
        publish(fleet, name if broker == "rabbitmq" else dead, f"id-{number}")
    if broker == "rabbitmq":
        eventually(lambda: depth(fleet, dead) == 5)

    killed = fleet.command("failed", "collect", "--once", kill_at=point)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    records = fleet.records()
    assert set(records) == {f"id-{number}" for number in range(5)}
    assert {len(record["attempts"]) for record in records.values()} == {1}
    assert {record["queue"] for record in records.values()} == {name}
    assert fleet.failed.collect().documents == 0


def test_a_list_on_redis_is_collected_whatever_its_priorities(
    make_fleet: FleetMaker,
) -> None:
    """What somebody moved there goes back to where it was sent."""
    fleet = make_fleet("redis")
    name = fleet.conf["task_default_queue"]
    fleet = make_fleet(
        "redis",
        task_default_queue=name,
        broker_transport_options=fleet.conf["broker_transport_options"],
        resilience_collect_queues=[f"{name}.dead"],
    )
    worker = fleet.worker()
    publish(fleet, f"{name}.dead", "straight-there", priority=6)
    publish(fleet, f"{name}.other", "moved")
    with fleet.app.connection_for_write() as connection:
        client = connection.default_channel.client
        prefix = fleet.conf["broker_transport_options"]["global_keyprefix"]
        client.execute_command(
            "RENAME", f"{prefix}{name}.other", f"{prefix}{name}.dead"
        )
        client.lpush(f"{name}.dead", b"not even json")

    records = fleet.records()
    assert {id: record["reason"] for id, record in records.items()} == {
        "straight-there": "manual",
        "moved": "manual",
        "": "malformed",
    }
    assert records["moved"]["queue"] == f"{name}.other"
    assert records["straight-there"]["queue"] == name
    fleet.failed.replay([records["straight-there"]["id"]])
    eventually(lambda: fleet.runs("straight-there") == 1, what=lambda: worker.text)


# --- mistakes -------------------------------------------------------------------------


def test_a_queue_that_is_missing_is_told_once(
    make_fleet: FleetMaker, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are collected, and nobody makes it."""
    fleet = make_fleet("rabbitmq")
    name = fleet.conf["task_default_queue"]
    fleet.app.conf.resilience_collect_queues = [f"{name}.gone", f"{name}.dead"]
    declare(fleet, f"{name}.dead")
    failed = fleet.failed
    with caplog.at_level(logging.WARNING, "celery_resilience.failed"):
        for number in range(3):
            publish(fleet, f"{name}.dead", f"id-{number}")
            assert failed.collect().documents == 1

    assert caplog.text.count(f"{name}.gone of resilience_collect_queues") == 1
    assert "NOT_FOUND" in caplog.text
    with (
        fleet.app.connection_for_read() as connection,
        pytest.raises(connection.channel_errors, match="NOT_FOUND"),
    ):
        connection.channel().queue_declare(f"{name}.gone", passive=True)


@pytest.mark.parametrize("is_default", [True, False])
def test_a_queue_of_tasks_is_refused(make_fleet: FleetMaker, is_default: bool) -> None:
    """Its tasks would be taken for failures: the worker says so and does not start."""
    fleet = make_fleet("redis")
    name = fleet.conf["task_default_queue"]
    queue = name if is_default else f"{name}.dead"
    fleet.conf["resilience_collect_queues"] = [queue]
    worker = Worker(fleet, "-Q", queue, name="x")
    fleet.workers.append(worker)
    worker.start(ready=False)

    assert worker.wait() != 0
    assert "Traceback" not in worker.text
    assert (
        "is the app's task_default_queue" if is_default else "cannot be consumed as"
    ) in worker.text
    if is_default:
        refused = fleet.command("failed", "list")
        assert refused.returncode == 2
        assert "resilience_collect_queues" in refused.stderr


def test_a_running_worker_is_not_given_one(make_fleet: FleetMaker) -> None:
    """Nor by `celery control add_consumer`; a failed queue that is listed is harmless."""
    fleet = make_fleet("redis")
    name = fleet.conf["task_default_queue"]
    failed_queue = f"{fleet.conf['resilience_namespace']}.failed"
    fleet.conf["resilience_collect_queues"] = [f"{name}.dead", failed_queue]
    fleet = Fleet(fleet.folder, fleet.conf)
    try:
        worker = fleet.worker()
        assert f"dead-letter queues {name}.dead; " in worker.text
        fleet.app.control.add_consumer(f"{name}.dead")
        eventually(
            lambda: "refused to consume" in worker.text, what=lambda: worker.text
        )
        sent = fleet.send("boom")
        record = fleet.record_of(sent.id)
    finally:
        fleet.close()

    assert (record["reason"], record["failed_queue"]) == ("exception", failed_queue)
    assert len(record["attempts"]) == 1
