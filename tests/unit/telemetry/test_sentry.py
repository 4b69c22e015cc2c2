"""What a worker's main process tells Sentry of a death, and what it keeps from it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from celery_resilience.events import emit
from celery_resilience.failure import Failure
from celery_resilience.outcome import Outcome, Reason, Settlement
from celery_resilience.telemetry import sentry
from celery_resilience.telemetry.sentry import SentryEvents
from celery_resilience.telemetry.sentry_event import CHILD_EXITED


class Scope:
    """Sentry's, as far as it is asked."""

    def __init__(self) -> None:
        self.processors: list[Any] = []
        self.has_cleared = False

    def add_event_processor(self, processor: Any) -> None:
        """Remember it."""
        self.processors.append(processor)

    def clear_breadcrumbs(self) -> None:
        """Remember that."""
        self.has_cleared = True


class Sdk:
    """The module `sentry_sdk`, as far as it is asked."""

    def __init__(self) -> None:
        self.scope, self.forked = Scope(), Scope()
        self.events: list[dict[str, Any]] = []
        self.flushes: list[float] = []
        self.active = True

    def get_global_scope(self) -> Scope:
        """The process's."""
        return self.scope

    def get_client(self) -> Any:
        """Itself."""
        return self

    def is_active(self) -> bool:
        """Whether `init` was called."""
        return self.active

    @contextmanager
    def isolation_scope(self) -> Iterator[Scope]:
        """One of its own."""
        yield self.forked

    def capture_event(self, event: dict[str, Any]) -> str:
        """Send nothing."""
        self.events.append(event)
        return "e" * 32

    def flush(self, timeout: float) -> None:
        """Send what waits."""
        self.flushes.append(timeout)


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sdk]:
    """With nothing attached before and after the test."""
    monkeypatch.setattr(sentry, "_attached", None)
    yield Sdk()
    if sentry._attached is not None:
        sentry._attached.detach()


def attached(sdk: Sdk, runs_in: int = 0) -> SentryEvents:
    """What a worker sets up."""
    events = SentryEvents(
        sdk,
        facts=None,  # type: ignore[arg-type]
        commands=lambda *_: {},
        is_running_in=lambda pid: pid == runs_in,
    )
    events.attach()
    return events


def a_death(pid: int = 77, outcome: Outcome = Outcome.FAILED) -> Settlement:
    """A run that ended with its process."""
    failure = Failure("WorkerLostError", "signal 9 (SIGKILL)", "f" * 16)
    return Settlement(
        *(outcome, Reason.WORKER_LOST, "ship", "task-1", "q", "w@h"),
        pid=pid,
        failure=failure if outcome is Outcome.FAILED else None,
    )


def exit_of(pid: int) -> dict[str, Any]:
    """What Sentry makes of billiard's line about a dead child."""
    entry = {"message": CHILD_EXITED, "params": ("F", pid, "signal 9")}
    return {"logger": "multiprocessing", "logentry": entry}


def test_setting_up_twice_tells_once(sdk: Sdk) -> None:
    """Another worker in the same process takes the place of the first."""
    attached(sdk)
    attached(sdk)
    more: dict[str, Any] = {}

    emit("delivery.failing_silently", settlement=a_death(), more=more)
    emit("lifecycle.stopped", code=0)
    emit("lifecycle.exiting", code=0)

    assert len(sdk.events) == len(sdk.scope.processors) == 1
    assert more["sentry_event_id"] == "e" * 32
    assert sdk.forked.has_cleared
    assert sdk.flushes == [sentry.FLUSH_WITHIN_S]


def test_the_event_is_in_the_trace_of_the_span(sdk: Sdk) -> None:
    """Where OpenTelemetry has made one for the same death."""
    attached(sdk)
    ids = {"trace_id": "a" * 32, "span_id": "b" * 16}

    emit("delivery.failing_silently", settlement=a_death(), more=dict(ids))

    assert sdk.events[0]["contexts"]["trace"] == ids


def test_a_scope_that_fails_fails_no_run(
    sdk: Sdk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of once, though there is one for each run."""

    def fail() -> None:
        raise RuntimeError("no scope")

    events = attached(sdk)
    monkeypatch.setattr(events.sdk, "get_isolation_scope", fail, raising=False)

    for _ in range(2):
        events.before(SimpleNamespace(name="ship"), SimpleNamespace(id="1"))

    assert caplog.text.count("lack what only we know") == 1


def test_without_a_client_nothing_is_told(sdk: Sdk) -> None:
    """Sentry was imported, and not initialised in this process."""
    sdk.active = False
    attached(sdk)
    more: dict[str, Any] = {}

    emit("delivery.failing_silently", settlement=a_death(), more=more)
    emit("lifecycle.stopped", code=0)

    assert sdk.events == []
    assert more == {}
    assert sdk.flushes == []


def test_a_childs_end_is_told_with_its_task_or_not_at_all(sdk: Sdk) -> None:
    """Once for each death: the system may give the number to another child."""
    attached(sdk, runs_in=5)
    (look_at,) = sdk.scope.processors
    emit("delivery.failing_silently", settlement=a_death(77), more={})
    emit("delivery.requeued", settlement=a_death(78, Outcome.REQUEUED))

    assert look_at(exit_of(77), {}) is None
    assert look_at(exit_of(78), {}) is None
    assert look_at(exit_of(5), {}) is None
    assert look_at(exit_of(77), {}) == exit_of(77)
    assert look_at(exit_of(6), {}) == exit_of(6)
    transaction = {"type": "transaction", "logger": "celery_resilience.failed"}
    assert look_at(transaction, {}) is transaction


@pytest.mark.parametrize("missing", sentry.NEEDED)
def test_an_sdk_that_is_too_old_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    """A worker starts beside sentry-sdk 1, and says why it tells Sentry nothing."""
    sdk = SimpleNamespace(**dict.fromkeys(sentry.NEEDED))
    monkeypatch.setitem(sys.modules, "sentry_sdk", sdk)
    assert sentry.sdk_in_use() is sdk

    delattr(sdk, missing)

    assert sentry.sdk_in_use() is None
    assert f"lacks {missing}" in caplog.text


def test_the_sdk_has_what_is_needed() -> None:
    """A name that it never had would switch us off."""
    import sentry_sdk

    assert sentry.sdk_in_use() is sentry_sdk


def test_what_the_sdk_puts_around_a_childs_loop_hides_nothing() -> None:
    """Its wrapper has Celery's loop in a closure; the worker would warn of weak doors."""
    source = """
        import sentry_sdk
        sentry_sdk.init()
        from billiard.pool import Worker
        from celery_resilience._pools import child_is_as_read
        print(Worker.workloop.__name__, child_is_as_read())
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stdout == "sentry_workloop True\n", done.stderr
