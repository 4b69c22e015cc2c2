"""Retry rules on real brokers: what is tried again, and what becomes of the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from celery import group
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually
from services import Service

#: A broker, and a pool.
FLEETS = [
    *(("redis", "prefork"), ("rabbitmq", "prefork")),
    *(("redis", "threads"), ("redis", "gevent"), ("redis", "solo")),
]


@pytest.fixture(params=FLEETS, ids="-".join)
def fleet(
    request: Any, make_fleet: FleetMaker, servers: Callable[[str], Service]
) -> Fleet:
    """One worker, whose broker may deliver again what is held for two seconds."""
    broker, pool = request.param
    # A file is no place for results that two processes may write at once.
    more: dict[str, Any] = {"result_backend": servers("redis").url[:-1] + "1"}
    if broker == "redis":
        more["broker_transport_options"] = {"visibility_timeout": 2}
    found = make_fleet(
        broker,
        resilience_retry_budgets={"small": {"share": 0, "per_s": 2, "most": 1}},
        resilience_circuits={"ruled": {"min_calls": 3, "jitter": 0, "open_s": 600}},
        **more,
    )
    found.worker(pool=pool, concurrency=4)
    return found


def result_of(fleet: Fleet, sent: Any) -> Any:
    """What a task came to."""
    eventually(sent.ready, within_s=90, what=lambda: fleet.workers[0].text[-4000:])
    return sent.get(timeout=1)


def runs(fleet: Fleet, sent: Any) -> list[int]:
    """The retries that each run of a task had before it."""
    return [line[2] for line in fleet.notes() if line[1] == sent.id]


def test_rules(fleet: Fleet) -> None:
    """What a rule is for is tried again up to its limit, and the rest is Celery's."""
    scripts = {
        "recovers": ("ruled", ["connection"] * 4 + ["paid"]),
        "by cause": ("ruled", ["cause", "paid"]),
        "by name": ("ruled", ["told:0.3", "paid"]),
        "late": ("ruled_late", ["connection", "connection", "paid"]),
        "async": ("ruled_async", ["connection", "paid"]),
        "keyed": ("ruled_once", ["connection", "connection", "paid"]),
        "by hand": ("ruled", ["retry", "connection", "retry", "paid"]),
        "auto": ("ruled_with_autoretry", ["other", "paid"]),
        "auto and rule": ("ruled_with_autoretry", ["connection"] * 3 + ["paid"]),
        "exhausted": ("ruled", ["connection"]),
        "never": ("ruled", ["value"]),
        "never of auto": ("ruled_with_autoretry", ["value"]),
        "never in a group": ("ruled", ["group"]),
        "first match": ("ruled", ["shut"]),
        "no rule": ("ruled", ["other"]),
        "soft limit": ("ruled", ["soft"]),
        "deadline": ("ruled_for_a_while", ["connection"]),
        "hint past deadline": ("ruled", ["told:61"]),
    }
    sent = {name: fleet.send(*script) for name, script in scripts.items()}

    paid = list(scripts)[:9]
    assert [result_of(fleet, sent[name]) for name in paid] == ["paid"] * 9
    found = {name: runs(fleet, sent[name]) for name in scripts}
    assert [len(found[name]) for name in paid] == [5, 2, 2, 3, 2, 3, 4, 2, 4]
    for name in paid:
        assert found[name] == list(range(len(found[name])))
    records = {name: fleet.record_of(sent[name].id) for name in list(scripts)[9:]}
    found = {name: runs(fleet, sent[name]) for name in scripts}
    said = {
        name: (len(found[name]), record["reason"], record["exception"])
        for name, record in records.items()
    }
    deadline_runs = said["deadline"][0]
    assert 2 <= deadline_runs <= 4
    assert said == {
        "exhausted": (6, "retries_exhausted", "ConnectionError"),
        "never": (1, "exception", "ValueError"),
        "never of auto": (1, "exception", "ValueError"),
        "never in a group": (1, "exception", "ExceptionGroup"),
        "first match": (1, "retries_exhausted", "retry_tasks.Shut"),
        "no rule": (1, "exception", "KeyError"),
        "soft limit": (1, "exception", "billiard.exceptions.SoftTimeLimitExceeded"),
        "deadline": (deadline_runs, "retries_exhausted", "ConnectionError"),
        "hint past deadline": (1, "retries_exhausted", "retry_tasks.Told"),
    }
    attempts = records["exhausted"]["attempts"]
    assert [it["exception"] for it in attempts] == ["ConnectionError"] * 6
    assert all(0.2 <= it["retried_in_s"] <= 0.4 for it in attempts[:5])
    assert records["exhausted"]["message"] == "the bank is away"
    first, second = (line[3] for line in fleet.notes() if line[1] == sent["by name"].id)
    assert second - first >= 0.3
    text = fleet.workers[0].text
    assert re.search(rf"\[{sent['by cause'].id}\] in 0\.\d s: RuntimeError: ", text)


@pytest.mark.parametrize("fleet", FLEETS[:2], ids="-".join, indirect=True)
def test_retries_wait_and_belong_to_what_their_run_belonged_to(fleet: Fleet) -> None:
    """Canvases, circuits, budgets and replays; and what a broker would deliver again."""
    tasks, text = fleet.app.tasks, fleet.workers[0]
    again = ["connection", "paid"]
    slow = fleet.send("ruled_slowly", again)
    short = [fleet.send("ruled_by_budget", again) for _ in range(4)]
    chained = (tasks["ruled"].si(again) | tasks["ok"].s()).apply_async()
    chord = (group(tasks["ruled"].si(again) for _ in range(3)) | tasks["ok"].s())()
    exhausted = fleet.send("ruled", ["connection"])

    assert result_of(fleet, chained) == "paid"
    assert result_of(fleet, chord) == ["paid"] * 3
    assert len(fleet.notes("ok")) == 2
    # A retry runs once its budget has one, and none is spent by waiting.
    assert [result_of(fleet, it) for it in short] == ["paid"] * 4
    assert [runs(fleet, it) for it in short] == [[0, 1]] * 4
    assert text.text.count(" s: retry_budget ") >= 3
    assert result_of(fleet, slow) == "paid"
    first, second = (line for line in fleet.notes() if line[1] == slow.id)
    assert (first[2], second[2]) == (0, 1)
    assert second[3] - first[3] >= 2.9
    is_held_in_parts = "visibility_timeout" in fleet.conf.get(
        "broker_transport_options", {}
    )
    assert (text.text.count(" s: retry_not_due ") >= 2) == is_held_in_parts

    record = fleet.record_of(exhausted.id)
    fleet.failed.replay([record["id"]])
    eventually(
        lambda: len(runs(fleet, exhausted)) == 12, what=lambda: text.text[-3000:]
    )
    assert runs(fleet, exhausted) == [0, 1, 2, 3, 4, 5] * 2
    replayed = eventually(
        lambda: (
            (found := fleet.records()[exhausted.id])["state"] == "unresolved"
            and found["replays"] == 1
            and found
        )
    )
    assert len(replayed["attempts"]) == 7  # those of the first message are forgotten

    guarded = [fleet.send("ruled_guarded", ["connection"]) for _ in range(3)]
    eventually(
        lambda: "circuit ruled opened" in text.text, what=lambda: text.text[-3000:]
    )
    assert not {it.id for it in guarded} & set(fleet.records())


def test_a_worker_that_dies_before_its_ack_loses_no_retry(
    make_fleet: FleetMaker,
) -> None:
    """There are two messages then, and both run."""
    fleet = make_fleet("rabbitmq")
    worker = fleet.worker(concurrency=1, kill_at="before-ack-of-retry")
    sent = fleet.send("ruled_late", ["connection", "paid"])
    worker.wait()
    worker.start()

    assert result_of(fleet, sent) == "paid"
    eventually(lambda: len(runs(fleet, sent)) >= 3, what=lambda: worker.text[-3000:])
    assert set(runs(fleet, sent)) == {0, 1}
    assert sent.id not in fleet.records()
