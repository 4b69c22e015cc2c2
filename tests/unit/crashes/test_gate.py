"""A suspect runs alone in its worker, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from celery_resilience.crashes.gate import Gate


@dataclass(eq=False)
class Request:
    """A request, as far as the gate looks at it."""

    name: str
    runs_alone: bool = False

    def __repr__(self) -> str:
        return self.name


class Pool:
    """Runs what the gate admits; `execute` comes back to `admit`, as Celery does."""

    def __init__(self) -> None:
        self.gate = Gate(self.execute)
        self.running: list[Any] = []
        self.history: list[Any] = []

    def execute(self, request: Any) -> None:
        if self.gate.admit(request):
            assert request not in self.running, "it runs twice"
            self.running.append(request)
            self.history.append(request)

    def end(self, request: Any) -> None:
        self.running.remove(request)
        self.gate.left(request)


@pytest.fixture
def pool() -> Pool:
    """A pool behind a gate."""
    return Pool()


def some(count: int) -> list[Request]:
    """Ordinary requests."""
    return [Request(f"o{i}") for i in range(count)]


def suspects(count: int) -> list[Request]:
    """Requests that must run alone."""
    return [Request(f"s{i}", runs_alone=True) for i in range(count)]


def test_ordinary_requests_run_beside_each_other(pool: Pool) -> None:
    """Nothing waits while there is no suspect."""
    requests = some(3)

    for request in requests:
        pool.execute(request)

    assert pool.running == requests


def test_a_suspect_runs_at_once_where_nothing_runs(pool: Pool) -> None:
    """There is nobody to wait for."""
    (suspect,) = suspects(1)

    pool.execute(suspect)

    assert pool.running == [suspect]


def test_a_suspect_waits_until_nobody_runs_beside_it(pool: Pool) -> None:
    """For all of them."""
    one, two = some(2)
    (suspect,) = suspects(1)
    for request in (one, two, suspect):
        pool.execute(request)

    assert pool.running == [one, two]
    pool.end(one)
    assert pool.running == [two]
    pool.end(two)
    assert pool.running == [suspect]


def test_what_arrives_meanwhile_waits_for_the_suspect(pool: Pool) -> None:
    """Before it runs and while it runs; then all go, in their order."""
    first, *later = some(4)
    (suspect,) = suspects(1)
    pool.execute(first)
    pool.execute(suspect)
    pool.execute(later[0])
    pool.end(first)
    pool.execute(later[1])
    pool.execute(later[2])
    assert pool.running == [suspect]

    pool.end(suspect)

    assert pool.running == later


def test_suspects_run_one_at_a_time(pool: Pool) -> None:
    """In their order, and the others after all of them."""
    one, two = suspects(2)
    (other,) = some(1)
    for request in (one, other, two):
        pool.execute(request)

    assert pool.running == [one]
    pool.end(one)
    assert pool.running == [two]
    pool.end(two)
    assert pool.running == [other]


def test_after_the_suspects_the_gate_is_open_again(pool: Pool) -> None:
    """Requests pass with one look at a flag."""
    (suspect,) = suspects(1)
    pool.execute(suspect)
    pool.end(suspect)
    requests = some(2)

    for request in requests:
        pool.execute(request)

    assert pool.running == requests


def test_an_unknown_request_that_ends_changes_nothing(pool: Pool) -> None:
    """A revoked one never came to the gate."""
    (suspect,) = suspects(1)
    pool.execute(suspect)
    pool.gate.left(Request("never seen"))

    assert pool.running == [suspect]
    pool.execute(Request("other"))
    assert pool.running == [suspect]


def test_what_waits_is_forgotten_when_the_connection_is_lost(pool: Pool) -> None:
    """The broker delivers it again; what runs goes on."""
    running, waiting = some(2)
    one, two = suspects(2)
    for request in (running, one, two, waiting):
        pool.execute(request)

    pool.gate.clear()
    pool.end(running)

    assert pool.running == []
    later = Request("later")
    pool.execute(later)
    assert pool.running == [later]


def test_a_running_suspect_stays_alone_over_a_lost_connection(pool: Pool) -> None:
    """What is delivered again waits for it, and is then released."""
    (suspect,) = suspects(1)
    pool.execute(suspect)
    pool.execute(Request("forgotten"))

    pool.gate.clear()
    again = Request("again")
    pool.execute(again)

    assert pool.running == [suspect]
    pool.end(suspect)
    assert pool.running == [again]


def test_a_suspect_that_is_revoked_as_it_is_released_blocks_nobody() -> None:
    """Celery gives it up instead of handing it to the pool."""
    (suspect,) = suspects(1)
    first, other = some(2)
    ran: list[Any] = []

    def execute(request: Any) -> None:
        if request is suspect:
            gate.left(request)  # revoked: settled, never admitted
        elif gate.admit(request):
            ran.append(request)

    gate = Gate(execute)
    for request in (first, suspect, other):
        if gate.admit(request):
            ran.append(request)
    gate.left(first)

    assert ran == [first, other]


def test_a_task_may_end_inside_execute() -> None:
    """The solo pool runs it there and then."""
    order: list[Any] = []

    def execute(request: Any) -> None:
        if gate.admit(request):
            order.append(request)
            gate.left(request)

    gate = Gate(execute)
    one, two = suspects(2)
    requests = [*some(2), one, Request("z"), two]
    for request in requests:
        execute(request)

    assert sorted(map(str, order)) == sorted(map(str, requests))


def test_who_ends_a_run_never_waits_for_a_slot() -> None:
    """A pool frees its slots in the thread that reports what has ended."""
    slots = Semaphore(2)
    ended: SimpleQueue[Any] = SimpleQueue()

    def execute(request: Any) -> None:
        if gate.admit(request):
            slots.acquire()
            ended.put(request)

    def start(release: Callable[[], None]) -> None:
        Thread(target=release, daemon=True).start()

    gate = Gate(execute, start=start)
    (suspect,) = suspects(1)
    execute(suspect)
    for request in (others := some(9)):
        execute(request)

    order = []
    for _ in range(1 + len(others)):
        order.append(ended.get(timeout=10))
        slots.release()
        gate.left(order[-1])
    assert order == [suspect, *others]
    assert gate.waiting() == set()


def test_a_pool_that_takes_nothing_more_ends_nothing_else() -> None:
    """What it refused is forgotten, and the next one is tried."""
    (suspect,) = suspects(1)
    first, second = some(2)
    ran: list[Any] = []

    def execute(request: Any) -> None:
        if gate.admit(request):
            if request is first:
                raise RuntimeError("cannot schedule new futures after shutdown")
            ran.append(request)

    gate = Gate(execute)
    for request in (suspect, first, second):
        execute(request)
    gate.left(suspect)

    assert ran == [suspect, second]
    gate.left(second)
    execute(later := Request("later"))
    assert ran[-1] is later


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40))
def test_everybody_is_released_in_the_end(events: list[tuple[bool, int]]) -> None:
    """Whatever arrives and ends in whatever order."""
    pool = Pool()
    arrived: list[Request] = []
    for number, (is_suspect, ending) in enumerate(events):
        request = Request(str(number), runs_alone=is_suspect)
        arrived.append(request)
        pool.execute(request)
        if ending < len(pool.running):
            pool.end(pool.running[ending])
    while pool.running:
        pool.end(pool.running[0])

    assert set(pool.history) == set(arrived)
    assert len(pool.history) == len(arrived)


class AnyOrder(RuleBasedStateMachine):
    """Arrivals, ends and lost connections in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.waiting: set[Any] = set()
        self.number = 0

    @rule(is_suspect=st.booleans())
    def arrive(self, is_suspect: bool) -> None:
        self.number += 1
        request = Request(str(self.number), runs_alone=is_suspect)
        self.waiting.add(request)
        self.pool.execute(request)
        self.waiting -= set(self.pool.running)

    @precondition(lambda self: self.pool.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.end(data.draw(st.sampled_from(self.pool.running)))
        self.waiting -= set(self.pool.running)

    @rule()
    def lose_the_connection(self) -> None:
        self.pool.gate.clear()
        self.waiting.clear()

    @invariant()
    def a_suspect_is_alone(self) -> None:
        if any(request.runs_alone for request in self.pool.running):
            assert len(self.pool.running) == 1

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if not self.pool.running:
            assert not self.waiting


TestAnyOrder = AnyOrder.TestCase
