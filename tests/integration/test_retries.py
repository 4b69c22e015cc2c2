"""Retry rules on real brokers: what is tried again, and what becomes of the rest."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import FleetMaker
from fleet_runner import Fleet
from polling import eventually

#: A broker, and a pool.
FLEETS = [("redis", "prefork"), ("rabbitmq", "prefork"), ("redis", "threads")]


@pytest.fixture(params=FLEETS, ids="-".join)
def fleet(request: Any, make_fleet: FleetMaker) -> Fleet:
    """One worker, whose broker may deliver again what is held for two seconds."""
    broker, pool = request.param
    more: dict[str, Any] = {}
    if broker == "redis":
        more["broker_transport_options"] = {"visibility_timeout": 2}
    found = make_fleet(
        broker,
        resilience_retry_budgets={"small": {"share": 0, "per_s": 2, "most": 1}},
        resilience_circuits={"ruled": {"min_calls": 3, "open_s": 600}},
        **more,
    )
    found.worker(pool=pool, concurrency=4)
    return found


def result_of(fleet: Fleet, sent: Any) -> Any:
    """What a task came to."""
    eventually(sent.ready, what=fleet.workers[0].text[-4000:])
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
    assert 3 <= deadline_runs <= 5
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
    assert all(0.05 <= it["retried_in_s"] <= 0.2 for it in attempts[:5])
    assert records["exhausted"]["message"] == "the bank is away"
    first, second = (line[3] for line in fleet.notes() if line[1] == sent["by name"].id)
    assert second - first >= 0.3
    text = fleet.workers[0].text
    assert f"[{sent['by cause'].id}] in 0.1 s: RuntimeError: " in text
