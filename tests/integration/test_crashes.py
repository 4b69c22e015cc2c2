"""A task that kills is stopped after max_crashes runs; its neighbours are not blamed."""

from __future__ import annotations

import json
import signal
from collections import Counter
from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet, Worker
from polling import always, eventually
from tcp_proxy import proxy_to, url_through

from celery_resilience.message import HEADER

QUICK_REDIS = {
    # A worker that is killed as it looks for messages of dead ones bars the others.
    "unacked_mutex_expire": 2,
    "visibility_timeout": 3,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}


def quick(fleet: Fleet) -> Fleet:
    """Let Redis give back soon what a killed worker held."""
    if "redis" in fleet.conf["broker_url"]:
        fleet.conf["broker_transport_options"].update(QUICK_REDIS)
    return fleet


def keep_running(worker: Worker, until: Any, within_s: float = 180) -> int:
    """Start *worker* again whenever it has died, as a supervisor does."""
    deaths = 0

    def look() -> Any:
        nonlocal deaths
        if not worker.is_alive:
            deaths += 1
            worker.kill()
            worker.start()
        return until()

    eventually(look, within_s=within_s, every_s=0.2, what=lambda: worker.text[-3000:])
    return deaths


@pytest.mark.parametrize(
    ("broker", "store"),
    [("redis", "sqlite"), ("rabbitmq", "mariadb"), ("rabbitmq-quorum", "sqlite")],
)
def test_killers_with_neighbours(
    make_fleet: FleetMaker, broker: str, store: str
) -> None:
    """A child killer and a worker killer run 3 times each; 30 neighbours are done."""
    fleet = quick(make_fleet(broker, store=store, worker_prefetch_multiplier=4))
    worker = fleet.worker(concurrency=2)
    neighbours = [fleet.send("sleep", 0.2).id for _ in range(10)]
    worker_killer = fleet.send("kills_worker", str(worker.pid_file)).id
    neighbours += [fleet.send("sleep", 0.2).id for _ in range(10)]
    child_killer = fleet.send("killed_late").id
    neighbours += [fleet.send("sleep", 0.2).id for _ in range(10)]

    def done() -> bool:
        slept = {line[1] for line in fleet.notes("slept")}
        return slept >= set(neighbours) and len(fleet.records()) == 2

    deaths = keep_running(worker, done)

    records = fleet.records()
    assert set(records) == {worker_killer, child_killer}
    assert {r["reason"] for r in records.values()} == {"worker_lost"}
    assert fleet.runs(worker_killer) == 3
    # A run that died with its worker is not the child killer's fault, and not counted.
    assert 3 <= fleet.runs(child_killer) <= 3 + deaths
    assert deaths == 3


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_children_that_die_together_are_each_counted(
    make_fleet: FleetMaker, broker: str
) -> None:
    """While the pool takes leave of one, others start a task and die of it."""
    fleet = make_fleet(broker, task_acks_late=True)
    worker = fleet.worker(concurrency=8)
    killers = [fleet.send("killed_late").id for _ in range(8)]

    eventually(
        lambda: set(fleet.records()) == set(killers),
        within_s=120,
        every_s=0.5,
        what="a record of each",
    )
    assert worker.stop() == 0
    assert Counter(fleet.runs(id) for id in killers) == {3: len(killers)}
    assert worker.outcomes() == {
        "received": 3 * len(killers),
        "requeued": 2 * len(killers),
        "failed": len(killers),
    }


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_two_worker_killers_with_neighbours(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Each is found out, and nobody else."""
    fleet = quick(make_fleet(broker, worker_prefetch_multiplier=2))
    worker = fleet.worker(concurrency=3)
    killers, neighbours = [], []
    for _ in range(2):
        neighbours += [fleet.send("sleep", 0.3).id for _ in range(5)]
        killers.append(fleet.send("kills_worker", str(worker.pid_file)).id)
        neighbours += [fleet.send("sleep", 0.3).id for _ in range(5)]

    def done() -> bool:
        slept = {line[1] for line in fleet.notes("slept")}
        return slept >= set(neighbours) and len(fleet.records()) == 2

    keep_running(worker, done)

    records = fleet.records()
    assert set(records) == set(killers)
    # At least 3: a killer that was beside the other's death is run once more.
    assert all(3 <= fleet.runs(id) <= 4 for id in killers)


def test_plain_celery_loops(make_fleet: FleetMaker) -> None:
    """The test bites: with reject_on_worker_lost the same child killer never ends."""
    fleet = make_fleet(
        "redis", is_plain=True, task_reject_on_worker_lost=True, task_acks_late=True
    )
    fleet.worker()
    killer = fleet.send("killed_late")

    eventually(lambda: fleet.runs(killer.id) > 6)
    assert killer.state not in ("FAILURE", "SUCCESS")


def test_the_answer_to_a_copys_publish_is_lost(
    make_fleet: FleetMaker, servers: Any
) -> None:
    """Redis: the copy that is sent again for a dead child is stored once."""
    with proxy_to(servers("redis")) as proxy:
        fleet = make_fleet("redis")
        url = fleet.conf["broker_url"]
        fleet.conf.update(broker_read_url=url, broker_write_url=url_through(proxy, url))
        worker = fleet.worker()
        # So that the connection is there, and only the copy's answer is lost.
        fleet.record_of(fleet.send("boom").id)
        die = fleet.folder / "die"
        sent = fleet.send("killed_when", str(die))
        eventually(lambda: fleet.runs(sent.id) == 1)
        proxy.cut_answer_to(sent.id.encode())
        die.touch()

        eventually(lambda: fleet.notes("slept"), within_s=60)
        assert proxy.has_cut_answer
        last = fleet.send("ok")
        eventually(lambda: last.state == "SUCCESS")
        assert worker.stop() == 0
        counts = worker.outcomes()
    assert counts == {"received": 4, "failed": 1, "requeued": 1, "succeeded": 2}


def test_max_crashes_of_the_task_the_flag_and_the_setting(
    make_fleet: FleetMaker,
) -> None:
    """A flag beats the setting."""
    fleet = make_fleet("redis", resilience_max_crashes=5)
    fleet.worker("--max-crashes", "1")
    killer = fleet.send("killed_late")

    assert fleet.record_of(killer.id)["reason"] == "worker_lost"
    assert fleet.runs(killer.id) == 1


def test_each_crash_is_told_once(make_fleet: FleetMaker) -> None:
    """Those after which the task runs again too, with the task and what ended it."""
    fleet = make_fleet("redis", resilience_log_format="json", resilience_max_crashes=3)
    worker = fleet.worker()
    killer = fleet.send("killed_late")
    assert fleet.record_of(killer.id)["reason"] == "worker_lost"

    lines = [json.loads(it) for it in worker.text.splitlines() if it.startswith("{")]
    told = [it for it in lines if it["logger"] == "celery_resilience.outcome"]
    assert [it["crashes"] for it in told] == [1, 2]
    for line in told:
        assert (line["event"], line["level"]) == ("task_requeued", "WARNING")
        assert (line["task"], line["task_id"]) == ("killed_late", killer.id)
        assert line["reason"] == "worker_lost"
        assert line["error"].endswith("signal 9 (SIGKILL)")
        assert line["delay_s"] > 0


def test_crashes_before_the_window_are_forgotten(make_fleet: FleetMaker) -> None:
    """Two crashes that are far apart do not add up."""
    fleet = make_fleet("redis", resilience_crash_window_s=0.5)
    worker = fleet.worker()
    killer = fleet.send("killed_late")

    eventually(lambda: fleet.runs(killer.id) > 4, within_s=60)
    assert fleet.records() == {}
    code = worker.stop()
    # Its next run may die within the stop, and is put back then.
    assert code == (75 if "work was put back" in worker.text else 0)


def test_a_suspect_runs_alone(make_fleet: FleetMaker) -> None:
    """While the last allowed run goes on, the worker runs nothing else."""
    fleet = make_fleet("redis", resilience_max_crashes=2)
    fleet.worker(concurrency=3)
    suspect = fleet.send("killed_then_sleeps", str(fleet.folder / "flag"), 2)
    eventually(lambda: fleet.runs(suspect.id) == 1)
    beside = [fleet.send("sleep", 0.5).id for _ in range(6)]

    eventually(lambda: len(fleet.notes("slept")) == 7, within_s=60)
    order = [line for line in fleet.notes() if line[0] in ("sleep", "slept", "alone")]
    start = order.index(["alone", suspect.id])
    end = order.index(["slept", suspect.id])
    assert end == start + 1, order
    running = Counter(line[1] for line in order[:start])
    assert all(count == 2 for count in running.values()), order
    assert set(beside) == {line[1] for line in order} - {suspect.id}


@pytest.mark.parametrize(
    ("broker", "pool"), [("filesystem", "prefork"), ("redis", "gevent")]
)
def test_all_that_waited_for_a_suspect_go_on(
    make_fleet: FleetMaker, broker: str, pool: str
) -> None:
    """Though they are more than the pool has slots, and handing one over blocks."""
    fleet = make_fleet(broker, worker_prefetch_multiplier=4)
    worker = fleet.worker(pool=pool, concurrency=2)
    end = fleet.folder / "end"
    suspect = fleet.send("sleep", 60, str(end), headers={HEADER: {"alone": True}})
    eventually(lambda: fleet.runs(suspect.id) == 1)
    for _ in range(7):
        fleet.send("sleep", 0.1)
    eventually(lambda: worker.text.count("] received") == 8)
    assert len(fleet.notes("sleep")) == 1

    end.touch()
    eventually(lambda: len(fleet.notes("slept")) == 8)
    assert worker.stop() == 0


def test_a_run_cut_off_by_a_stop_is_no_crash(make_fleet: FleetMaker) -> None:
    """A worker that is told to stop, and killed because it takes too long."""
    fleet = quick(make_fleet("redis"))
    end = fleet.folder / "end"
    sent = fleet.send("sleep", 60, str(end))
    for round in range(1, 5):
        worker = fleet.worker()
        eventually(lambda round=round: fleet.runs(sent.id) == round, within_s=60)
        worker.signal(signal.SIGTERM)
        eventually(lambda worker=worker: "Warm shutdown" in worker.text)
        always(lambda worker=worker: worker.is_alive, for_s=1)
        worker.kill()

    worker = fleet.worker()
    end.touch()
    eventually(lambda: fleet.notes("slept"), within_s=60)
    assert fleet.records() == {}


@pytest.mark.parametrize("broker", ["rabbitmq"])
def test_without_a_store_a_worker_killer_ends_too(
    make_fleet: FleetMaker, broker: str
) -> None:
    """Later, because nobody knows whether a redelivered message had started."""
    fleet = make_fleet(broker, resilience_store_url=None, result_backend=None)
    worker = fleet.worker(concurrency=1)
    killer = fleet.send("kills_worker", str(worker.pid_file))
    neighbours = [fleet.send("ok").id for _ in range(3)]

    keep_running(
        worker, lambda: "task failed: kills_worker" in worker.text, within_s=240
    )
    assert 3 <= fleet.runs(killer.id) <= 22
    eventually(lambda: {line[1] for line in fleet.notes("ok")} == set(neighbours))


def test_without_a_store_a_task_may_ask_for_itself_again(
    make_fleet: FleetMaker,
) -> None:
    """`Reject(requeue=True)` as a poll: no run of it has died."""
    fleet = make_fleet("rabbitmq", resilience_store_url=None, result_backend=None)
    worker = fleet.worker()
    go = fleet.folder / "go"
    polling = fleet.send("requeued_until", str(go))
    eventually(lambda: fleet.runs(polling.id) > 30)
    go.touch()

    last = fleet.send("ok")
    for sent in (polling, last):
        eventually(lambda sent=sent: f"{sent.id}] succeeded" in worker.text)
    assert worker.stop() == 0
    assert worker.outcomes()["failed"] == 0
    assert worker.outcomes()["succeeded"] == 2


def test_a_warm_stop_loses_nothing(make_fleet: FleetMaker) -> None:
    """What runs ends, what waits goes back."""
    fleet = make_fleet("redis", worker_prefetch_multiplier=4)
    worker = fleet.worker(concurrency=2)
    late = [fleet.send("sleep", 1).id for _ in range(6)]
    early = [fleet.send("sleep_early", 1).id for _ in range(6)]
    eventually(lambda: len(fleet.notes()) >= 2)
    assert worker.stop() == 0
    counts = worker.outcomes()
    assert counts["received"] == counts["succeeded"] + counts["requeued"]

    fleet.worker(concurrency=4)
    eventually(lambda: len(fleet.notes("slept")) == 12, within_s=60)
    assert all(fleet.runs(id) == 1 for id in late + early)


def test_a_cold_stop_loses_no_late_acked_task_and_tells_the_others(
    make_fleet: FleetMaker,
) -> None:
    """Early-acked ones that it cut off are kept as interrupted."""
    fleet = make_fleet("redis")
    worker = fleet.worker(concurrency=2)
    end = fleet.folder / "end"
    late = fleet.send("sleep", 60, str(end))
    early = fleet.send("sleep_early", 60, str(end))
    eventually(lambda: fleet.runs(late.id) == fleet.runs(early.id) == 1)

    worker.signal(signal.SIGQUIT)
    worker.wait()
    record = fleet.record_of(early.id)
    assert record["reason"] == "interrupted"
    assert set(fleet.records()) == {early.id}
    assert early.state == "FAILURE"

    end.touch()
    fleet.worker(concurrency=2)
    eventually(lambda: fleet.notes("slept"), within_s=60)
    report = fleet.failed.replay([record["id"]])
    assert report.sent == [record["id"]]
    eventually(lambda: len(fleet.notes("slept")) == 2)
    eventually(lambda: fleet.records()[early.id]["state"] == "resolved", every_s=0.3)


def test_a_success_that_was_stored_is_one_however_its_run_ends(
    make_fleet: FleetMaker,
) -> None:
    """A hard limit or a cold stop, while a receiver of task_postrun takes its time."""
    fleet = make_fleet("redis")
    worker = fleet.worker(concurrency=1)
    limited = fleet.send("slow_to_end_limited")
    stopped = fleet.send("slow_to_end")
    eventually(lambda: ["ending", stopped.id] in fleet.notes("ending"))
    worker.signal(signal.SIGQUIT)
    worker.wait()

    assert limited.state == stopped.state == "SUCCESS"
    assert fleet.records() == {}


@pytest.mark.parametrize("backend", ["redis", "database"])
def test_an_earlier_success_of_a_task_id_hides_no_crash(
    make_fleet: FleetMaker, backend: str
) -> None:
    """A fixed task id: the run that is killed is not the one that has succeeded."""
    fleet = make_fleet("redis")
    if backend == "database":
        url = f"db+sqlite:///{fleet.folder}/results.sqlite3"
        fleet.conf["result_backend"] = fleet.app.conf.result_backend = url
    fleet.worker("--max-crashes", "1")
    bad = fleet.folder / "bad"
    fleet.send("killed_if", str(bad), task_id="daily").get(timeout=30)
    bad.touch()
    fleet.send("killed_if", str(bad), task_id="daily")

    assert fleet.record_of("daily")["reason"] == "worker_lost"
    assert fleet.runs("daily") == 2


def test_a_cold_stop_on_solo_cuts_off_its_task(make_fleet: FleetMaker) -> None:
    """The late-acked one goes back to the queue, the early-acked one is kept."""
    fleet = make_fleet("redis")
    end = fleet.folder / "end"
    early = fleet.send("sleep_early", 60, str(end))
    late = fleet.send("sleep", 60, str(end))
    for sent in (early, late):
        worker = fleet.worker(pool="solo")
        eventually(lambda sent=sent: fleet.runs(sent.id) == 1)
        worker.signal(signal.SIGQUIT)
        worker.wait()
    assert fleet.record_of(early.id)["reason"] == "interrupted"

    end.touch()
    fleet.worker(pool="solo")
    eventually(lambda: fleet.notes("slept"))
    assert fleet.runs(late.id) == 2
    assert set(fleet.records()) == {early.id}


def test_plain_celery_loses_an_early_acked_task_at_a_cold_stop(
    make_fleet: FleetMaker,
) -> None:
    """The test bites: its state is RETRY for ever, and nothing was sent."""
    fleet = make_fleet("redis", is_plain=True)
    worker = fleet.worker()
    early = fleet.send("sleep_early", 60, str(fleet.folder / "end"))
    eventually(lambda: fleet.runs(early.id) == 1)
    worker.signal(signal.SIGQUIT)
    worker.wait()

    (fleet.folder / "end").touch()
    last = fleet.worker()
    sent = fleet.send("ok")
    eventually(lambda: sent.state == "SUCCESS", what=lambda: last.text)
    assert early.state == "RETRY"
    assert fleet.runs(early.id) == 1
