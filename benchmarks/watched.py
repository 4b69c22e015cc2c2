"""What a run costs more with Sentry and OpenTelemetry, beside their own integrations.

Events and spans go nowhere. The last section: both change Celery for the rest of the
process.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import sentry_sdk
from celery.app import trace as tracer
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from benchmarks import in_process
from benchmarks.figures import Figure
from celery_resilience.install import installation_of
from celery_resilience.telemetry.opentelemetry import Spans
from celery_resilience.telemetry.sentry import SentryEvents
from celery_resilience.worker import WorkerSetup

#: Batches of each kind of run.
REPEATS = 60


class Nowhere(Transport):
    """Takes what Sentry sends."""

    def capture_envelope(self, envelope: Envelope) -> None:
        """Forget it."""


class Forgets:
    """Takes spans at their end."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Look at nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Forget it."""

    def _on_ending(self, span: Any) -> None:
        """Look at nothing."""

    def shutdown(self) -> None:
        """Nothing is open."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Nothing waits."""
        return True


def measure() -> Iterator[Figure]:
    """Runs that succeed, with our rooms of telemetry and without."""
    provider = TracerProvider()
    provider.add_span_processor(Forgets())  # type: ignore[arg-type]
    trace.set_tracer_provider(provider)
    instrumentor: Any = CeleryInstrumentor
    instrumentor().instrument()
    sentry_sdk.init(
        "http://key@127.0.0.1:9/1", transport=Nowhere, traces_sample_rate=1.0
    )
    app, tasks = in_process.make_app()
    gc.freeze()
    worker = SimpleNamespace(
        hostname="bench",
        app=app,
        consumer_cls="celery.worker.consumer:Consumer",
        _process_task=None,
        pool_cls="prefork",
    )
    installation = installation_of(app)
    WorkerSetup(installation, worker).apply()
    task = tasks[1]
    tracer.setup_worker_optimizations(app, "bench")
    try:
        task.__trace__ = tracer.build_tracer(task.name, task, app=app)
        child = installation.child
        assert child is not None
        ours = (Spans, SentryEvents)
        without = dataclasses.replace(
            child, around=tuple(r for r in child.around if not isinstance(r, ours))
        )
        best = {True: float("inf"), False: float("inf")}
        for _ in range(REPEATS):
            for has_ours in (True, False):
                installation.child = child if has_ours else without
                seconds = in_process._quietly(in_process._run, task, in_process.BATCH)
                best[has_ours] = min(best[has_ours], seconds)
    finally:
        tracer.reset_worker_optimizations(app)
    per_run = {key: value / in_process.BATCH * 1e6 for key, value in best.items()}
    yield Figure(
        "run with Sentry and OpenTelemetry: of their own integrations",
        per_run[True] / per_run[False],
        "x",
        at_most=1.03,
        raw=[f"without ours {per_run[False]:.1f} µs, with {per_run[True]:.1f} µs"],
    )
