"""A worker's life, as far as it is told without a worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state
from services import free_port
from unit.specimens import a_failure, a_settlement

from celery_resilience import draining
from celery_resilience.draining import SharedFlags
from celery_resilience.errors import ConfigurationError
from celery_resilience.events import emit, observe
from celery_resilience.lifecycle import bootstep
from celery_resilience.lifecycle.bootstep import Lifecycle, LifecycleStep
from celery_resilience.lifecycle.policy import StopConditions
from celery_resilience.outcome import EVENTS, Outcome, Reason, Settlement


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lifecycle]:
    """Of a worker that is not there."""
    for name in ("should_stop", "should_terminate"):
        monkeypatch.setattr(state, name, None)
    life = Lifecycle(
        SimpleNamespace(exitcode=None, hostname="w@unit", pool=None),
        SharedFlags(),
        drain_timeout_s=30,
        conditions=StopConditions(after_tasks=2),
    )
    life.attach()
    yield life
    life._detach()


def interrupted(outcome: Outcome, **changes: Any) -> Settlement:
    """A run that was cut off."""
    failure = a_failure(exception="billiard.exceptions.WorkerLostError")
    return replace(
        a_settlement(),
        outcome=outcome,
        reason=Reason.INTERRUPTED,
        run_s=1.0,
        failure=failure if outcome is Outcome.FAILED else None,
        **changes,
    )


def test_a_worker_over_its_memory_is_recycled(life: Lifecycle) -> None:
    """The event is of a room that lifecycle does not know."""
    emit("memory.worker_over_limit", rss_mib=900)

    assert state.should_stop == 0
    assert life.flags.is_draining
    emit("delivery.closed")
    assert life.worker.exitcode == 12


@pytest.mark.parametrize(
    ("outcome", "code"), [(Outcome.REQUEUED, 75), (Outcome.FAILED, 76)]
)
def test_what_a_drain_cuts_off_is_its_exit_code(
    life: Lifecycle, outcome: Outcome, code: int
) -> None:
    """Celery's own would be 0."""
    life.worker.exitcode = 0
    life.begin("SIGTERM")
    emit(EVENTS[outcome], settlement=interrupted(outcome))
    emit("delivery.closed")

    assert life.worker.exitcode == code


@pytest.mark.parametrize("is_child", [False, True])
def test_only_a_child_lets_the_health_port_go(life: Lifecycle, is_child: bool) -> None:
    """On solo, Celery says in the main process that one has begun."""
    closed: list[bool] = []
    server: Any = SimpleNamespace(close_in_child=lambda: closed.append(True))
    life._servers = [server]
    if is_child:
        life._main_pid += 1

    life.forked()

    assert closed == [True] * is_child


def test_a_process_that_outlives_its_worker_drains_no_more(life: Lifecycle) -> None:
    """As a test's, or a web server's with a worker inside; another one's flags stay."""
    life.flags = draining.share()
    life.begin("SIGTERM")
    assert draining.is_draining()

    life.ended()
    assert not draining.is_draining()
    assert draining.shared() is None
    another = draining.share()
    life.ended()
    assert draining.shared() is another
    draining.unshare(another)


def test_what_nobody_has_cut_off_is_not(life: Lifecycle) -> None:
    """A message that had not started, a lost connection, a key's own refusal."""
    lost_connection = interrupted(Outcome.REQUEUED)
    emit("delivery.requeued", settlement=lost_connection)
    life.begin("SIGTERM")
    unstarted = replace(interrupted(Outcome.REQUEUED), run_s=None)
    emit("delivery.requeued", settlement=unstarted)
    crashed = replace(lost_connection, reason=Reason.WORKER_LOST)
    emit("delivery.requeued", settlement=crashed)
    keyed = replace(
        interrupted(Outcome.FAILED),
        failure=a_failure(exception="celery_resilience.errors.RunInterrupted"),
    )
    emit("delivery.failed", settlement=keyed)
    emit("delivery.closed")

    assert life.worker.exitcode == 0


def test_what_nothing_takes_is_lost(life: Lifecycle) -> None:
    """The line at CRITICAL is all that is left of it."""
    life.begin("SIGTERM")
    emit("delivery.given_up", queue="q")
    emit("delivery.closed")

    assert life.worker.exitcode == 76


def test_an_end_without_a_signal_has_celerys_own_reason(life: Lifecycle) -> None:
    """A remote shutdown is well; an error keeps its exit code."""
    step = LifecycleStep.__new__(LifecycleStep)
    type(step).lifecycle = life
    life.worker.exitcode = 1
    step.close(life.worker)
    life.ended()
    assert life.worker.exitcode == 1
    assert life.drain.has_ended.is_set()
    assert life.drain.words() == "an error (an error); exit code 1"


def test_an_end_is_told_once(life: Lifecycle) -> None:
    """A warm stop has two moments at which all is settled."""
    told: list[int] = []

    def hear(code: int) -> None:
        told.append(code)

    stop = observe("lifecycle.stopped", hear)
    life.begin("SIGTERM")
    emit("delivery.closed")
    life.ended()
    stop()

    assert told == [0]


def test_the_count_of_tasks_ends_a_worker(life: Lifecycle) -> None:
    """At the limit, and not before."""
    life.delivery_closed()
    assert state.should_stop is None
    life.delivery_closed()
    assert state.should_stop == 0
    assert life.drain.asked is not None
    assert life.drain.asked.why == "2 tasks"


def test_a_second_worker_of_a_process_takes_the_place_of_the_first(
    life: Lifecycle,
) -> None:
    """Each event is heard by one."""
    second = Lifecycle(
        SimpleNamespace(exitcode=None),
        SharedFlags(),
        drain_timeout_s=None,
        conditions=StopConditions(),
    )
    second.attach()
    emit("memory.worker_over_limit")
    second._detach()

    assert second.drain.has_begun.is_set()
    assert not life.drain.has_begun.is_set()
    assert bootstep._detach == second._detach


def test_a_port_that_the_other_flag_has_is_told() -> None:
    """Nobody else's process needs to be looked for."""
    port = free_port()
    life = Lifecycle(
        SimpleNamespace(exitcode=None),
        SharedFlags(),
        drain_timeout_s=None,
        conditions=StopConditions(),
        health_address=("", port),
        pages_address=("localhost", port),
        pages={"/metrics": lambda accepted: ("text/plain", b"")},
    )
    said = r"metrics_port: .*: resilience_health_port has the port, on \*; give both"
    try:
        with pytest.raises(ConfigurationError, match=said):
            life.listen()
    finally:
        for server in life._servers:
            server.close()


def test_a_task_that_is_not_resilient_is_counted_at_the_deadline(
    life: Lifecycle,
) -> None:
    """It settles nothing, and Celery tells nobody."""
    life._count_plain(SimpleNamespace(task=SimpleNamespace(acks_late=True)))
    life._count_plain(SimpleNamespace(task=SimpleNamespace(acks_late=False)))
    life._count_plain(SimpleNamespace(settled_as=None))

    assert (life.drain.put_back, life.drain.lost) == (1, 1)


def test_the_start_line_says_how_it_will_end(life: Lifecycle) -> None:
    """With the numbers."""
    assert life.words() == "drains for at most 30 s; stops after 2 tasks"
