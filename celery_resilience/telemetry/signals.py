"""Celery's signals that tell of a run, and of the end of a child, to tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from celery import signals

from celery_resilience.task import ResilientTask
from celery_resilience.telemetry.opentelemetry_instrumentor import receiver_of


class HearsRuns(Protocol):
    """What the instrumentor's receivers are for, done for our tasks."""

    def failure_heard(self, task: Any, otherwise: Callable[[], None]) -> None: ...

    def retry_heard(self, task: Any, request: Any, reason: Any) -> None: ...


def hear_in_place_of_instrumentor(spans: HearsRuns) -> None:
    """
    Take the place of the instrumentor's receivers, for resilient tasks.

    It may have connected them before the worker starts, in a child, or not yet.
    """

    def on_failure(sender: Any = None, **words: Any) -> None:
        def otherwise() -> None:
            if failed is not None:
                failed(sender=sender, **words)

        if isinstance(sender, ResilientTask):
            spans.failure_heard(sender, otherwise)
        else:
            otherwise()

    def on_retry(sender: Any = None, **words: Any) -> None:
        if isinstance(sender, ResilientTask):
            spans.retry_heard(sender, words.get("request"), words.get("reason"))
        elif retried is not None:
            retried(sender=sender, **words)

    failed, retried = receiver_of("task_failure"), receiver_of("task_retry")
    for signal, theirs, ours in (
        (signals.task_failure, failed, on_failure),
        (signals.task_retry, retried, on_retry),
    ):
        if theirs is not None and signal.disconnect(theirs):
            signal.connect(ours, weak=False, dispatch_uid="celery_resilience-spans")


def hear_captured(captured: Callable[[Any], None], uid: str) -> None:
    """Call *captured* with the request of each resilient run that has failed."""

    def on_failure(sender: Any = None, **_: Any) -> None:
        if isinstance(sender, ResilientTask):
            captured(sender.request_stack.top)

    signals.task_failure.connect(on_failure, weak=False, dispatch_uid=f"{uid}-sentry")


def hear_children(
    started: Callable[[], None], ending: Callable[[], None], uid: str
) -> None:
    """Call *started* in each child of the pool, and *ending* when it ends by itself."""

    def on_started(**_: Any) -> None:
        started()

    def on_ending(**_: Any) -> None:
        ending()

    for signal, receiver in (
        (signals.worker_process_init, on_started),
        (signals.worker_process_shutdown, on_ending),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=uid)
