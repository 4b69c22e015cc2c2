"""What a Sentry event says of a failed run, and what it must not say. Policy only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery_resilience.outcome import Settlement
from celery_resilience.redaction import MASK, is_hidden, mask

#: The name of our context, and how the names of our tags begin.
CONTEXT, PREFIX = "celery_resilience", "resilience."

#: The logger whose records tell of failed tasks, each of which is an event already.
FAILURE_LOGGER = "celery_resilience.failed"

#: By which billiard tells that a child has died (``pool.py:1100``, billiard 4.3).
CHILD_LOGGERS = frozenset({"multiprocessing", "billiard"})
CHILD_EXITED = "Process %r pid:%r exited with %r"

#: The fingerprint that Sentry's own Celery integration gives a soft time limit.
SENTRYS_OWN = "celery"

#: Parts of an event that hold no text of a task's.
_PLAIN = frozenset({"event_id", "modules", "sdk", "tags", "timestamp", "fingerprint"})

MAX_DEPTH = 20
MAX_TAG_CHARS = 200

_SIGNAL = re.compile(r"signal \d+ \((SIG\w+)\)")


@dataclass(frozen=True, slots=True)
class Told:
    """
    What is told of one failed run.

    Attributes:
        commands: How to show and to replay the failed task, by the verb.
    """

    task: str
    task_id: str
    attempt: int
    reason: str
    fingerprint: str
    queue: str | None = None
    idempotency_key: str | None = None
    signal: str | None = None
    commands: Mapping[str, str] | None = None


def signal_in(text: str) -> str | None:
    """The name of the signal in the text of a WorkerLostError."""
    found = _SIGNAL.search(text)
    return None if found is None else found[1]


def tell(event: dict[str, Any], told: Told) -> None:
    """Write what is told into *event*; a fingerprint that the user set stays."""
    tags = {
        "reason": told.reason,
        "attempt": str(told.attempt),
        "fingerprint": told.fingerprint,
        "idempotency_key": told.idempotency_key,
        "queue": told.queue,
        "signal": told.signal,
    }
    event.setdefault("tags", {}).update(
        {
            f"{PREFIX}{name}": value[:MAX_TAG_CHARS]
            for name, value in tags.items()
            if value
        }
    )
    event.setdefault("contexts", {})[CONTEXT] = {
        "task": told.task,
        "task_id": told.task_id,
        **{name: value for name, value in tags.items() if value},
        "attempt": told.attempt,
        **(told.commands or {}),
    }
    own = event.get("fingerprint")
    if not own or own[0] == SENTRYS_OWN:
        event["fingerprint"] = [told.fingerprint]


def death_event(
    settlement: Settlement, told: Told, trace: Mapping[str, str]
) -> dict[str, Any]:
    """
    The event of a run whose process has told nobody.

    Args:
        settlement: Of outcome failed.
        trace: Ids of the run's trace and span.
    """
    failure = settlement.failure
    assert failure is not None
    module, _, kind = failure.exception.rpartition(".")
    exception: dict[str, Any] = {
        "type": kind,
        "value": failure.message,
        "mechanism": {"type": CONTEXT, "handled": False},
    }
    if module:
        exception["module"] = module
    event: dict[str, Any] = {
        "level": "error",
        "logger": "celery_resilience",
        "transaction": settlement.task,
        "exception": {"values": [exception]},
        "tags": {"celery_task_id": settlement.task_id},
        # Not that of whatever the main process does just now.
        "contexts": {"trace": dict(trace)},
        "extra": {
            "celery-job": {"task_name": settlement.task},
            "worker": settlement.worker,
            "pid": settlement.pid,
            "runtime_s": settlement.run_s,
            "args": settlement.args,
            "kwargs": settlement.kwargs,
        },
    }
    tell(event, told)
    return event


def is_told_already(event: Mapping[str, Any], is_ours: Callable[[int], bool]) -> bool:
    """
    Whether an event that a log record has made says what another event says better.

    Args:
        is_ours: Whether the death of a child, by its pid, is told with its task, or
            ends a run that runs again.
    """
    if event.get("logger") == FAILURE_LOGGER:
        return True
    if event.get("logger") not in CHILD_LOGGERS:
        return False
    entry = event.get("logentry") or {}
    params: Any = entry.get("params") or ()
    return (
        entry.get("message") == CHILD_EXITED
        and len(params) == 3
        and isinstance(params[1], int)
        and is_ours(params[1])
    )


def clear_breadcrumbs(event: Mapping[str, Any]) -> None:
    """Take the arguments and results out that Celery adds to its log records."""
    crumbs = event.get("breadcrumbs") or {}
    values = crumbs.get("values") if isinstance(crumbs, Mapping) else crumbs
    for crumb in values or ():
        data = crumb.get("data")
        if str(crumb.get("category", "")).startswith("celery.") and data:
            data.pop("data", None)


class Redactor:
    """
    Takes what is never shown out of an event.

    Args:
        secrets: Values that were hidden in the arguments of the run.
        names: Names whose values are hidden besides the usual ones.
    """

    def __init__(self, secrets: Iterable[str], names: Iterable[str]) -> None:
        self._secrets = tuple(secrets)
        self._names = frozenset(name.lower() for name in names)

    def clean(self, event: dict[str, Any]) -> None:
        """Change *event* in place."""
        for part, value in event.items():
            if part not in _PLAIN:
                event[part] = self._cleaned(value, 0)

    def _cleaned(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return mask(value, self._secrets)
        if depth > MAX_DEPTH:
            return value
        if isinstance(value, dict):
            return {
                key: (
                    MASK
                    if isinstance(key, str) and is_hidden(key, self._names)
                    else self._cleaned(inner, depth + 1)
                )
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._cleaned(inner, depth + 1) for inner in value]
        return value
