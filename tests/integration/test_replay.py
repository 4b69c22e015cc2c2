"""Replay cannot hurt: nothing is lost, and nothing runs twice because of it."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import pytest
from celery import chain
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import always, eventually
from tcp_proxy import proxy_to, url_through

QUICK_REDIS = {
    # A worker that is killed as it looks for messages of dead ones bars the others.
    "unacked_mutex_expire": 2,
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


def with_failures(fleet: Fleet, count: int) -> list[str]:
    """Fail tasks that will succeed once the file `cured` is there."""
    cured = str(fleet.folder / "cured")
    ids = [fleet.send("boom_unless", cured).id for _ in range(count)]
    eventually(
        lambda: len(fleet.records()) == count, within_s=120, every_s=1, what="records"
    )
    return ids


def cure(fleet: Fleet) -> None:
    """Let them succeed."""
    (fleet.folder / "cured").touch()


def effects(fleet: Fleet) -> Counter[str]:
    """How often each task had its effect."""
    return Counter(line[1] for line in fleet.notes("effect"))


def states(fleet: Fleet) -> Counter[str]:
    """How many records are in which state."""
    counts = fleet.failed.stats()
    return Counter(
        {
            state: counts[state]
            for state in ("unresolved", "replaying", "resolved", "discarded")
            if counts[state]
        }
    )


def state_of(fleet: Fleet, task_id: str) -> str:
    """A result's state now; a handle remembers the failure that it saw."""
    return str(fleet.app.AsyncResult(task_id).state)


GAPS = [
    "after-claim",
    "before-publish-1",
    "after-publish-1",
    "before-publish-57",
    "after-publish-57",
    "before-mark-2",
    "after-mark-2",
    "after-publish-333",
    "before-mark-5",
    "after-claim-7",
    "after-publish-640",
]


def test_the_command_is_killed_at_every_gap(make_fleet: FleetMaker) -> None:
    """1 000 tasks, 11 deaths of the command: each has its effect exactly once."""
    fleet = make_fleet("rabbitmq", store="mariadb")
    fleet.worker(concurrency=2)
    ids = with_failures(fleet, 1_000)
    cure(fleet)

    for gap in GAPS:
        killed = fleet.command("failed", "replay", "--all", "--yes", kill_at=gap)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
    done = fleet.command("failed", "replay", "--all", "--yes", "--wait", kill_at="no")
    assert done.returncode == 0, done.stderr

    def all_resolved() -> bool:
        fleet.command("failed", "collect", "--once", kill_at="no")
        return states(fleet) == {"resolved": 1_000}

    eventually(all_resolved, within_s=60, what=str(states(fleet)))
    assert effects(fleet) == dict.fromkeys(ids, 1)


@pytest.mark.parametrize("store", ["sqlite", "mariadb"])
def test_three_operators_replay_the_same_ids(
    make_fleet: FleetMaker, store: str
) -> None:
    """Each record is sent by one of them."""
    fleet = make_fleet("redis", store=store)
    fleet.worker()
    ids = with_failures(fleet, 60)
    cure(fleet)
    records = [record["id"] for record in fleet.records().values()]
    with fleet.start_commands(*[("failed", "replay", *records)] * 3) as commands:
        codes = [command.wait(60) for command in commands]

    assert set(codes) <= {0, 1}
    eventually(lambda: states(fleet) == {"resolved": 60}, within_s=60, every_s=0.5)
    assert effects(fleet) == dict.fromkeys(ids, 1)
    assert {r["replays"] for r in fleet.records().values()} == {1}


def test_the_queue_is_missing(make_fleet: FleetMaker) -> None:
    """RabbitMQ: the record is unresolved again, NO_ROUTE is shown, the exit code is 1."""
    fleet = make_fleet("rabbitmq")
    worker = fleet.worker()
    (id,) = with_failures(fleet, 1)
    assert worker.stop() == 0
    with fleet.app.connection_for_write() as connection:
        connection.default_channel.queue_delete(fleet.conf["task_default_queue"])

    refused = fleet.command("failed", "replay", "--all", "--yes")
    assert refused.returncode == 1
    assert "NO_ROUTE" in refused.stderr
    record = fleet.records()[id]
    assert record["state"] == "unresolved"
    assert record["replays"] == 0
    assert "NO_ROUTE" in fleet.command("failed", "show", record["id"]).stdout

    cure(fleet)
    worker.start()
    assert fleet.command("failed", "replay", "--all", "--yes", "--wait").returncode == 0
    assert effects(fleet) == {id: 1}


def test_a_failed_replay_is_one_more_attempt(make_fleet: FleetMaker) -> None:
    """On the same record, which is unresolved again."""
    fleet = make_fleet("redis")
    fleet.worker()
    (id,) = with_failures(fleet, 1)

    done = fleet.command("failed", "replay", "--all", "--yes", "--wait")
    assert done.returncode == 1
    record = fleet.records()[id]
    said = f"{record['id'][:8]} failed again: exception, ValueError: not yet"
    assert said in done.stderr
    assert record["state"] == "unresolved"
    assert len(record["attempts"]) == 2
    assert record["replays"] == 1

    cure(fleet)
    assert fleet.command("failed", "replay", "--all", "--yes", "--wait").returncode == 0
    record = fleet.records()[id]
    assert record["state"] == "resolved"
    assert len(record["attempts"]) == 2
    assert record["replays"] == 2


@pytest.mark.parametrize("broker", ["redis", "rabbitmq", "filesystem"])
def test_a_chain_goes_on_after_a_replayed_link(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Its links, its errbacks and its result are as if it had not failed."""
    fleet = make_fleet(broker)
    fleet.worker()
    tasks = fleet.app.tasks
    cured = str(fleet.folder / "cured")
    result = chain(
        tasks["add"].s(1, 2),
        tasks["boom_unless"].si(cured, 5),
        tasks["add"].s(10),
    ).apply_async()
    record = fleet.record_of(result.parent.id)
    assert record["chain_length"] == 1
    assert fleet.runs(result.id) == 0

    cure(fleet)
    assert fleet.failed.replay([record["id"]]).sent == [record["id"]]
    eventually(lambda: state_of(fleet, result.id) == "SUCCESS")
    assert fleet.app.AsyncResult(result.id).result == 15
    eventually(
        lambda: fleet.records()[result.parent.id]["state"] == "resolved", every_s=0.3
    )


def test_the_message_is_the_original(make_fleet: FleetMaker) -> None:
    """Same id, bytes, priority and own headers; no retries, eta or expiry."""
    fleet = make_fleet("redis")
    fleet.worker()
    sent = fleet.send(
        "retries_spent", priority=6, headers={"x-mine": "kept"}, expires=600
    )
    record = fleet.record_of(sent.id)
    original = fleet.failed.get(record["id"]).original
    for worker in fleet.workers:
        worker.stop()

    fleet.failed.replay([record["id"]])
    with fleet.app.connection_for_read() as connection:
        channel = connection.default_channel
        message = channel.basic_get(fleet.conf["task_default_queue"])
    assert message.body == original.body
    assert message.headers["id"] == sent.id
    assert message.headers["x-mine"] == "kept"
    assert message.headers["retries"] == 0
    assert message.headers["expires"] is None
    assert message.headers["eta"] is None
    assert message.properties["priority"] == 6
    assert original.headers["retries"] == 1


def test_an_expired_task_gets_a_new_id(make_fleet: FleetMaker) -> None:
    """Celery remembers the old one, and would drop it; the record links both."""
    fleet = make_fleet("redis", resilience_failed_routes={"expired": "late.failed"})
    fleet.worker()
    sent = fleet.send("ok", "late", expires=-1)
    record = fleet.record_of(sent.id)

    fleet.failed.replay([record["id"]])
    replayed = eventually(
        lambda: (r := fleet.records()[sent.id])["state"] == "resolved" and r
    )
    assert replayed["replayed_as"] not in (None, sent.id)
    assert fleet.runs(replayed["replayed_as"]) == 1
    assert fleet.runs(sent.id) == 0


def test_a_replay_that_was_called_off_does_not_run(make_fleet: FleetMaker) -> None:
    """Reopened while its message waited: the message is dropped, and counted."""
    fleet = make_fleet("redis")
    worker = fleet.worker()
    (id,) = with_failures(fleet, 1)
    assert worker.stop() == 0
    cure(fleet)
    record = fleet.records()[id]
    fleet.failed.replay([record["id"]])
    assert fleet.failed.reopen([record["id"]]) == 1

    worker.start()
    last = fleet.send("ok")
    eventually(lambda: last.state == "SUCCESS")
    assert worker.stop() == 0
    assert effects(fleet) == {}
    assert worker.outcomes()["skipped"] == 1
    assert states(fleet) == {"unresolved": 1}


def test_a_worker_dies_between_a_replays_success_and_its_ack(
    make_fleet: FleetMaker,
) -> None:
    """The record is resolved, and the rest of the chain runs."""
    fleet = make_fleet("redis", task_acks_late=True)
    fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    worker = fleet.worker()
    tasks = fleet.app.tasks
    cured = str(fleet.folder / "cured")
    result = chain(tasks["boom_unless"].si(cured, 5), tasks["add"].s(10)).apply_async()
    record = fleet.record_of(result.parent.id)
    assert worker.stop() == 0
    cure(fleet)
    fleet.failed.replay([record["id"]])

    fleet.worker(kill_at="before-ack-of-success").wait()
    fleet.worker()

    eventually(lambda: state_of(fleet, result.id) == "SUCCESS", within_s=60)
    eventually(
        lambda: fleet.records()[result.parent.id]["state"] == "resolved", every_s=0.3
    )


def test_a_replay_whose_worker_dies_runs_again(make_fleet: FleetMaker) -> None:
    """As any task does: the fence lets the same copy run."""
    fleet = make_fleet("redis", task_acks_late=True)
    fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    worker = fleet.worker()
    end = fleet.folder / "end"
    end.touch()
    sent = fleet.send("fail_when", str(end))
    record = fleet.record_of(sent.id)
    end.unlink()
    fleet.failed.replay([record["id"]])
    eventually(lambda: fleet.runs(sent.id) == 2)
    worker.kill()

    fleet.worker()
    eventually(lambda: fleet.runs(sent.id) == 3, within_s=60)
    end.touch()
    eventually(lambda: len(fleet.records()[sent.id]["attempts"]) == 2, every_s=0.3)
    assert fleet.records()[sent.id]["state"] == "unresolved"


def test_a_retry_within_a_replay_belongs_to_it(make_fleet: FleetMaker) -> None:
    """Its success resolves the record."""
    fleet = make_fleet("redis")
    fleet.worker()
    sent = fleet.send("retries_spent")
    record = fleet.record_of(sent.id)
    fleet.failed.replay([record["id"]])

    eventually(lambda: len(fleet.records()[sent.id]["attempts"]) == 2, every_s=0.3)
    assert fleet.runs(sent.id) == 4
    assert fleet.records()[sent.id]["state"] == "unresolved"


def test_a_retry_with_headers_of_its_own_belongs_to_its_replay(
    make_fleet: FleetMaker,
) -> None:
    """`self.retry(headers=…)` keeps the app's headers, and ours."""
    fleet = make_fleet("redis")
    fleet.worker()
    sent = fleet.send("retried_with_headers", str(fleet.folder / "cured"))
    record = fleet.record_of(sent.id)
    cure(fleet)
    fleet.failed.replay([record["id"]])

    eventually(lambda: states(fleet) == {"resolved": 1}, every_s=0.3)
    assert fleet.notes("effect") == [["effect", sent.id, "kept"]]


@pytest.mark.parametrize("how", ["task", "chain"])
def test_a_replacement_goes_on_with_its_replay(
    make_fleet: FleetMaker, how: str
) -> None:
    """The record waits for it, and its failure is one more attempt."""
    fleet = make_fleet("redis")
    worker = fleet.worker()
    end = fleet.folder / "end"
    sent = fleet.send("replaced", str(fleet.folder / "cured"), str(end), how)
    record = fleet.record_of(sent.id)
    cure(fleet)
    fleet.failed.replay([record["id"]])
    eventually(lambda: ["fail_when", sent.id, 0] in fleet.notes())
    eventually(lambda: "Task replaced" in worker.text)
    always(lambda: states(fleet) == {"replaying": 1}, for_s=0.5)

    end.touch()
    eventually(lambda: states(fleet) == {"unresolved": 1}, every_s=0.3)
    assert [a["message"] for a in fleet.records()[sent.id]["attempts"]] == [
        "not yet",
        "it was time",
    ]


def test_the_store_is_down_at_the_fence(
    make_fleet: FleetMaker, own_server: Any
) -> None:
    """The replay waits, and runs once when the store is back."""
    postgresql = own_server("postgresql")
    fleet = make_fleet("redis", resilience_store_url=postgresql.url)
    worker = fleet.worker()
    (id,) = with_failures(fleet, 1)
    cure(fleet)
    assert worker.stop() == 0
    fleet.failed.replay([fleet.records()[id]["id"]])
    postgresql.kill()
    worker.start()
    eventually(lambda: "a replay waits" in worker.text, what=lambda: worker.text)
    always(lambda: not effects(fleet), for_s=1)
    postgresql.start()

    eventually(lambda: effects(fleet) == {id: 1}, within_s=60)
    eventually(lambda: states(fleet) == {"resolved": 1}, every_s=0.3)


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_the_answer_to_a_replays_publish_is_lost(
    make_fleet: FleetMaker, servers: Any, broker: str
) -> None:
    """It is sent again, as another copy, of which one runs."""
    fleet = make_fleet(broker)
    fleet.worker()
    ids = with_failures(fleet, 2)
    cure(fleet)
    records = fleet.records()
    with proxy_to(servers(broker)) as proxy:
        conf = fleet.app.conf
        conf.broker_write_url = url_through(proxy, fleet.conf["broker_url"])
        proxy.cut_answer_to(ids[1].encode())
        report = fleet.failed.replay([records[id]["id"] for id in ids])
        assert proxy.has_cut_answer

    assert report.sent == [records[id]["id"] for id in ids]
    worker = fleet.workers[0]
    eventually(lambda: states(fleet) == {"resolved": 2}, within_s=60, every_s=0.3)
    assert worker.stop() == 0
    assert effects(fleet) == dict.fromkeys(ids, 1)
    assert worker.outcomes()["skipped"] == 1


def test_switched_off_a_replayed_message_still_runs(make_fleet: FleetMaker) -> None:
    """`resilience_enabled = False` is plain Celery, which ignores our header."""
    fleet = make_fleet("redis")
    worker = fleet.worker()
    (id,) = with_failures(fleet, 1)
    cure(fleet)
    assert worker.stop() == 0
    fleet.failed.replay([fleet.records()[id]["id"]])
    fleet.conf["resilience_enabled"] = False

    off = fleet.worker()
    eventually(lambda: effects(fleet) == {id: 1})
    assert "celery-resilience" not in off.text
