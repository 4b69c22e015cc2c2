"""The same key has its effect once, on real servers and real workers."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chain, chord, group
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import eventually
from tcp_proxy import Proxy, proxy_to, url_through

#: A broker, and the store of its keys.
FLEETS = [("redis", "redis"), ("rabbitmq", "postgresql"), ("filesystem", "sqlite")]

QUICK_REDIS = {
    # A worker that is killed as it looks for messages of dead ones bars the others.
    "unacked_mutex_expire": 2,
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


def fleet_of(make_fleet: FleetMaker, broker: str, store: str, **more: Any) -> Fleet:
    """A fleet on a broker, with its keys in a store."""
    kept = "sqlite" if store == "redis" else store
    fleet = make_fleet(broker, store=kept, **more)
    if broker == "redis":
        fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    return fleet


def ends(fleet: Fleet, *ids: str, within_s: float = 60) -> list[Any]:
    """The results of tasks, once each has one."""
    found = [fleet.app.AsyncResult(task_id) for task_id in ids]
    eventually(
        lambda: all(result.ready() for result in found),
        within_s=within_s,
        every_s=0.1,
        what=lambda: f"{[r.state for r in found]} {logs(fleet)}",
    )
    return [result.result for result in found]


def logs(fleet: Fleet) -> str:
    """What the workers have said last."""
    return "\n".join(worker.text[-2000:] for worker in fleet.workers)


def counts(fleet: Fleet, event: str) -> Counter[Any]:
    """How often an event happened, by what it is about."""
    return Counter(line[1] for line in fleet.notes(event))


# --- duplicates -----------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "store"), [*FLEETS, ("rabbitmq", "mariadb")])
def test_duplicates_have_one_effect_and_one_result(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """By other ids and by the same, as they wait, run and have ended."""
    fleet = fleet_of(make_fleet, broker, store)
    fleet.worker(concurrency=3)
    ids = [fleet.send("charge", 1).id for _ in range(4)]
    ids += [fleet.send("charge", 1, 10, task_id="same").id for _ in range(3)]
    ids.append(fleet.app.send_task("charge", (), {"order_id": 1}).id)
    others = [fleet.send("charge", order).id for order in ("1", 2, 3)]

    results = ends(fleet, *ids, *others)

    assert results[: len(ids)] == [{"order": 1, "amount": 10}] * len(ids)
    assert counts(fleet, "charged") == {1: 1, "1": 1, 2: 1, 3: 1}
    (later,) = ends(fleet, fleet.send("charge", 1).id)
    assert later == {"order": 1, "amount": 10}
    assert counts(fleet, "charged")[1] == 1
    assert {line[3] for line in fleet.notes("charge")} >= {"charge:1", 'charge:"1"'}


def test_plain_celery_charges_twice(make_fleet: FleetMaker) -> None:
    """Else the test above would prove nothing."""
    fleet = make_fleet("redis", is_plain=True)
    fleet.worker(concurrency=3)

    ends(fleet, *[fleet.send("charge", 1).id for _ in range(4)])

    assert counts(fleet, "charged")[1] == 4


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_duplicates_on_other_pools(make_fleet: FleetMaker, pool: str) -> None:
    """One process has many runs, and each its own claim."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker(pool=pool, concurrency=4)
    ids = [fleet.send("charge", number % 5).id for number in range(20)]

    ends(fleet, *ids)

    assert counts(fleet, "charged") == dict.fromkeys(range(5), 1)


@pytest.mark.parametrize(("broker", "store"), FLEETS)
def test_a_duplicate_of_a_running_one_waits_for_it(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """Longer than a lease, which is renewed; a redelivery waits too."""
    fleet = fleet_of(make_fleet, broker, store)
    worker = fleet.worker(concurrency=3)
    first = fleet.send("keyed_sleep", "a", 4.0).id
    eventually(lambda: fleet.runs(first))
    others = [fleet.send("keyed_sleep", "a", 4.0).id]
    fleet.send("keyed_sleep", "a", 4.0, task_id=first)

    assert ends(fleet, first, *others) == ["a", "a"]
    eventually(lambda: counts(fleet, "slept") == {"a": 1})
    worker.stop()
    assert len(fleet.notes("keyed_sleep")) == 1
    assert worker.outcomes()["snoozed"] >= 2
    assert worker.outcomes()["skipped"] >= 1
    assert worker.outcomes()["failed"] == 0


def test_a_duplicate_may_be_skipped(make_fleet: FleetMaker) -> None:
    """While the first runs; but not where something waits for its result."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    worker = fleet.worker(concurrency=3)
    first = fleet.send("keyed_skip", "a", 3.0).id
    eventually(lambda: fleet.notes("keyed_sleep"))
    skipped = fleet.send("keyed_skip", "a", 3.0).id
    followed = fleet.app.tasks["keyed_skip"].apply_async(
        ("a", 3.0), link=fleet.app.tasks["keyed_result"].s(1)
    )

    assert ends(fleet, skipped, within_s=2.5) == [None]
    assert ends(fleet, first, followed.id) == ["a", "a"]
    worker.stop()
    assert len(fleet.notes("keyed_sleep")) == 1


def test_a_duplicate_may_be_an_error(make_fleet: FleetMaker) -> None:
    """It is kept with the id of the task that has the key."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    first = fleet.send("charge_or_error", 1).id
    ends(fleet, first)
    second = fleet.send("charge_or_error", 1).id

    record = fleet.record_of(second)

    assert record["exception"].endswith("AlreadyDone")
    assert first in record["message"]
    assert record["idempotency_key"] == "charge:1"
    assert counts(fleet, "charged") == {1: 1}


@pytest.mark.parametrize("value", [None, 0, "", {}, [], False, 1.5, "x" * 20_000])
def test_a_saved_result_is_returned_as_itself(
    make_fleet: FleetMaker, value: Any
) -> None:
    """Whatever is false, and with its type."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    ids = [fleet.send("keyed_result", "a", value).id for _ in range(2)]

    results = ends(fleet, *ids)

    assert results == [value, value]
    assert [type(result) for result in results] == [type(value)] * 2
    assert len(fleet.notes("keyed_result")) == 1


def test_results_keep_the_types_of_the_serializer(make_fleet: FleetMaker) -> None:
    """A moment is no text."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    moment = datetime(2026, 11, 2, 12, 30, tzinfo=UTC)
    ids = [fleet.send("keyed_result", "a", moment).id for _ in range(2)]

    assert ends(fleet, *ids) == [moment, moment]
    assert len(fleet.notes("keyed_result")) == 1


def test_a_large_result_is_in_the_result_backend(make_fleet: FleetMaker) -> None:
    """The key remembers where; the duplicate gets it."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    (first,) = ends(fleet, fleet.send("keyed_object", "a", 100_000).id)

    (second,) = ends(fleet, fleet.send("keyed_object", "a", 100_000).id)

    assert first == second == "x" * 100_000
    assert len(fleet.notes("keyed_object")) == 1


def test_a_result_that_cannot_be_serialized_has_its_effect_once(
    make_fleet: FleetMaker,
) -> None:
    """Celery fails the first for it; the key does not, and remembers the effect."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    worker = fleet.worker()
    first = fleet.send("keyed_object", "a").id
    assert "EncodeError" in fleet.record_of(first)["exception"]

    (second,) = ends(fleet, fleet.send("keyed_object", "a").id)

    assert second is None
    assert len(fleet.notes("keyed_object")) == 1
    assert "is not kept" in worker.text


def test_a_task_that_says_skip_is_done(make_fleet: FleetMaker) -> None:
    """A duplicate gets the result with which it skipped."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()

    ids = [fleet.send("keyed_says_skip", "a").id for _ in range(2)]

    assert ends(fleet, *ids) == ["skipped", "skipped"]
    assert len(fleet.notes("keyed_says_skip")) == 1


# --- the same key, another call -------------------------------------------------------


@pytest.mark.parametrize(("broker", "store"), FLEETS)
def test_the_same_key_with_other_arguments_fails(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """At once, as key_mismatch; what was asked is in no message."""
    fleet = fleet_of(make_fleet, broker, store)
    fleet.worker()
    first = fleet.send("charge", 1, 10).id
    ends(fleet, first)
    wrong = fleet.send("charge", 1, 98765).id

    record = fleet.record_of(wrong)

    assert record["reason"] == "key_mismatch"
    assert record["idempotency_key"] == "charge:1"
    assert "98765" not in record["message"]
    assert first in record["message"]
    assert "celery_resilience/" not in record["traceback"]
    assert len(record["attempts"]) == 1
    assert counts(fleet, "charged") == {1: 1}


# --- retries --------------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "store"), FLEETS)
@pytest.mark.parametrize("name", ["keyed_retry", "keyed_autoretry"])
def test_retries_keep_their_key_and_their_runs(
    make_fleet: FleetMaker, broker: str, store: str, name: str
) -> None:
    """A retry does not wait for its own lease; a duplicate waits for the retry."""
    fleet = fleet_of(make_fleet, broker, store)
    fleet.worker(concurrency=2)
    first = fleet.send(name, "a").id
    second = fleet.send(name, "a").id

    assert ends(fleet, first, second) == [2, 2]

    runs = fleet.notes(name)
    assert [line[2] for line in runs] == [0, 1, 2]
    assert {line[3] for line in runs} == {"r:a"}
    assert len({line[1] for line in runs}) == 1
    if name == "keyed_retry":
        tokens = [line[4] for line in runs]
        assert tokens == sorted(set(tokens))


def test_what_has_failed_may_run_again(make_fleet: FleetMaker, tmp_path: Path) -> None:
    """By its replay, with the same key; then the key is done."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    fleet.worker()
    cure = tmp_path / "cure"
    task_id = fleet.send("keyed_boom", "a", str(cure)).id
    record = fleet.record_of(task_id)
    assert record["idempotency_key"] == "b:a"
    tried = fleet.command("failed", "replay", record["id"], "--dry-run")
    assert "[key b:a]" in tried.stdout
    cure.touch()

    done = fleet.command("failed", "replay", record["id"], "--yes", "--wait")

    assert done.returncode == 0, done.stdout + done.stderr
    assert ends(fleet, task_id, fleet.send("keyed_boom", "a", str(cure)).id) == [
        "well",
        "well",
    ]
    assert counts(fleet, "effect") == {"a": 1}
    assert {line[3] for line in fleet.notes("keyed_boom")} == {"b:a"}


# --- death ----------------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "store"), FLEETS)
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("name", ["charge", "charge_or_fail", "charge_or_look"])
def test_a_dead_childs_key_is_taken_over_at_once(
    make_fleet: FleetMaker, broker: str, store: str, how: str, name: str
) -> None:
    """By its own message only; what then happens is what the task says."""
    fleet = fleet_of(make_fleet, broker, store)
    fleet.worker(concurrency=2)
    task_id = fleet.send(name, 1, 10, how).id

    if name == "charge_or_fail":
        record = fleet.record_of(task_id, within_s=20)
        assert record["reason"] == "interrupted"
        assert "celery_resilience/" not in record["traceback"]
        assert len(fleet.notes(name)) == 1
        assert counts(fleet, "charged")[1] == (1 if how == "after" else 0)
        return
    (result,) = ends(fleet, task_id, within_s=20)  # a lease is a minute
    had_effect = how == "after"
    looks = name == "charge_or_look"
    assert result == (None if looks and had_effect else {"order": 1, "amount": 10})
    assert len(fleet.notes(name)) == (1 if looks and had_effect else 2)
    assert counts(fleet, "charged")[1] == (2 if had_effect and not looks else 1)


@pytest.mark.parametrize(
    ("broker", "store"), [f for f in FLEETS if f[0] != "filesystem"]
)
@pytest.mark.parametrize("point", ["after-finish", "before-ack-of-success"])
def test_a_finished_key_outlives_its_worker(
    make_fleet: FleetMaker, broker: str, store: str, point: str
) -> None:
    """Killed after the finish, or after the result: the effect is there, once."""
    fleet = fleet_of(make_fleet, broker, store)
    worker = fleet.worker(concurrency=1, kill_at=point)
    first = chain(
        fleet.app.tasks["charge"].si(1), fleet.app.tasks["keyed_sleep"].si("next", 0.0)
    ).apply_async()

    def look() -> bool:
        if not worker.is_alive:
            worker.kill()
            worker.start()
        return first.ready()

    eventually(look, within_s=60, what=lambda: worker.text[-3000:], every_s=0.2)

    assert first.result == "next"
    assert ends(fleet, first.parent.id) == [{"order": 1, "amount": 10}]
    assert counts(fleet, "charged") == {1: 1}
    assert Path(f"{fleet.ledger}.{point}").exists()
    assert len(fleet.notes("keyed_sleep")) == 1


def stopped(worker: Worker) -> list[int]:
    """Stop every process of a worker, which goes on later as if nothing had been."""
    pids = [*worker.children(), worker.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


@pytest.mark.parametrize("store", ["redis", "postgresql"])
def test_a_run_that_outlived_its_lease_is_refused(
    make_fleet: FleetMaker, store: str
) -> None:
    """It stood still; another run has the key, and its finish counts. It is told."""
    fleet = fleet_of(make_fleet, "redis", store)
    paused = fleet.worker(concurrency=1)
    task_id = fleet.send("keyed_sleep", "a", 2.0).id
    eventually(lambda: fleet.runs(task_id))
    pids = stopped(paused)
    other = fleet.worker(concurrency=1)
    eventually(
        lambda: fleet.runs(task_id) == 2, within_s=30, what=lambda: other.text[-2000:]
    )
    for pid in pids:
        os.kill(pid, signal.SIGCONT)

    assert ends(fleet, task_id) == ["a"]
    eventually(lambda: "has lost the key 's:a'" in paused.text, within_s=20)
    other.stop()
    paused.stop()
    assert other.outcomes()["succeeded"] == 1
    assert paused.outcomes()["succeeded"] == 0


# --- canvas ---------------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "store"), [("redis", "redis")])
def test_canvases_with_duplicates_complete_once(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """Chains, groups and chords whose members share keys, each delivered twice."""
    fleet = fleet_of(make_fleet, broker, store)
    worker = fleet.worker(concurrency=3)
    tasks = fleet.app.tasks
    chains = [
        chain(
            tasks["charge"].si(1), tasks["keyed_result"].si(f"end{n}", n)
        ).apply_async()
        for n in range(3)
    ]
    groups = group(tasks["charge"].si(2) for _ in range(3)).apply_async()
    chords = [
        chord([tasks["charge"].si(3), tasks["charge"].si(3), tasks["charge"].si(4)])(
            tasks["keyed_result"].si(f"body{n}", n)
        )
        for n in range(2)
    ]

    everything = [*chains, *chords]
    eventually(
        lambda: all(result.ready() for result in (*everything, *groups)),
        within_s=60,
        what=lambda: worker.text[-3000:],
        every_s=0.2,
    )

    assert [result.result for result in everything] == [0, 1, 2, 0, 1]
    assert [r.result for r in groups] == [{"order": 2, "amount": 10}] * 3
    assert counts(fleet, "charged") == {1: 1, 2: 1, 3: 1, 4: 1}
    assert len(fleet.notes("keyed_result")) == 5


# --- unique sends ---------------------------------------------------------------------


@pytest.mark.parametrize(("broker", "store"), FLEETS)
def test_a_second_send_while_the_first_waits_is_the_first(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """Until it has run; a canvas sends its own."""
    fleet = fleet_of(make_fleet, broker, store)
    first = fleet.send("unique", "a")
    assert fleet.send("unique", "a").id == first.id
    assert fleet.send("unique", "b").id != first.id
    linked = fleet.app.tasks["unique"].apply_async(
        ("a",), link=fleet.app.tasks["keyed_result"].si("after", 1)
    )
    assert linked.id != first.id
    fleet.worker()

    assert ends(fleet, first.id, linked.id) == ["a", "a"]

    assert len([line for line in fleet.notes("unique") if line[3] == "u:a"]) == 1
    eventually(lambda: fleet.notes("keyed_result"))
    later = fleet.send("unique", "a")
    assert later.id != first.id
    assert ends(fleet, later.id) == ["a"]


def test_what_will_not_run_frees_its_reservation(make_fleet: FleetMaker) -> None:
    """Expired or revoked, the next one is sent."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    worker = fleet.worker()
    ago = datetime.now(UTC) - timedelta(seconds=1)
    expired = fleet.send("unique", "a", expires=ago)
    revoked = fleet.send("unique", "b", countdown=3)
    assert fleet.send("unique", "b").id == revoked.id
    eventually(lambda: f"[{revoked.id}] received" in worker.text)
    fleet.app.control.revoke(revoked.id)

    for name, before in (("a", expired), ("b", revoked)):
        eventually(
            lambda n=name, b=before: fleet.send("unique", n, countdown=60).id != b.id,
            what=lambda: worker.text[-2000:],
            every_s=0.2,
        )
    assert not fleet.notes("unique")


def test_a_reservation_blocks_no_run(make_fleet: FleetMaker) -> None:
    """A message that was sent by name runs, whatever is reserved."""
    fleet = fleet_of(make_fleet, "redis", "redis")
    waiting = fleet.send("unique", "a", countdown=3600)
    fleet.worker()

    by_name = fleet.app.send_task("unique", ("a",))

    assert ends(fleet, by_name.id) == ["a"]
    assert not waiting.ready()


# --- the store ------------------------------------------------------------------------

STORES = ["redis", "postgresql"]


@contextlib.contextmanager
def store_apart(
    make_fleet: FleetMaker, own_server: Any, store: str, **more: Any
) -> Iterator[tuple[Fleet, Proxy]]:
    """A fleet on Redis whose keys are in a server of their own, behind a proxy."""
    server = own_server(store)
    with proxy_to(server) as proxy:
        url = url_through(proxy, server.url)
        yield make_fleet("redis", resilience_store_url=url, **more), proxy


@pytest.mark.parametrize("store", STORES)
def test_a_task_waits_for_a_store_that_is_away(
    make_fleet: FleetMaker, own_server: Any, store: str
) -> None:
    """It is snoozed, spends no retry, and is neither lost nor done twice."""
    with store_apart(make_fleet, own_server, store) as (fleet, proxy):
        worker = fleet.worker()
        proxy.refuse()
        ids = [fleet.send("charge", order).id for order in (1, 1, 2)]
        eventually(lambda: worker.text.count("for the store of its key") >= len(ids))
        assert not fleet.notes("charge")
        proxy.accept()

        ends(fleet, *ids)

        assert counts(fleet, "charged") == {1: 1, 2: 1}
        worker.stop()
        assert worker.outcomes()["snoozed"] >= 3
        assert worker.outcomes()["failed"] == 0


def test_a_task_may_run_while_the_store_is_away(
    make_fleet: FleetMaker, own_server: Any
) -> None:
    """Where the app says so; and it is told."""
    more = {"resilience_if_store_down": "run"}
    with store_apart(make_fleet, own_server, "redis", **more) as (fleet, proxy):
        worker = fleet.worker()
        proxy.refuse()
        ids = [fleet.send("charge", 1).id for _ in range(2)]

        ends(fleet, *ids)

        assert counts(fleet, "charged") == {1: 2}
        assert "runs without its key 'charge:1'" in worker.text


@pytest.mark.parametrize("store", STORES)
def test_a_finish_that_is_not_heard_fails_no_task(
    make_fleet: FleetMaker, own_server: Any, store: str
) -> None:
    """The effect has happened: the task has succeeded, and the log says what is open."""
    with store_apart(make_fleet, own_server, store) as (fleet, proxy):
        worker = fleet.worker()
        task_id = fleet.send("keyed_sleep", "a", 1.0).id
        eventually(lambda: fleet.runs(task_id))
        proxy.refuse()

        assert ends(fleet, task_id) == ["a"]
        assert "its key 's:a' does not say so" in worker.text
        worker.stop()
        assert worker.outcomes()["succeeded"] == 1


@pytest.mark.parametrize("store", STORES)
def test_an_answer_that_is_lost_is_asked_for_again(
    make_fleet: FleetMaker, own_server: Any, store: str
) -> None:
    """The store has finished the key, and nobody heard: it is finished again."""
    with store_apart(make_fleet, own_server, store) as (fleet, proxy):
        worker = fleet.worker()
        task_id = fleet.send("keyed_sleep", "a", 1.0).id
        eventually(lambda: fleet.runs(task_id))
        proxy.cut_answer_to(b"done")

        assert ends(fleet, task_id) == ["a"]
        assert proxy.has_cut_answer
        assert ends(fleet, fleet.send("keyed_sleep", "a", 1.0).id) == ["a"]
        assert len(fleet.notes("keyed_sleep")) == 1
        assert "does not say so" not in worker.text


def test_a_renewal_that_is_not_heard_loses_no_run(
    make_fleet: FleetMaker, own_server: Any
) -> None:
    """Its lease lapses; as nobody else has taken the key, its finish counts."""
    with store_apart(make_fleet, own_server, "redis") as (fleet, proxy):
        worker = fleet.worker()
        task_id = fleet.send("keyed_sleep", "a", 4.0).id
        eventually(lambda: fleet.runs(task_id))
        proxy.refuse()
        eventually(lambda: "keys are not looked after" in worker.text)
        proxy.accept()

        assert ends(fleet, task_id) == ["a"]
        assert ends(fleet, fleet.send("keyed_sleep", "a", 4.0).id) == ["a"]
        assert len(fleet.notes("keyed_sleep")) == 1


@pytest.mark.parametrize("store", STORES)
def test_a_slow_store_delays_and_loses_nothing(
    make_fleet: FleetMaker, own_server: Any, store: str
) -> None:
    """Two seconds for each question: twice that for a task."""
    with store_apart(make_fleet, own_server, store) as (fleet, proxy):
        fleet.worker(concurrency=1)
        ends(fleet, fleet.send("charge", 0).id)
        proxy.slow_down(2.0)
        ids = [fleet.send("charge", 1).id for _ in range(2)]

        ends(fleet, *ids, within_s=30)

        assert counts(fleet, "charged") == {0: 1, 1: 1}
        assert not fleet.records()


def test_a_run_asks_its_store_twice(make_fleet: FleetMaker, own_server: Any) -> None:
    """One question each before and after the body; a task without a key asks none."""
    server = own_server("redis")
    # Snoozed messages are looked for in the same store, some time after the start.
    looks_late = {"celery_resilience.shelf.policy.FIRST_S": 3600.0}
    fleet = make_fleet(
        "redis", resilience_store_url=server.url, fleet_constants=looks_late
    )
    fleet.worker(concurrency=1)
    ends(fleet, fleet.send("charge", 0).id)
    url = server.url
    with (
        redis.Redis.from_url(url) as client,
        redis.Redis.from_url(url) as watcher,
        watcher.monitor() as monitor,
    ):
        client.ping()
        ids = [fleet.send("charge", order).id for order in range(1, 6)]
        ids.append(fleet.send("ok", 1).id)
        ends(fleet, *ids)
        client.set("the end", 1)
        asked = []
        for command in monitor.listen():
            if "the end" in command["command"]:
                break
            is_of_this_test = command["command"].startswith(("HELLO", "PING"))
            if command["client_type"] != "lua" and not is_of_this_test:
                asked.append(command["command"])

    assert len(asked) == 10, "\n".join(asked)
    assert all(command.startswith("EVALSHA") for command in asked)


def test_a_store_in_redis_that_forgets_is_told(
    make_fleet: FleetMaker, own_server: Any
) -> None:
    """A worker whose tasks have keys says what may lose them."""
    server = own_server("redis")
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("save", "")
        client.config_set("appendonly", "no")
    fleet = make_fleet("redis", resilience_store_url=server.url)
    worker = fleet.worker()

    eventually(lambda: "maxmemory-policy" in worker.text, what=lambda: worker.text)
    eventually(lambda: "keeps nothing on disk" in worker.text, what=lambda: worker.text)
