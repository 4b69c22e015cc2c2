"""What is asked again and again, and what is known without an answer: nothing."""

from __future__ import annotations

from threading import Event, Thread

import pytest
from polling import eventually

from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.probes import GOOD_S, Answer, Probe, Probes


class Store:
    """Answers, or does not."""

    def __init__(self) -> None:
        self.count: float | None = 3.0
        self.asked = 0

    def __call__(self) -> Answer:
        """How many failed tasks there are."""
        self.asked += 1
        if self.count is None:
            raise ConnectionError("away")
        return {i.UNRESOLVED: {("q",): self.count}}


class Clock:
    """Stands until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def store() -> Store:
    """One with three failed tasks."""
    return Store()


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture
def probes(store: Store, clock: Clock) -> Probes:
    """One question."""
    return Probes([Probe("store", store, clock)])


def known(probes: Probes) -> tuple[dict[tuple[str, ...], float], float]:
    """What is known of failed tasks, and whether the question was answered."""
    ((_, success),) = probes.successes()
    return dict(probes.look(i.UNRESOLVED)), success


def test_what_nobody_knows_is_not_zero(
    probes: Probes, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first answer, and while there is none; it is told once."""
    (probe,) = probes.all
    assert known(probes) == ({}, 0)
    probe.ask_once()
    assert known(probes) == ({("q",): 3.0}, 1)

    store.count = None
    for _ in range(3):
        probe.ask_once()
    assert known(probes) == ({}, 0)
    assert caplog.text.count("nobody knows: away") == 1

    store.count = 0.0
    probe.ask_once()
    assert known(probes) == ({("q",): 0.0}, 1)


def test_an_answer_gets_too_old(probes: Probes, clock: Clock) -> None:
    """A question that hangs is one without an answer."""
    probes.all[0].ask_once()
    clock.now += GOOD_S
    assert known(probes)[1] == 1
    clock.now += 0.1
    assert known(probes) == ({}, 0)


def test_it_asks_until_the_worker_has_ended(store: Store, clock: Clock) -> None:
    """At once, and the thread ends with the worker."""
    has_ended = Event()
    thread = Thread(target=Probe("store", store, clock).run, args=(has_ended,))
    thread.start()
    eventually(lambda: store.asked, within_s=5)
    has_ended.set()
    thread.join(5)

    assert not thread.is_alive()
    assert store.asked == 1
