"""Spans of failed publishes and of runs say what only we know."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, current_app, signals
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from celery_resilience import Resilience, ResilientTask
from celery_resilience.failure import Failure
from celery_resilience.message import HEADER
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.telemetry.binding import TRACE
from celery_resilience.telemetry.opentelemetry import Spans, publish_failed
from celery_resilience.telemetry.opentelemetry_instrumentor import open_publishes
from celery_resilience.telemetry.signals import hear_in_place_of_instrumentor

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"

#: An app's errors are never those of a process's end.
ALIVE = {"is_ending": lambda exc: False}


class Api:
    """`opentelemetry.trace` with a provider of the test's own."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(trace, name)

    def get_tracer(self, name: str) -> Any:
        """Of the test's provider."""
        return self._provider.get_tracer(name)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """Where finished spans are."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    """A provider of a test's own."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def instrumented(provider: TracerProvider) -> Iterator[None]:
    """The contrib instrumentor is on."""
    CeleryInstrumentor().instrument(tracer_provider=provider)
    yield
    CeleryInstrumentor().uninstrument()
    for signal in (signals.task_failure, signals.task_retry):
        signal.disconnect(dispatch_uid="celery_resilience-spans")


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app whose broker is away."""
    before = current_app._get_current_object()
    app = Celery("shop", broker="redis://127.0.0.1:9/0", set_as_current=True)
    at_once = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
    app.conf.update(task_publish_retry=False, broker_transport_options=at_once)
    Resilience(app)
    yield app
    app.close()
    before.set_current()


def test_a_failed_publish_leaves_no_span_open(
    instrumented: None, app: Celery, exporter: InMemorySpanExporter
) -> None:
    """It ends as an error, and is not the parent of what comes later."""

    @app.task(base=ResilientTask, name="ship", shared=False)
    def ship() -> None: ...

    app.finalize()
    task = app.tasks["ship"]
    for _ in range(3):
        with pytest.raises(Exception, match="refused"):
            task.delay()

    assert not trace.get_current_span().get_span_context().is_valid
    assert list(open_publishes(task)) == []
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["apply_async/ship"] * 3
    assert all(span.status.status_code is StatusCode.ERROR for span in spans)
    assert all(span.parent is None for span in spans)


def test_without_open_spans_nothing_is_ended() -> None:
    """The task was never published, or the instrumentor keeps something else."""
    publish_failed(SimpleNamespace())
    task = SimpleNamespace(__dict__={})
    setattr(task, "__otel_task_span", {("1", False): (None, None, None), "x": 1})

    assert list(open_publishes(task)) == []


def a_task(**options: Any) -> Any:
    """What a run's hooks ask a task."""
    return SimpleNamespace(
        **{"throws": (), "parameter_names": ("password",), "hidden_names": ()} | options
    )


def a_request(**marks: Any) -> Any:
    """What they ask its request."""
    words: dict[str, Any] = {"args": ("hunter2",), "kwargs": {}, "retries": 1}
    return SimpleNamespace(**words, **({HEADER: marks} if marks else {}))


FACTS = {"exception": "shop.Lost", "message": "hunter2 is lost", "fingerprint": "f"}


def failed_run(
    provider: TracerProvider, exporter: InMemorySpanExporter, task: Any
) -> tuple[Any, dict[str, Any]]:
    """The span of a run that failed, and its facts."""
    spans, facts = Spans(Api(provider), **ALIVE), dict(FACTS)
    with provider.get_tracer("t").start_as_current_span("run/ship"):
        spans.run_failed(task, a_request(), LookupError("hunter2 is lost"), facts)
    (span,) = exporter.get_finished_spans()
    return span, facts


def test_a_failed_runs_span_says_why(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """With the true exception, and no secret; the settlement hears the trace."""
    span, facts = failed_run(provider, exporter, a_task())

    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "*** is lost"
    assert span.attributes["error.type"] == "shop.Lost"
    assert span.attributes["celery_resilience.reason"] == "exception"
    assert span.attributes["celery_resilience.attempt"] == 2
    assert facts["trace_id"] == f"{span.context.trace_id:032x}"
    assert "hunter2" not in span.to_json()


def test_an_expected_exception_is_no_error(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """As Celery's `throws` says; the span has the reason all the same."""
    span, _ = failed_run(provider, exporter, a_task(throws=(LookupError,)))

    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()
    assert span.attributes["celery_resilience.fingerprint"] == "f"


def a_death(**words: Any) -> Settlement:
    """A run that ended with its process."""
    facts: dict[str, Any] = {
        "outcome": Outcome.FAILED,
        "reason": Reason.WORKER_LOST,
        "task": "shop.ship",
        "task_id": "task-1",
        "queue": "orders",
        "worker": "w@h",
        "pid": 77,
        "run_s": 2.0,
        "failure": Failure("WorkerLostError", "signal 9", "f"),
        "traceparent": PARENT,
    }
    return Settlement(**facts | words)


def test_a_dead_process_has_its_span(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """From its run's start, in the trace of its message, as an error."""
    more: dict[str, Any] = {}

    Spans(Api(provider), clock=lambda: 100.0, **ALIVE).failing(a_death(), more)

    (span,) = exporter.get_finished_spans()
    assert span.name == "run/shop.ship"
    assert (span.start_time, span.end_time) == (98 * 10**9, 100 * 10**9)
    assert f"{span.parent.span_id:016x}" == "b" * 16
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "WorkerLostError"
    assert span.attributes["messaging.message.id"] == "task-1"
    assert more["trace_id"] == "a" * 32
    assert more["span_id"] == f"{span.context.span_id:016x}"


def test_a_death_that_runs_again_is_no_error(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """Nor is one a span whose run had not started, or whose span has ended."""
    spans = Spans(Api(provider), **ALIVE)
    spans.requeued(a_death(outcome=Outcome.REQUEUED, failure=None))
    spans.requeued(a_death(outcome=Outcome.REQUEUED, failure=None, run_s=None))
    spans.failing(a_death(reason=Reason.REJECTED), {})

    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["celery_resilience.outcome"] == "requeued"


def test_a_replays_span_is_linked_to_the_old_trace(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    """In the process that runs it, and where that has died."""
    spans = Spans(Api(provider), **ALIVE)
    with provider.get_tracer("t").start_as_current_span("run/ship"):
        spans.before(a_task(), a_request(trace=PARENT))
        spans.before(a_task(), a_request(trace="garbage"))
        spans.before(a_task(), a_request())
    spans.failing(a_death(traceparent=None, marks={"trace": PARENT}), {})

    for span in exporter.get_finished_spans():
        (link,) = span.links
        assert f"{link.context.trace_id:032x}" == "a" * 32
        assert span.parent is None


def test_a_replay_without_a_span_keeps_the_trace_of_its_message(
    provider: TracerProvider,
) -> None:
    """The one that is active has no trace: 32 zeros are none."""
    spans = Spans(Api(provider), **ALIVE)
    without, within = a_request(trace=PARENT), a_request(trace=PARENT)

    spans.before(a_task(), without)
    with provider.get_tracer("t").start_as_current_span("run/ship") as span:
        spans.before(a_task(), within)

    assert TRACE not in vars(without)
    assert vars(within)[TRACE] == f"{span.get_span_context().trace_id:032x}"


def test_a_link_that_fails_fails_no_run(
    provider: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    """An older release's span takes none, for example; it is told once."""

    class Older(Api):
        def get_current_span(self) -> Any:
            context = SimpleNamespace(is_valid=True, trace_id=1)
            return SimpleNamespace(get_span_context=lambda: context)

    spans = Spans(Older(provider), **ALIVE)

    for _ in range(2):
        spans.before(a_task(), a_request(trace=PARENT))

    assert caplog.text.count("a span has no link") == 1
    assert "add_link" in caplog.text


def test_the_instrumentors_receivers_give_way_for_our_tasks(
    instrumented: None,
    app: Celery,
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
) -> None:
    """It would write the unredacted text of a retry, and of a failure told already."""

    @app.task(base=ResilientTask, name="kept", redact=["pin"], shared=False)
    def kept(pin: str) -> None: ...

    @app.task(name="plain", shared=False)
    def plain(pin: str) -> None: ...

    hear_in_place_of_instrumentor(Spans(Api(provider), **ALIVE))
    app.finalize()
    for name in ("kept", "plain"):
        task = app.tasks[name]
        task.push_request(id="1", args=("12345",), kwargs={}, called_directly=False)
        signals.task_prerun.send(sender=task, task=task, task_id="1")
        signals.task_retry.send(
            sender=task, request=task.request, reason=ValueError("12345")
        )
        signals.task_postrun.send(sender=task, task=task, task_id="1")
        task.pop_request()

    ours, theirs = exporter.get_finished_spans()
    assert ours.attributes["celery.retry.reason"] == "***"
    assert theirs.attributes["celery.retry.reason"] == "12345"
