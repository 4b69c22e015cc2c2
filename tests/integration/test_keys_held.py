"""A key is neither lost nor held for ever by the odd ways in which a run may end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import group
from conftest import FleetMaker
from integration.test_keys import ends, fleet_of, store_apart
from polling import eventually

from celery_resilience.idempotency.key import store_key
from celery_resilience.idempotency.record import Claim, KeyState
from celery_resilience.idempotency.results import pack
from celery_resilience.install import installation_of


def test_a_soft_limit_while_the_key_is_taken_frees_it(
    make_fleet: FleetMaker, own_server: Any
) -> None:
    """It is held back until the key is taken, and raised before the body."""
    with store_apart(make_fleet, own_server, "redis") as (fleet, proxy):
        worker = fleet.worker(concurrency=1)
        ends(fleet, fleet.send("keyed_soft", "warm").id)
        proxy.slow_down(2.0)
        first = fleet.send("keyed_soft", "a").id
        eventually(lambda: "task failed: keyed_soft" in worker.text)
        # Whoever looks for the record asks a dozen times.
        proxy.slow_down(0.0)
        assert "SoftTimeLimit" in fleet.record_of(first)["exception"]
        assert fleet.runs(first) == 0

        assert ends(fleet, fleet.send("keyed_soft", "a").id, within_s=20) == ["a"]
        assert fleet.notes("handlers wait") == [["handlers wait", True]] * 2
        worker.stop()


def test_a_retry_after_the_lease_was_lost_is_no_failure(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """Another run has the key, and what it comes to is the task's result."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    go = tmp_path / "go"
    task_id = fleet.send("keyed_late_retry", "a", str(go)).id
    eventually(lambda: fleet.runs(task_id))
    installation = installation_of(fleet.app)
    store = installation.key_store()
    key = store_key(installation.settings.namespace, "keyed_late_retry", "l:a")
    assert store.forget(key, is_running_too=True)
    other = Claim(key, "l:a", "keyed_late_retry", "other", "token")
    store.begin(other)
    go.touch()
    eventually(lambda: fleet.app.AsyncResult(task_id).state == "RETRY")
    store.finish(other, KeyState.DONE, result=pack("b", "json", has_backend=False))

    assert ends(fleet, task_id) == ["b"]
    assert fleet.runs(task_id) == 1
    assert not fleet.records()


def test_a_replacement_that_was_not_sent_leaves_the_key(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """The effect has not happened: another run may have it."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    path = tmp_path / "path"
    first = fleet.send("keyed_replaced", "a", str(path)).id
    assert "EncodeError" in fleet.record_of(first)["exception"]
    path.touch()

    assert ends(fleet, fleet.send("keyed_replaced", "a", str(path)).id) == ["a"]


def test_duplicates_of_a_replaced_task_wait_for_its_replacement(
    make_fleet: FleetMaker, tmp_path: Path
) -> None:
    """One by another id has its result; one by the same sends nothing on."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    worker = fleet.worker(concurrency=3)
    task = fleet.app.tasks["keyed_replaced"]
    arguments = ("a", str(tmp_path), 3.0)
    following = {"chain": [fleet.app.tasks["ok"].s()]}
    first = task.apply_async(arguments, **following).id
    eventually(lambda: fleet.notes("sleep_keyless"))
    task.apply_async(arguments, task_id=first, **following)
    other = task.apply_async(arguments).id

    assert ends(fleet, first, other) == ["a", "a"]
    eventually(lambda: fleet.notes("ok"))
    worker.stop()
    assert len(fleet.notes("ok")) == 1
    assert len(fleet.notes("sleep_keyless")) == 1
    assert len(fleet.notes("keyed_replaced")) == 1


def test_a_task_that_moves_on_to_another_key_is_done(make_fleet: FleetMaker) -> None:
    """It replaced itself by a call with another key: the first waits for no retry."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    first = fleet.send("keyed_moved", "a", "b").id

    assert ends(fleet, first) == ["b"]
    again = fleet.send("keyed_moved", "a", "b").id
    assert ends(fleet, again, within_s=15) == ["b"]
    assert [line[3] for line in fleet.notes("keyed_moved")] == ["m:a", "m:b"]


def test_what_a_task_hands_on_of_its_headers_has_no_key(make_fleet: FleetMaker) -> None:
    """Each call that it makes has a key of its own."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()

    fleet.app.tasks["keyed_forwards"].apply_async(("a",), headers={"trace": "t"})

    eventually(lambda: len(fleet.notes("keyed_result")) == 2)
    assert fleet.notes("headers") == [["headers", "trace"]]


def test_force_is_for_one_run(make_fleet: FleetMaker) -> None:
    """One that died after its effect: its message, sent again, finds that it is done."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    first = fleet.worker(concurrency=1)
    task_id = fleet.send("charge_or_fail", 1, 10, "after").id
    record = fleet.record_of(task_id)
    first.stop()
    fleet.worker(concurrency=1, kill_at="after-finish")

    done = fleet.command("failed", "replay", record["id"], "--yes", "--force", "--wait")

    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(f"{fleet.ledger}.after-finish").exists()
    assert ends(fleet, task_id) == [{"order": 1, "amount": 10}]
    assert len(fleet.notes("charged")) == 2


def test_force_is_for_one_message_of_a_key_that_no_message_carries(
    make_fleet: FleetMaker,
) -> None:
    """What was sent by name has the key that its worker made."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker(concurrency=1)
    arguments = ("charge_or_fail", (1, 10, "after"))
    ids = [fleet.app.send_task(*arguments).id for _ in range(2)]
    reasons = {fleet.record_of(task_id)["reason"] for task_id in ids}
    assert reasons == {"interrupted"}

    done = fleet.command("failed", "replay", "--all", "--force", "--yes", "--wait")

    assert done.returncode == 0, done.stdout + done.stderr
    assert ends(fleet, *ids) == [{"order": 1, "amount": 10}] * 2
    assert len(fleet.notes("charged")) == 2


@pytest.mark.parametrize("is_group", [False, True])
def test_a_link_of_which_no_key_can_be_made_fails_itself(
    make_fleet: FleetMaker, is_group: bool
) -> None:
    """And not the task before it, which has had its effect."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    tasks = fleet.app.tasks
    link = tasks["keyed_result"].s(1)
    last = tasks["ok"].si(float("nan")) | (group(link, link) if is_group else link)

    result = last.apply_async()

    failed = eventually(
        lambda: len(found := fleet.records()) == 1 + is_group and found, every_s=0.2
    )
    assert {record["exception"] for record in failed.values()} == {
        "celery_resilience.errors.NoKey"
    }
    assert result.parent is not None
    assert result.parent.state == "SUCCESS"
    assert not fleet.notes("keyed_result")


def test_a_duplicate_waits_for_no_retry_that_was_revoked(
    make_fleet: FleetMaker,
) -> None:
    """It will not come: the key is free."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    worker = fleet.worker()
    first = fleet.send("keyed_retry", "a", 1, 4.0).id
    eventually(lambda: worker.text.count(f"[{first}] received") == 2)
    fleet.app.control.revoke(first)
    second = fleet.send("keyed_retry", "a", 1, 4.0).id

    assert ends(fleet, second) == [1]
    assert fleet.runs(first) == 1
    assert fleet.runs(second) == 2


def test_an_app_without_a_store_says_that_keyed_tasks_wait(
    make_fleet: FleetMaker,
) -> None:
    """In the worker's log, with what to do about it."""
    fleet = make_fleet("rabbitmq", resilience_store_url=None)
    worker = fleet.worker()

    (said,) = [
        line
        for line in worker.text.splitlines()
        if "there is no store for idempotency keys" in line
    ]

    assert "resilience_store_url" in said
    assert "tasks that have one wait until there is: charge, " in said
