"""What happened is told to whoever listens, and no listener breaks anything."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from unit.specimens import fresh_name

from celery_resilience import events
from celery_resilience.events import emit, observe, observed


@pytest.fixture
def name() -> Iterator[str]:
    """An event that no other test observes."""
    name = fresh_name("room.happened")
    yield name
    events._observers.pop(name, None)


def test_observers_hear_the_facts_in_order(name: str) -> None:
    """Each that was added, in its order, with every fact."""
    heard: list[Any] = []
    observe(name, lambda **facts: heard.append((1, facts)))
    observe(name, lambda **facts: heard.append((2, facts)))

    emit(name, task="t", count=2)

    assert heard == [(1, {"task": "t", "count": 2}), (2, {"task": "t", "count": 2})]


def test_only_the_named_event_is_heard(name: str) -> None:
    """Another event is another's business."""
    heard: list[Any] = []
    observe(name, lambda **facts: heard.append(facts))

    emit(f"{name}.else", task="t")

    assert heard == []


def test_an_event_that_nobody_observes_costs_nothing(name: str) -> None:
    """Emitters whose facts cost something ask first."""
    assert not observed(name)
    emit(name, task="t")

    stop = observe(name, lambda **_: None)
    assert observed(name)
    stop()
    assert not observed(name)


def test_an_observer_is_heard_once(name: str) -> None:
    """Installing twice is installing once."""
    heard: list[Any] = []

    def hear(**facts: Any) -> None:
        heard.append(facts)

    observe(name, hear)
    observe(name, hear)
    emit(name)

    assert heard == [{}]


def test_an_ended_observation_is_ended(name: str) -> None:
    """The others go on, and ending it again does nothing."""
    heard: list[int] = []
    stop = observe(name, lambda **_: heard.append(1))
    observe(name, lambda **_: heard.append(2))

    stop()
    stop()
    emit(name)

    assert heard == [2]


def test_a_broken_observer_breaks_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The task goes on, the next observer hears it, and the log tells once."""
    heard: list[Any] = []

    def broken(**facts: Any) -> None:
        raise {1: ValueError, 2: KeyError}[facts["kind"]]("oops")

    observe(name, broken)
    observe(name, lambda **facts: heard.append(facts["kind"]))
    with caplog.at_level(logging.ERROR, "celery_resilience.events"):
        for kind in (1, 1, 2, 1, 2):
            emit(name, kind=kind)

    assert heard == [1, 1, 2, 1, 2]
    assert [record.args for record in caplog.records] == [
        (name, "ValueError"),
        (name, "KeyError"),
    ]
    assert all(record.exc_info for record in caplog.records)


def test_the_end_of_the_process_is_not_swallowed(name: str) -> None:
    """A SystemExit in an observer is the process's."""

    def leave(**_: Any) -> None:
        raise SystemExit(3)

    observe(name, leave)

    with pytest.raises(SystemExit):
        emit(name)


def test_an_observer_may_end_its_own_observation(name: str) -> None:
    """While it is told, the others still hear."""
    heard: list[int] = []

    def once(**_: Any) -> None:
        heard.append(1)
        stop()

    stop = observe(name, once)
    observe(name, lambda **_: heard.append(2))
    emit(name)
    emit(name)

    assert heard == [1, 2, 2]


def test_a_bound_method_that_was_added_twice_can_be_ended(name: str) -> None:
    """`observer.method` is a new object each time."""

    class Observer:
        def hear(self, **_: Any) -> None: ...

    observer = Observer()
    observe(name, observer.hear)
    stop = observe(name, observer.hear)

    stop()

    assert not observed(name)
