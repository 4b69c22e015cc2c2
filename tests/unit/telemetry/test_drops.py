"""What could not be sent is counted over all processes, and told once."""

from __future__ import annotations

import logging
import multiprocessing
from typing import Any

import pytest

from celery_resilience.events import observe
from celery_resilience.telemetry.drops import SAY_AGAIN_S, Drops
from celery_resilience.telemetry.opentelemetry_sdk import count_dropped_spans
from celery_resilience.telemetry.sentry import count_lost_events

fork = multiprocessing.get_context("fork")


class Exporter:
    """Answers, fails or raises as it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def export(self, spans: Any) -> Any:
        """What the test wants."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def shutdown(self) -> None:
        """The provider ends."""


def test_children_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """By the main process, as an event each time, and as a line once a minute."""
    now = [0.0]
    drops = Drops(lambda: now[0])
    heard: list[tuple[str, int]] = []
    stop = observe(
        "telemetry.dropped", lambda signal, count: heard.append((signal, count))
    )

    def child() -> None:
        drops.add("spans", 3)
        drops.add("events")

    for _ in range(2):
        process = fork.Process(target=child)
        process.start()
        process.join()
    with caplog.at_level(logging.WARNING):
        drops.tell()
        drops.tell()
        drops.add("spans")
        drops.tell()
        first = caplog.messages.copy()
        now[0] = SAY_AGAIN_S
        drops.tell()
    stop()

    assert heard == [("spans", 6), ("events", 2), ("spans", 1)]
    assert first == ["telemetry could not be sent, and is lost: 6 spans, 2 events"]
    assert caplog.messages[1:] == ["telemetry could not be sent, and is lost: 1 spans"]


def test_spans_that_are_not_sent_are_counted() -> None:
    """Those that the exporter refuses, or raises for; a second set-up counts once."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

    provider = TracerProvider()
    exporter: Any = Exporter(SpanExportResult.FAILURE)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=512))
    lost: list[int] = []
    for _ in range(2):
        count_dropped_spans(provider, lost.append)
    tracer = provider.get_tracer("test")

    for answer in (SpanExportResult.FAILURE, SpanExportResult.SUCCESS, OSError("away")):
        exporter.answer = answer
        tracer.start_span("x").end()
        provider.force_flush()
    provider.shutdown()

    assert lost == [1, 1]


def test_a_provider_that_is_none_is_left_alone() -> None:
    """Nothing is set up, or something else than the SDK is."""
    lost: list[int] = []

    count_dropped_spans(object(), lost.append)

    assert lost == []


def test_events_that_are_not_sent_are_counted() -> None:
    """Not those that somebody meant to drop, nor what is no event."""

    class Transport:
        recorded = 0

        def record_lost_event(self, *_: Any, **__: Any) -> None:
            self.recorded += 1

    class Client:
        transport = Transport()

    class Sdk:
        @staticmethod
        def get_client() -> Any:
            return Client

    lost: list[int] = []
    for _ in range(2):
        count_lost_events(Sdk, lost.append)

    record = Client.transport.record_lost_event
    record("network_error", "error")
    record("before_send", "error")
    record("event_processor", data_category="error")
    record("network_error", "transaction")
    assert lost == [1]
    assert Client.transport.recorded == 4
