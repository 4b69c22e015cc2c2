"""What a log tells of a delivery that has ended. Everything in it is redacted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_resilience.message import KEY, replay_of
from celery_resilience.outcome import Outcome, Settlement
from celery_resilience.redaction import cut, printable

MAX_LOGGED_MESSAGE_CHARS = 1_000

#: Log shippers cut, or drop, lines of more than 16 KiB.
MAX_LOGGED_TRACEBACK_CHARS = 4_000


def failure_facts(
    settlement: Settlement, child_rss_mib: float | None = None
) -> dict[str, Any]:
    """
    What a log tells of a failed delivery.

    Args:
        settlement: Of outcome failed.
        child_rss_mib: What the child has now; None: it has ended, or nobody knows.
    """
    failure = settlement.failure
    replay = replay_of(settlement.marks)
    return _printable(
        {
            **_beginning("task_failed", settlement),
            "exception": failure.exception if failure else None,
            "message": cut(failure.message, MAX_LOGGED_MESSAGE_CHARS)
            if failure
            else None,
            "fingerprint": failure.fingerprint if failure else None,
            **_times(settlement),
            "worker": settlement.worker,
            "pid": settlement.pid,
            "child_rss_mib": child_rss_mib,
            "trace_id": settlement.trace_id,
            "idempotency_key": _key_of(settlement),
            "replay": replay.get("number"),
            "args": settlement.args,
            "kwargs": settlement.kwargs,
            "traceback": cut_middle(failure.traceback) if failure else None,
        }
    )


def outcome_facts(settlement: Settlement) -> dict[str, Any]:
    """What a log tells of a delivery that was retried, skipped, snoozed or requeued."""
    error = settlement.facts.get("error")
    delay_s = settlement.facts.get("delay_s")
    return _printable(
        {
            **_beginning(f"task_{settlement.outcome}", settlement),
            "error": cut(error, MAX_LOGGED_MESSAGE_CHARS) if error else None,
            "delay_s": delay_s if isinstance(delay_s, int | float) else None,
            "crashes": settlement.facts.get("crashes"),
            **_times(settlement),
            "worker": settlement.worker,
            "pid": settlement.pid,
            "trace_id": settlement.trace_id,
            "idempotency_key": _key_of(settlement),
        }
    )


def failure_sentence(facts: Mapping[str, Any]) -> str:
    """A failure for those who read logs with their eyes."""
    runtime = facts["runtime_s"]
    took = "" if runtime is None else f" after {runtime:.3f} s"
    return printable(
        f"task failed: {facts['task'] or '(no task)'}[{facts['task_id'] or 'no id'}] "
        f"{facts['reason']}: {facts['exception']}: {facts['message']} "
        f"(attempt {facts['attempt']}, queue {facts['queue']}{took}, "
        f"group {facts['fingerprint']})"
    )


def outcome_sentence(outcome: str, facts: Mapping[str, Any]) -> str:
    """Another outcome for them."""
    delay_s = facts["delay_s"]
    preposition = "for" if outcome == Outcome.SNOOZED else "in"
    when = "" if delay_s is None else f" {preposition} {delay_s:g} s"
    why = ": ".join(filter(None, (facts["reason"], facts["error"])))
    crashes = facts["crashes"]
    count = "" if crashes is None else f", crashes {crashes}"
    return printable(
        f"task {outcome}: {facts['task']}[{facts['task_id']}]{when}"
        f"{why and ': '}{why} (attempt {facts['attempt']}, queue {facts['queue']}"
        f"{count})"
    )


def cut_middle(text: str, limit: int = MAX_LOGGED_TRACEBACK_CHARS) -> str:
    """A traceback's beginning and end, where it is longer than *limit*."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return (
        f"{text[:half]}\n... [{len(text) - limit} characters cut] ...\n{text[-half:]}"
    )


def _beginning(event: str, settlement: Settlement) -> dict[str, Any]:
    reason = settlement.reason
    return {
        "event": event,
        "task": settlement.task,
        "task_id": settlement.task_id,
        "root_id": settlement.root_id,
        "parent_id": settlement.parent_id,
        "attempt": settlement.attempt,
        "queue": settlement.queue,
        "reason": None if reason is None else str(reason),
    }


def _times(settlement: Settlement) -> dict[str, Any]:
    run_s, wait_s = settlement.run_s, settlement.wait_s
    return {
        "runtime_s": None if run_s is None else round(run_s, 6),
        "wait_s": None if wait_s is None else round(wait_s, 6),
    }


def _key_of(settlement: Settlement) -> str | None:
    key = settlement.facts.get("idempotency_key")
    if key is None:
        key = (settlement.marks.get(KEY) or (None,))[0]
    return key if isinstance(key, str) else None


def _printable(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: printable(value, keep_newlines=True) if isinstance(value, str) else value
        for name, value in facts.items()
    }
