"""Puts Sentry and OpenTelemetry around the runs of a worker, where the app has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from celery_resilience.telemetry import opentelemetry, sentry
from celery_resilience.telemetry.drops import Drops
from celery_resilience.telemetry.opentelemetry import Spans, flush_spans
from celery_resilience.telemetry.opentelemetry_sdk import count_dropped_spans
from celery_resilience.telemetry.sentry import SentryEvents, count_lost_events
from celery_resilience.telemetry.signals import (
    hear_captured,
    hear_children,
    hear_in_place_of_instrumentor,
)

#: How to show and replay the failed task of a run; {} where it is not kept.
Commands = Callable[[str, str, Mapping[str, Any], str, str], Mapping[str, str]]


class Tracing:
    """
    What is told of the runs of one worker, in its processes.

    Attributes:
        around: The rooms around the bodies, the outermost first.
        words: For the start line; "" where the app has neither library.
    """

    def __init__(self, around: tuple[Any, ...], drops: Drops) -> None:
        self.around = around
        self._drops = drops
        self.words = ", ".join(room.words for room in around)

    def ready(self) -> None:
        """Main process: the worker has started."""
        if self.around:
            self._drops.watch()

    def ended(self) -> None:
        """Main process: the worker ends, and everything that can be was sent."""
        self._drops.close()


def attach_tracing(
    *,
    facts: sentry.TellsMore,
    commands: Commands,
    is_running_in: Callable[[int], bool],
    is_ending: Callable[[BaseException], bool],
    uid: str,
) -> Tracing:
    """
    Hear of runs and deaths for the libraries that the app has imported.

    Args:
        facts: The child's end of the channel to the main process.
        commands: By a task's name and id, the marks of its message, the exception's
            type and the reason.
        is_running_in: Whether a child, by its pid, runs a resilient task.
        is_ending: Whether an exception ends the process, and is not the task's own.
        uid: Names the receivers of Celery's signals, so that none is connected twice.
    """
    around: list[Any] = []
    drops = Drops(time.monotonic)
    api = opentelemetry.api_in_use()
    if api is not None:
        # First: an event of Sentry's has the trace of the span.
        spans = Spans(api, is_ending=is_ending)
        spans.attach()
        hear_in_place_of_instrumentor(spans)

        def count_spans() -> None:
            provider = api.get_tracer_provider()
            count_dropped_spans(provider, lambda count: drops.add("spans", count))

        def child_started() -> None:
            # The app may have turned it on in this child.
            hear_in_place_of_instrumentor(spans)
            count_spans()

        count_spans()
        hear_children(child_started, lambda: flush_spans(api), f"{uid}-spans")
        around.append(spans)
    sdk = sentry.sdk_in_use()
    if sdk is not None:
        events = SentryEvents(
            sdk, facts=facts, commands=commands, is_running_in=is_running_in
        )
        events.attach()

        def count_events() -> None:
            count_lost_events(sdk, lambda count: drops.add("events", count))

        count_events()
        hear_children(count_events, lambda: None, f"{uid}-events")
        hear_captured(events.captured, uid)
        around.append(events)
    return Tracing(tuple(around), drops)
