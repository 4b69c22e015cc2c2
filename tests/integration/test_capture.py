"""A failed task is stored before its message is acknowledged, whatever breaks."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FleetMaker, conf_for
from fleet_runner import Fleet, Worker
from kombu import Queue
from polling import eventually
from services import Service

#: Short, so that what a killed worker held comes back soon.
QUICK_REDIS = {
    # A worker that is killed as it looks for messages of dead ones bars the others.
    "unacked_mutex_expire": 2,
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}

OwnFleet = Callable[..., tuple[Fleet, Service]]


@pytest.fixture
def own_fleet(
    own_server: Callable[[str], Service], tmp_path: Path
) -> Iterator[OwnFleet]:
    """A fleet with a broker that the test may kill."""
    fleets: list[Fleet] = []

    def make(broker: str, **more: Any) -> tuple[Fleet, Service]:
        server = own_server(broker)
        # Results elsewhere: Celery's backends do not survive a server's death.
        results = tmp_path / "own-results"
        results.mkdir()
        more.setdefault("result_backend", f"file://{results}")
        fleet = Fleet(tmp_path, conf_for(broker, tmp_path, server, **more))
        fleets.append(fleet)
        return fleet, server

    yield make
    for fleet in fleets:
        fleet.close()


def lost_broker(worker: Worker) -> bool:
    """The worker has noticed that the broker is gone."""
    return "Trying to re-establish the connection" in worker.text or (
        "onnection to broker lost" in worker.text
    )


@pytest.mark.parametrize("task", ["fail_when", "fail_when_early"])
@pytest.mark.parametrize(
    ("broker", "pool"),
    [("redis", "prefork"), ("redis", "threads"), ("rabbitmq", "prefork")],
)
def test_the_broker_is_down_at_capture(
    own_fleet: OwnFleet, broker: str, pool: str, task: str
) -> None:
    """Exactly one record, once the broker is back."""
    fleet, server = own_fleet(broker)
    worker = fleet.worker(pool=pool)
    end = fleet.folder / "end"
    sent = fleet.send(task, str(end))
    eventually(lambda: fleet.runs(sent.id) == 1)

    server.kill()
    eventually(lambda: lost_broker(worker), what=lambda: worker.text)
    end.touch()
    eventually(lambda: fleet.notes("failing"))
    server.start()

    record = fleet.record_of(sent.id, within_s=60)
    assert record["reason"] == "exception"
    assert list(fleet.records()) == [sent.id]
    assert worker.is_alive
    if broker == "redis":
        # RabbitMQ delivers again what was unacknowledged when the connection broke,
        # and after a kill of its own also what it had not yet noted as acknowledged.
        assert fleet.runs(sent.id) == 1
        assert len(record["attempts"]) == 1


def test_what_the_broker_delivers_again_is_not_sent_again(
    own_fleet: OwnFleet,
) -> None:
    """
    One further run of what snoozed, or lost its child, while RabbitMQ was away.

    What was acknowledged early has its copy only.
    """
    fleet, server = own_fleet("rabbitmq", worker_prefetch_multiplier=2)
    worker = fleet.worker(concurrency=3)
    end = fleet.folder / "end"
    ids = [fleet.send(name, str(end)).id for name in ("die_when", "snooze_when")]
    early = fleet.send("snooze_when_early", str(end)).id
    eventually(lambda: all(fleet.runs(id) == 1 for id in (*ids, early)))

    server.kill()
    eventually(lambda: lost_broker(worker), what=lambda: worker.text)
    end.touch()
    eventually(lambda: len(fleet.notes("ending")) == 3)
    server.start()

    eventually(
        lambda: {line[1] for line in fleet.notes("effect")} == {*ids, early},
        within_s=60,
        what=lambda: worker.text,
    )
    # Due after everything that could have been sent again.
    last = fleet.send("sleep", 0, countdown=3)
    eventually(lambda: fleet.runs(last.id) == 1)
    assert worker.stop() == 0
    assert [fleet.runs(id) for id in ids] == [2, 2], (
        f"{fleet.notes()} {worker.text[-6000:]}"
    )


def test_the_spool_takes_what_the_broker_does_not(own_fleet: OwnFleet) -> None:
    """One file a failure while the broker is away; none once it is back."""
    fleet, server = own_fleet("redis", resilience_spool_dir="spool")
    spool = fleet.folder / "spool"
    worker = fleet.worker(pool="threads", concurrency=4)
    end = fleet.folder / "end"
    tasks = ["fail_when", "fail_when", "fail_when_early", "fail_when_early"]
    ids = [fleet.send(task, str(end)).id for task in tasks]
    eventually(lambda: all(fleet.runs(id) == 1 for id in ids))

    server.kill()
    end.touch()
    eventually(
        lambda: len(list(spool.glob("*.envelope.json"))) == 4, what=lambda: worker.text
    )
    server.start()

    eventually(lambda: set(fleet.records()) == set(ids), every_s=0.3, within_s=60)
    assert not list(spool.iterdir())
    assert all(fleet.runs(id) == 1 for id in ids)


def test_a_spool_is_drained_by_the_next_worker_and_by_the_collector(
    own_fleet: OwnFleet,
) -> None:
    """What a worker left when it was killed is not forgotten."""
    fleet, server = own_fleet("redis", resilience_spool_dir="spool")
    spool = fleet.folder / "spool"
    ids = []
    for drain in ("worker", "collector"):
        end = fleet.folder / f"end-{drain}"
        worker = fleet.worker(pool="threads")
        sent = fleet.send("fail_when_early", str(end))
        ids.append(sent.id)
        eventually(lambda id=sent.id: fleet.runs(id) == 1)
        server.kill()
        end.touch()
        eventually(
            lambda: list(spool.glob("*.envelope.json")),
            what=lambda worker=worker: worker.text,
        )
        worker.kill()
        server.start()

        if drain == "worker":
            draining = fleet.worker()
            eventually(lambda: not list(spool.iterdir()))
            assert draining.stop() == 0
        else:
            assert fleet.command("failed", "collect", "--once").returncode == 0
            assert not list(spool.iterdir())
        eventually(lambda: set(fleet.records()) == set(ids), every_s=0.3)
    assert all(len(r["attempts"]) == 1 for r in fleet.records().values())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; only root can make one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode != 0:
        assert os.environ.get("CI") != "true", made.stderr
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_spool_is_full(own_fleet: OwnFleet, tiny_disk: Path) -> None:
    """Nothing is acknowledged, nothing is lost, and it is said."""
    (tiny_disk / "filler").write_bytes(b"x" * 60_000)
    fleet, server = own_fleet("redis", resilience_spool_dir=str(tiny_disk))
    worker = fleet.worker(pool="threads", concurrency=4)
    end = fleet.folder / "end"
    ids = [fleet.send("fail_when", str(end)).id for _ in range(4)]
    eventually(lambda: all(fleet.runs(id) == 1 for id in ids))

    server.kill()
    end.touch()
    eventually(lambda: "takes nothing" in worker.text, what=lambda: worker.text)
    assert not list(tiny_disk.glob(".*"))
    server.start()

    eventually(lambda: set(fleet.records()) == set(ids), every_s=0.3, within_s=60)
    assert all(fleet.runs(id) == 1 for id in ids)


def test_a_failed_queue_that_refuses(own_fleet: OwnFleet) -> None:
    """What it refuses stays unacknowledged until it has room again."""
    fleet, _ = own_fleet("rabbitmq", worker_prefetch_multiplier=4)
    failed_queue = f"{fleet.conf['resilience_namespace']}.failed"
    with fleet.app.connection_for_write() as connection:
        Queue(
            failed_queue,
            durable=True,
            queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"},
        )(connection.default_channel).declare()
    worker = fleet.worker()
    ids = [fleet.send("rejected").id for _ in range(3)]
    eventually(lambda: "cannot publish" in worker.text, what=lambda: worker.text)

    with fleet.app.connection_for_read() as connection:
        depth = Queue(failed_queue)(connection.default_channel).queue_declare(
            passive=True
        )
    assert depth.message_count == 1
    eventually(lambda: set(fleet.records()) == set(ids), every_s=1, within_s=90)
    assert all(len(r["attempts"]) == 1 for r in fleet.records().values())
    assert worker.stop() == 0


def test_one_refusing_failed_queue_does_not_hold_up_another(
    own_fleet: OwnFleet,
) -> None:
    """Only the failures that are routed to it wait."""
    fleet, _ = own_fleet("rabbitmq", resilience_failed_routes={"boom": "small.failed"})
    with fleet.app.connection_for_write() as connection:
        Queue(
            "small.failed",
            durable=True,
            queue_arguments={"x-max-length": 0, "x-overflow": "reject-publish"},
        )(connection.default_channel).declare()
    worker = fleet.worker()
    fleet.send("boom")
    eventually(lambda: "cannot publish" in worker.text, what=lambda: worker.text)
    other = fleet.send("rejected")

    assert fleet.record_of(other.id)["reason"] == "rejected"
    assert list(fleet.records()) == [other.id]


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_killed_between_capture_and_ack(make_fleet: FleetMaker, broker: str) -> None:
    """The redelivered failure is the same record, and not a second attempt."""
    fleet = make_fleet(broker, task_acks_late=True)
    if broker == "redis":
        fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    worker = fleet.worker(kill_at="before-ack-of-failure")
    sent = fleet.send("boom")
    worker.wait()
    second = fleet.worker()
    eventually(lambda: fleet.runs(sent.id) == 2, within_s=60)
    eventually(lambda: "task failed: boom" in second.text)

    record = fleet.record_of(sent.id)
    assert second.stop() == 0
    assert list(fleet.records()) == [sent.id]
    assert len(fleet.record_of(sent.id)["attempts"]) == 1
    assert record["state"] == "unresolved"


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_redelivery_that_succeeds_resolves_what_was_captured(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Else its replay would double the effect."""
    fleet = make_fleet(broker, task_acks_late=True)
    if broker == "redis":
        fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    cured = fleet.folder / "cured"
    worker = fleet.worker(kill_at="before-ack-of-failure")
    sent = fleet.send("boom_unless", str(cured))
    worker.wait()
    cured.touch()
    fleet.worker()
    eventually(lambda: fleet.notes("effect"), within_s=60)

    record = eventually(
        lambda: (r := fleet.record_of(sent.id))["state"] == "resolved" and r
    )
    assert len(record["attempts"]) == 1
    report = fleet.failed.replay([record["id"]])
    assert report.sent == []
    assert len(fleet.notes("effect")) == 1


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_redelivery_beside_its_own_replay_does_not_run(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Captured, killed before the ack, replayed: the effect happens once."""
    fleet = make_fleet(broker, task_acks_late=True)
    if broker == "redis":
        fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    cured = fleet.folder / "cured"
    worker = fleet.worker(kill_at="before-ack-of-failure")
    sent = fleet.send("boom_unless", str(cured))
    worker.wait()
    cured.touch()
    report = fleet.failed.replay([fleet.record_of(sent.id)["id"]])
    assert len(report.sent) == 1

    second = fleet.worker()
    eventually(lambda: second.text.count(f"{sent.id}] received") == 2, within_s=60)
    eventually(lambda: fleet.record_of(sent.id)["state"] == "resolved")
    assert second.stop() == 0
    assert len(fleet.notes("effect")) == 1
    assert second.outcomes()["received"] == 2


def test_a_retry_that_cannot_be_published_is_a_failure(own_fleet: OwnFleet) -> None:
    """Once, with what the broker said and what the task had raised."""
    fleet, server = own_fleet("redis", task_publish_retry=False)
    worker = fleet.worker()
    end = fleet.folder / "end"
    sent = fleet.send("retry_when", str(end))
    eventually(lambda: fleet.runs(sent.id) == 1)

    server.kill()
    eventually(lambda: lost_broker(worker), what=lambda: worker.text)
    end.touch()
    eventually(lambda: "RetryNotPublished" in worker.text, what=lambda: worker.text)
    server.start()

    record = fleet.record_of(sent.id, within_s=60)
    assert record["exception"] == "celery_resilience.errors.RetryNotPublished"
    assert "ValueError: it was time" in record["message"]
    assert list(fleet.records()) == [sent.id]


def test_what_nobody_takes_is_told_at_the_end(own_fleet: OwnFleet) -> None:
    """An early-acked failure that a stopping worker still holds goes to the log."""
    fleet, server = own_fleet("redis", broker_connection_max_retries=None)
    worker = fleet.worker(pool="threads")
    end = fleet.folder / "end"
    sent = fleet.send("fail_when_early", str(end))
    eventually(lambda: fleet.runs(sent.id) == 1)

    server.kill()
    end.touch()
    eventually(lambda: "cannot publish" in worker.text, what=lambda: worker.text)
    worker.signal(signal.SIGTERM)
    worker.wait()

    assert "LOST unless this line is kept" in worker.text
    assert sent.id in worker.text.split("LOST unless", 1)[1]


@pytest.mark.parametrize("task", ["huge_text", "odd_text", "hostile"])
def test_hostile_texts(make_fleet: FleetMaker, task: str) -> None:
    """5 MB, NUL, lone surrogates and a text that raises change nothing."""
    for store in ("sqlite", "postgresql"):
        fleet = make_fleet("redis", store=store)
        fleet.worker()
        sent = fleet.send(task)

        record = fleet.record_of(sent.id)
        assert record["reason"] == "exception"
        assert len(record["message"]) < 10_000
        assert len(record["traceback"]) < 100_000
        assert "\0" not in record["message"] + record["traceback"]
        for words in (["list"], ["show", "-v", record["id"]]):
            shown = fleet.command("failed", *words)
            assert shown.returncode == 0, shown.stderr
            assert "\x1b" not in shown.stdout
            assert "\a" not in shown.stdout


def test_plain_celery_forgets_a_failure(make_fleet: FleetMaker) -> None:
    """Of a task that failed plain Celery leaves nothing on the broker."""
    for is_plain in (True, False):
        fleet = make_fleet("redis", is_plain=is_plain)
        worker = fleet.worker()
        sent = fleet.send("boom")
        eventually(
            lambda sent=sent: sent.state == "FAILURE",
            what=lambda worker=worker: worker.text,
        )
        assert worker.stop() == 0

        prefix = fleet.conf["broker_transport_options"]["global_keyprefix"]
        with fleet.app.connection_for_read() as connection:
            client = connection.default_channel.client
            keys = [k.decode() for k in client.keys(f"{prefix}*")]
        left = {key for key in keys if "_kombu" not in key}
        assert left == (set() if is_plain else {f"{prefix}{prefix[:-1]}.failed"})


def test_a_task_id_that_is_used_again_hides_no_failure(make_fleet: FleetMaker) -> None:
    """Its first failure was discarded; its next message is redelivered, and fails."""
    fleet = make_fleet("redis", worker_prefetch_multiplier=4)
    worker = fleet.worker(concurrency=1)
    fleet.send("boom", task_id="daily")
    fleet.failed.discard([fleet.record_of("daily")["id"]])
    end = fleet.folder / "end"
    busy = fleet.send("sleep", 60, str(end))
    eventually(lambda: fleet.runs(busy.id) == 1)
    fleet.send("boom", task_id="daily")
    eventually(lambda: worker.text.count("Task boom[daily] received") == 2)
    worker.signal(signal.SIGTERM)
    end.touch()
    assert worker.stop() == 0
    assert fleet.runs("daily") == 1

    fleet.worker()
    record = eventually(
        lambda: (r := fleet.records()["daily"])["state"] == "unresolved" and r,
        every_s=0.3,
    )
    assert len(record["attempts"]) == 2
