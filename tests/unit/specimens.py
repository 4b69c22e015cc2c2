"""Plain data for the unit tests, made as the package itself makes it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from celery_resilience.failed.envelope import envelope, settled
from celery_resilience.failed.record import State, Summary
from celery_resilience.failure import Failure, fingerprint_of
from celery_resilience.message import HEADER, OriginalMessage
from celery_resilience.outcome import Outcome, Reason, Settlement

NAMESPACE = "shop"
FAILED_QUEUE = "shop.failed"

#: Everything that a terminal could obey, and what no database takes.
HOSTILE_TEXT = "a\x1b[31mb\0c\ud800d\x9be\u202ef\r\ng\th\u2028i\x7f"

_numbers = itertools.count(1)


def a_message(**changes: Any) -> OriginalMessage:
    """A task message of protocol 2, as the broker handed it over."""
    task_id = changes.pop("task_id", "task-1")
    parts: dict[str, Any] = {
        "body": b'[[7], {}, {"callbacks": null, "chain": null, "chord": null}]',
        "headers": {
            "task": "shop.ship",
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "retries": 0,
            "eta": None,
            "expires": None,
            "lang": "py",
        },
        "properties": {"correlation_id": task_id, "delivery_mode": 2, "priority": 0},
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "exchange": "",
        "routing_key": "shop",
        "queue": "shop",
    }
    return OriginalMessage(**{**parts, **changes})


def a_settlement(**changes: Any) -> Settlement:
    """A settlement; failed, unless told otherwise."""
    parts: dict[str, Any] = {
        "outcome": Outcome.FAILED,
        "reason": Reason.EXCEPTION,
        "task": "shop.ship",
        "task_id": "task-1",
        "queue": "shop",
        "worker": "celery@one",
        "failure": a_failure(),
    }
    if changes.get("outcome", Outcome.FAILED) is not Outcome.FAILED:
        parts.update(reason=None, failure=None)
    return Settlement(**{**parts, **changes})


def a_failure(**changes: Any) -> Failure:
    """What went wrong."""
    parts: dict[str, Any] = {
        "exception": "shop.errors.NoStock",
        "message": "none left",
        "fingerprint": fingerprint_of("shop.errors.NoStock"),
        "traceback": "Traceback (most recent call last):\nNoStock: none left\n",
    }
    return Failure(**{**parts, **changes})


def replay_mark(record: str, token: str, number: int = 1) -> dict[str, Any]:
    """What a replayed message carries."""
    return {"replay": {"record": record, "token": token, "copy": "c", "number": number}}


def a_failed_document(
    *,
    at: float = 1_000.0,
    task_id: str = "task-1",
    number: int = 0,
    token: str | None = None,
    record: str | None = None,
    redelivered: bool = False,
    attempt: int = 1,
    release: str | None = None,
    namespace: str = NAMESPACE,
    failed_queue: str = FAILED_QUEUE,
    message: OriginalMessage | None = None,
    **settlement: Any,
) -> dict[str, Any]:
    """
    The envelope of one failure.

    Args:
        number, token, record: Of the replay that failed.
        message: The original, instead of an ordinary one.
        settlement: Other facts of the settlement.
    """
    marks = {} if not number else replay_mark(str(record), str(token), number)
    marks.update(settlement.pop("marks", {}))
    original = message or a_message(task_id=task_id, redelivered=redelivered)
    return envelope(
        a_settlement(task_id=task_id, attempt=attempt, marks=marks, **settlement),
        original,
        namespace=namespace,
        failed_queue=failed_queue,
        at=at,
        release=release,
    )


def a_success_document(
    *,
    at: float = 2_000.0,
    task_id: str = "task-1",
    number: int = 0,
    token: str | None = None,
    record: str | None = None,
    outcome: Outcome = Outcome.SUCCEEDED,
    reason: str | None = None,
) -> dict[str, Any]:
    """The report of a delivery that did not fail."""
    marks = {} if not number else replay_mark(str(record), str(token), number)
    return settled(
        a_settlement(outcome=outcome, reason=reason, task_id=task_id, marks=marks),
        a_message(task_id=task_id, redelivered=True),
        namespace=NAMESPACE,
        failed_queue=FAILED_QUEUE,
        at=at,
    )


def a_summary(**changes: Any) -> Summary:
    """One row of a list."""
    parts: dict[str, Any] = {
        "id": "0123456789abcdef0123456789abcdef",
        "state": State.UNRESOLVED,
        "reason": "exception",
        "task": "shop.ship",
        "task_id": "task-1",
        "queue": "shop",
        "failed_queue": FAILED_QUEUE,
        "exception": "shop.errors.NoStock",
        "message": "none left",
        "fingerprint": "00ff00ff00ff00ff",
        "worker": "celery@one",
        "release": None,
        "first_failed_at": 1_000.0,
        "last_failed_at": 1_000.0,
        "replays": 0,
    }
    return Summary(**{**parts, **changes})


def fresh_name(stem: str = "n") -> str:
    """A name that no other test of this process uses."""
    return f"{stem}{next(_numbers)}"


def headers_with(marks: Mapping[str, Any]) -> dict[str, Any]:
    """A message's headers with our marks."""
    return {**a_message().headers, HEADER: dict(marks)}


class KnownApp:
    """
    What an app knows, for dead letters.

    Args:
        tasks: Names of parameters, and of hidden ones, by task.
        bindings: Queues by exchange and routing key.
        limits: Delivery limits by queue.
    """

    def __init__(
        self,
        tasks: Mapping[str, tuple[Sequence[str], Sequence[str]]] | None = None,
        bindings: Mapping[tuple[str, str], str] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self._tasks = {"shop.ship": ((), ())} if tasks is None else tasks
        self._bindings = bindings or {}
        self._limits = limits or {}

    def names_of(self, task: str) -> tuple[Sequence[str], Sequence[str]] | None:
        return self._tasks.get(task)

    def bound_queue(self, exchange: str, routing_key: str) -> str | None:
        return self._bindings.get((exchange, routing_key))

    def home_of(self, task: str) -> str:
        return f"home of {task}"

    def delivery_limit_of(self, queue: str) -> int | None:
        return self._limits.get(queue)
