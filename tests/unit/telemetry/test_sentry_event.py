"""What an event of Sentry's says of a failed run, and what is taken out of it."""

from __future__ import annotations

from typing import Any

import pytest

from celery_resilience.failure import Failure
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.telemetry.sentry_event import (
    CHILD_EXITED,
    Redactor,
    Told,
    clear_breadcrumbs,
    death_event,
    is_told_already,
    signal_in,
    tell,
)

TOLD = Told(
    task="shop.ship",
    task_id="task-1",
    attempt=2,
    reason="worker_lost",
    fingerprint="f" * 16,
    queue="orders",
    idempotency_key="ship:7",
    signal="SIGKILL",
    commands={"replay": "celery -A shop failed replay r1"},
)


def test_an_event_is_told_what_we_know() -> None:
    """As tags, as a context, and as its fingerprint; what it has stays."""
    event: dict[str, Any] = {"tags": {"mine": "1"}, "contexts": {"app": {}}}

    tell(event, TOLD)

    assert event["tags"] == {
        "mine": "1",
        "resilience.reason": "worker_lost",
        "resilience.attempt": "2",
        "resilience.fingerprint": "f" * 16,
        "resilience.idempotency_key": "ship:7",
        "resilience.queue": "orders",
        "resilience.signal": "SIGKILL",
    }
    told = event["contexts"]["celery_resilience"]
    assert told["replay"] == "celery -A shop failed replay r1"
    assert (told["task"], told["task_id"], told["attempt"]) == (
        "shop.ship",
        "task-1",
        2,
    )
    assert event["contexts"]["app"] == {}
    assert event["fingerprint"] == ["f" * 16]


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (["{{ default }}", "mine"], ["{{ default }}", "mine"]),
        (["celery", "SoftTimeLimitExceeded", "shop.ship"], ["f" * 16]),
        ([], ["f" * 16]),
    ],
)
def test_a_fingerprint_of_the_users_own_stays(own: list[str], kept: list[str]) -> None:
    """The one of Sentry's own integration does not."""
    event: dict[str, Any] = {"fingerprint": own}

    tell(event, TOLD)

    assert event["fingerprint"] == kept


def test_a_dead_process_has_an_event() -> None:
    """With its task, its true exception, and the trace of its run."""
    settlement = Settlement(
        outcome=Outcome.FAILED,
        reason=Reason.WORKER_LOST,
        task="shop.ship",
        task_id="task-1",
        queue="orders",
        worker="w@h",
        pid=77,
        run_s=1.5,
        failure=Failure("billiard.exceptions.WorkerLostError", "signal 9", "f" * 16),
        args="(1,)",
        kwargs="{}",
    )

    event = death_event(settlement, TOLD, {"trace_id": "a" * 32, "span_id": "b" * 16})

    (exception,) = event["exception"]["values"]
    assert exception["type"] == "WorkerLostError"
    assert exception["module"] == "billiard.exceptions"
    assert exception["value"] == "signal 9"
    assert exception["mechanism"]["handled"] is False
    assert event["transaction"] == "shop.ship"
    assert event["tags"]["celery_task_id"] == "task-1"
    assert event["contexts"]["trace"] == {"trace_id": "a" * 32, "span_id": "b" * 16}
    assert event["extra"]["pid"] == 77
    assert event["fingerprint"] == ["f" * 16]


def a_childs_end(pid: int, message: str = CHILD_EXITED) -> dict[str, Any]:
    """What Sentry makes of billiard's line about a dead child."""
    params = ("ForkPoolWorker-1", pid, "signal 9 (SIGKILL)")
    return {
        "logger": "multiprocessing",
        "logentry": {"message": message, "params": params},
    }


def test_what_is_told_with_its_task_is_not_told_without() -> None:
    """Ours of a failed task, and the end of a child whose task is known; no other."""
    ours = {5}

    assert is_told_already({"logger": "celery_resilience.failed"}, ours.__contains__)
    assert is_told_already(a_childs_end(5), ours.__contains__)
    assert not is_told_already(a_childs_end(6), ours.__contains__)
    assert not is_told_already(a_childs_end(5, "another"), ours.__contains__)
    assert not is_told_already({"logger": "celery_resilience"}, ours.__contains__)
    assert not is_told_already({"logger": "multiprocessing"}, ours.__contains__)
    assert not is_told_already({"logger": "shop"}, ours.__contains__)
    assert not is_told_already({}, ours.__contains__)


def test_secrets_are_taken_out_wherever_they_are() -> None:
    """By their values in every text, and by their names in every mapping."""
    event: dict[str, Any] = {
        "event_id": "hunter2",
        "logentry": {"message": "was hunter2", "params": ["hunter2", 5]},
        "exception": {
            "values": [
                {
                    "value": "cannot use hunter2",
                    "stacktrace": {
                        "frames": [
                            {
                                "vars": {
                                    "x": "'hunter2'",
                                    "order": {"Password": "'ab'", "n": "1"},
                                    "pin": "'12'",
                                }
                            }
                        ]
                    },
                }
            ]
        },
    }

    Redactor(["hunter2"], ["PIN"]).clean(event)

    assert event["event_id"] == "hunter2"
    assert event["logentry"] == {"message": "was ***", "params": ["***", 5]}
    value = event["exception"]["values"][0]
    assert value["value"] == "cannot use ***"
    assert value["stacktrace"]["frames"][0]["vars"] == {
        "x": "'***'",
        "order": {"Password": "***", "n": "1"},
        "pin": "***",
    }


def test_what_celery_adds_to_its_records_is_no_breadcrumb() -> None:
    """The arguments of each task; what else is in a crumb stays."""
    mine = {"category": "shop", "data": {"data": {"kwargs": "x"}}}
    event = {
        "breadcrumbs": {
            "values": [
                {
                    "category": "celery.worker.strategy",
                    "data": {"data": {"kwargs": "x"}, "n": 1},
                },
                {"category": "celery.beat"},
                mine,
            ]
        }
    }

    clear_breadcrumbs(event)
    clear_breadcrumbs({})

    first, _, last = event["breadcrumbs"]["values"]
    assert first["data"] == {"n": 1}
    assert last == mine


def test_a_signal_is_read_from_its_text() -> None:
    """As billiard writes it; None where there is none."""
    assert signal_in("Worker exited prematurely: signal 9 (SIGKILL) Job: 1.") == (
        "SIGKILL"
    )
    assert signal_in("exitcode 3") is None
