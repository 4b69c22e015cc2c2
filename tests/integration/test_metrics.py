"""What a worker counts, as Prometheus reads it."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Callable

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from metrics_page import OURS, OUTCOMES, MetricsPage
from polling import eventually
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from services import Service, free_port

from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.bootstep import Questions, QueueDepths
from celery_resilience.telemetry.instruments import ALL

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


#: What a worker tells of whatever happens.
ALWAYS = {it.name for it in ALL if it not in (i.CIRCUIT, i.CHILD_MEMORY, i.UNRESOLVED)}


@pytest.fixture
def page() -> MetricsPage:
    """On a port that nobody has."""
    return MetricsPage(free_port())


#: A thousand calls: how each ends, how many do, and with which outcomes.
CALLS = {
    "return": (600, {"succeeded": 1}),
    "raise": (180, {"failed": 1}),
    "skip": (100, {"skipped": 1}),
    "retry": (40, {"retried": 1, "failed": 1}),
    "retry_once": (40, {"retried": 1, "succeeded": 1}),
    "event": (20, {"succeeded": 1}),
    "kill": (20, {"failed": 1}),
}


def expected() -> Counter[str]:
    """Deliveries by outcome."""
    counts: Counter[str] = Counter()
    for calls, outcomes in CALLS.values():
        for outcome, times in outcomes.items():
            counts[outcome] += calls * times
    return counts


def test_a_thousand_tasks_are_counted_exactly(
    make_fleet: FleetMaker, page: MetricsPage
) -> None:
    """Though each child is recycled after seven tasks, and twenty are killed."""
    fleet = make_fleet("redis", worker_prefetch_multiplier=4)
    worker = fleet.worker("--max-tasks-per-child", "7", *page.flags, concurrency=4)
    assert page.sum(OUTCOMES, task="metered", outcome="failed") == 0

    send_all(fleet)
    wanted = expected()
    total = sum(wanted.values())
    eventually(
        lambda: page.sum(OUTCOMES, task="metered") >= total,
        within_s=400,
        what=lambda: f"{wanted}: {page.by(OUTCOMES, 'outcome', task='metered')}",
        every_s=2,
    )

    assert page.by(OUTCOMES, "outcome", task="metered") == wanted
    assert page.by("celery_resilience_task_failures_total", "reason") == {
        "exception": 180,
        "retries_exhausted": 40,
        "worker_lost": 20,
    }
    assert page.by("celery_resilience_failed_tasks_operations_total", "operation") == {
        "kept": 240
    }
    runs = total - 20  # those that are killed take what they have counted along
    assert page.sum("orders_total") == 2 * runs
    assert page.sum("orders_total", how="retry") == 2 * 80
    assert page.sum("amount_eur_count") == runs
    assert page.sum("amount_eur_sum") == 12.5 * runs
    event = {"event": "idempotency.lease_lost"}
    assert page.sum("celery_resilience_events_total", **event) == 20
    exits = page.by("celery_resilience_worker_child_exits_total", "reason")
    assert exits["signal"] == 20
    assert exits["recycled"] > 100
    assert worker.stop() == 0


def test_a_child_that_is_forked_amid_a_question_can_publish(
    make_fleet: FleetMaker, page: MetricsPage
) -> None:
    """The thread that asks for lengths of queues holds locks of kombu's then."""
    asks_always = {"celery_resilience.telemetry.probes.EVERY_S": 0.001}
    fleet = make_fleet("redis", fleet_constants=asks_always)
    fleet.worker("--max-tasks-per-child", "1", *page.flags, concurrency=4)

    for _ in range(40):
        fleet.send("metered", "retry_once", ignore_result=True)

    wanted = {"retried": 40, "succeeded": 40}
    eventually(
        lambda: page.by(OUTCOMES, "outcome", task="metered") == wanted,
        within_s=60,
        what=lambda: str(page.by(OUTCOMES, "outcome", task="metered")),
        every_s=1,
    )


def send_all(fleet: Fleet) -> None:
    """Send the calls, well mixed."""
    calls = [how for how, (count, _) in CALLS.items() for _ in range(count)]
    with fleet.app.pool.acquire(block=True) as connection:
        producer = fleet.app.amqp.Producer(connection)
        for number in range(len(calls)):
            how = calls[number * 389 % len(calls)]
            fleet.send("metered", how, producer=producer, ignore_result=True)


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_every_pool_counts(
    make_fleet: FleetMaker, page: MetricsPage, pool: str
) -> None:
    """On the health port, in both formats, without a secret."""
    fleet = make_fleet("redis")
    health = ("--health-port", f"127.0.0.1:{page.port}")
    fleet.worker(*page.flags, *health, pool=pool)

    for how in ("return", "skip", "raise"):
        fleet.send("metered", how, "hunter2")
    eventually(lambda: page.sum(OUTCOMES, task="metered") == 3, within_s=20)

    counted = {"succeeded": 1, "skipped": 1, "failed": 1}
    assert page.by(OUTCOMES, "outcome", task="metered") == counted
    assert page.sum("orders_total") == 6
    assert page.sum("celery_resilience_task_wait_duration_seconds_count") == 3
    assert page.sum("celery_resilience_worker_slots") >= 1
    queue = fleet.conf["task_default_queue"]
    eventually(
        lambda: page.by("celery_resilience_probe_success", "probe").get("queues"),
        within_s=10,
    )
    waiting = {s.labels["queue"] for s in page.samples(f"{OURS}_queue_messages")}
    assert waiting == {queue}
    text = page.text(OPENMETRICS)
    families = {family.name for family in parse_openmetrics(text)}
    assert {it.family for it in ALL if it.name in ALWAYS} <= families
    assert "hunter2" not in text
    with urllib.request.urlopen(f"http://127.0.0.1:{page.port}/live") as answer:
        assert answer.status == 200


def test_a_bad_name_fails_its_task_and_says_why(
    make_fleet: FleetMaker, page: MetricsPage
) -> None:
    """And OpenTelemetry's SDK has the same numbers, from the main process alone."""
    fleet = make_fleet("redis", fleet_otel="otel.jsonl", result_expires=60)
    worker = fleet.worker(*page.flags, "--max-tasks-per-child", "2")

    misnamed = fleet.send("misnamed")
    for how in ("return", "return", "skip", "raise"):
        fleet.send("metered", how)
    eventually(lambda: page.sum(OUTCOMES) == 5, within_s=20)
    assert fleet.record_of(misnamed.id)["message"].startswith("metric 'Orders!': the")
    assert worker.stop() == 0

    exported = [
        json.loads(line)
        for line in (fleet.folder / "otel.jsonl").read_text().splitlines()
    ]
    ours = [
        (data["pid"], metric)
        for data in exported
        for metric in data["metrics"]
        if metric["name"] == "celery_resilience.task.outcomes"
    ]
    assert {pid for pid, _ in ours} == {worker.pid}
    last = {
        (point["attributes"]["task"], point["attributes"]["outcome"]): point["value"]
        for point in ours[-1][1]["data"]["data_points"]
        if point["value"]
    }
    assert last == {
        ("metered", "succeeded"): 2,
        ("metered", "skipped"): 1,
        ("metered", "failed"): 1,
        ("misnamed", "failed"): 1,
    }


@pytest.mark.parametrize("broker", ["redis", "rabbitmq", "filesystem"])
def test_a_queues_depth_is_asked_for(make_fleet: FleetMaker, broker: str) -> None:
    """A queue that nobody has made holds nothing; the connection is kept."""
    fleet = make_fleet(broker)
    queue = fleet.conf["task_default_queue"]
    for _ in range(3):
        fleet.send("ok")
    ask = QueueDepths(
        fleet.app,
        lambda: fleet.app.amqp.queues,
        Questions(None, ("never-made",), None, lambda pid: None),
    )

    for _ in range(2):
        answer = ask()
        assert answer[i.QUEUED] == {(queue,): 3}
        assert answer[i.UNCOLLECTED] == {("never-made",): 0}
    ask._connection.release()


def test_a_broker_that_is_away_is_no_empty_queue(
    make_fleet: FleetMaker, own_server: Callable[[str], Service]
) -> None:
    """The question fails, and is asked again over another connection."""
    server = own_server("redis")
    fleet = make_fleet("redis", server=server)
    ask = QueueDepths(
        fleet.app,
        lambda: fleet.app.amqp.queues,
        Questions(None, (), None, lambda pid: None),
    )
    assert ask()[i.QUEUED]
    server.kill()

    with pytest.raises(Exception, match=r"(?i)connection|refused"):
        ask()
    server.start()
    assert ask()[i.QUEUED]
    ask._connection.release()
