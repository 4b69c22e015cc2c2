"""pybreaker's breaker with a fleet's circuit: what pybreaker 1.4 does wrong, done right."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pybreaker
import pytest
from celery.exceptions import Ignore, Reject, Retry
from polling import eventually

from celery_resilience import CircuitOpen, Skip, Snooze
from celery_resilience.body import HEARS_OF_CIRCUITS
from celery_resilience.circuits.breaker import (
    CircuitOpenInTask,
    FleetBreaker,
    PlainBreaker,
)
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.circuits.memory_store import MemoryCircuitStore
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.errors import StoreUnavailable
from celery_resilience.events import observe

#: Opens at the third failure of three, for as long as the test takes.
QUICK: dict[str, Any] = {"min_calls": 3, "open_s": 600, "jitter": 0.0}


class Dependency:
    """A service that is away when it is told to be."""

    def __init__(self) -> None:
        self.calls = 0

    def fail(self) -> None:
        """Not now."""
        self.calls += 1
        raise ConnectionError("away")

    def work(self) -> str:
        """Now."""
        self.calls += 1
        return "done"


class Clock:
    """Wall time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now + time.monotonic()


@pytest.fixture
def clock() -> Clock:
    """The store's."""
    return Clock()


Make = Callable[..., FleetBreaker]


@pytest.fixture
def make(clock: Clock) -> Make:
    """Makes a breaker of the circuit "bank", in a process of its own each time."""
    store = MemoryCircuitStore(clock)

    def breaker(**options: Any) -> FleetBreaker:
        given = {"bank": CircuitOptions(**{**QUICK, **options})}
        fleet = Circuits(lambda: store, lambda: given)
        return FleetBreaker(fleet, fleet.get("bank"))

    return breaker


@pytest.fixture
def dependency() -> Dependency:
    """One that counts its calls."""
    return Dependency()


def call(breaker: Any, function: Callable[[], Any]) -> Any:
    """What a call comes to: its result, or the exception itself."""
    try:
        return breaker.call(function)
    except BaseException as exc:
        return exc


def trip(breaker: FleetBreaker) -> None:
    """Let it open."""
    for _ in range(3):
        assert isinstance(call(breaker, Dependency().fail), ConnectionError)
    eventually(lambda: breaker.current_state == "open", within_s=5)


def is_closed_and_counts(breaker: FleetBreaker, calls: int, failures: int) -> None:
    """The process has told so many calls, and it is closed."""

    def told() -> bool:
        return breaker.fleet_state.calls == calls

    if calls:
        eventually(told, within_s=5, what=str(breaker.fleet_state))
    assert breaker.fail_counter == failures
    assert breaker.current_state == "closed"


# --- the faults of pybreaker -----------------------------------------------------------


def test_no_lock_is_held_during_a_call(make: Make) -> None:
    """Two threads are in a call at the same time."""
    breaker, both = make(), threading.Barrier(2, timeout=10)
    threads = [threading.Thread(target=breaker.call, args=(both.wait,)) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not both.broken


def test_the_original_exception_is_never_replaced(make: Make) -> None:
    """Not by the call that trips it either; then the circuit's own is raised."""
    breaker = make()
    trip(breaker)

    refused = call(breaker, Dependency().work)
    assert isinstance(refused, CircuitOpen)
    assert isinstance(refused, pybreaker.CircuitBreakerError)
    assert refused.name == "bank"
    assert 590 < refused.retry_after_s <= 600
    assert refused.generation > 0
    assert str(refused).startswith("circuit bank is open for another")
    again = pickle.loads(pickle.dumps(refused))
    assert (again.name, again.retry_after_s) == (refused.name, refused.retry_after_s)


@pytest.mark.parametrize(
    "exc",
    [
        Retry(), Ignore(), Reject(), Skip("no"), Snooze(1), SystemExit(),
        KeyboardInterrupt(), GeneratorExit(), StoreUnavailable(),
        CircuitOpen("another"),
    ],
    ids=lambda exc: type(exc).__name__,
)  # fmt: skip
def test_what_steers_celery_counts_nothing(make: Make, exc: BaseException) -> None:
    """Neither as failure nor as success."""
    breaker = make()

    def raise_it() -> None:
        raise exc

    for _ in range(5):
        assert call(breaker, raise_it) is exc
    call(breaker, Dependency().fail)
    is_closed_and_counts(breaker, 1, 1)


def test_an_excluded_exception_is_no_success(make: Make) -> None:
    """It resets nothing; also one whose class has a metaclass, or by a callable."""
    from abc import ABC

    class Business(ABC, Exception):
        """Not the dependency's fault."""

    breaker = make(exclude=(Business,), consecutive=3, min_calls=1_000)
    breaker.add_excluded_exception(lambda exc: "fine" in str(exc))  # type: ignore[arg-type]

    def business() -> None:
        raise Business

    def fine() -> None:
        raise ValueError("fine")

    for _ in range(3):
        assert isinstance(call(breaker, business), Business)
        assert isinstance(call(breaker, fine), ValueError)
        assert isinstance(call(breaker, Dependency().fail), ConnectionError)
    eventually(lambda: breaker.current_state == "open", within_s=5)


def test_a_coroutine_is_guarded_until_it_ends(make: Make) -> None:
    """As a decorator, by `call`, and in a block; each failure counts."""
    breaker = make()

    @breaker
    async def decorated() -> None:
        await asyncio.sleep(0)
        raise ConnectionError

    async def plain() -> None:
        await asyncio.sleep(0)
        raise ConnectionError

    async def in_a_block() -> None:
        async with breaker:
            await plain()

    async def main() -> None:
        for function in (decorated, lambda: breaker.call(plain), in_a_block):
            with pytest.raises(ConnectionError):
                await function()

    asyncio.run(main())
    eventually(lambda: breaker.current_state == "open", within_s=5)

    async def refused() -> None:
        with pytest.raises(CircuitOpen):
            await decorated()
        with pytest.raises(CircuitOpen):
            async with breaker:
                pytest.fail("it was let in")

    asyncio.run(refused())


def test_concurrent_coroutines_do_not_mix_their_calls(make: Make) -> None:
    """The one that ends first is not taken for the other."""
    breaker = make(min_calls=100)

    async def one(
        ends: asyncio.Event, waits_for: asyncio.Event, *, fails: bool
    ) -> None:
        with breaker:
            await waits_for.wait()
            ends.set()
            if fails:
                raise ConnectionError

    async def main() -> None:
        first, second, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        tasks = [
            asyncio.create_task(one(first, second, fails=True)),
            asyncio.create_task(one(second, go, fails=False)),
        ]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    is_closed_and_counts(breaker, 2, 1)


def test_generators_are_guarded_until_they_end(make: Make) -> None:
    """One that is abandoned counts nothing."""
    breaker = make()

    @breaker
    def numbers(*, fails: bool) -> Iterator[int]:
        yield 1
        if fails:
            raise ConnectionError
        yield 2

    abandoned = numbers(fails=True)
    next(abandoned)
    abandoned.close()
    assert list(numbers(fails=False)) == [1, 2]
    with pytest.raises(ConnectionError):
        list(numbers(fails=True))
    is_closed_and_counts(breaker, 2, 1)


def test_slow_calls_are_failures(make: Make) -> None:
    """Though they return."""
    breaker = make(slow_call_s=0.001)
    waits = threading.Event()
    for _ in range(3):
        breaker.call(waits.wait, 0.01)

    eventually(lambda: breaker.current_state == "open", within_s=5)


# --- the fleet -----------------------------------------------------------------------


def test_processes_share_the_circuit(make: Make, dependency: Dependency) -> None:
    """What one has seen, all know within a second; and each counts its part."""
    one, two, three = make(), make(), make()
    assert three.call(dependency.work) == "done"
    call(one, dependency.fail)
    call(two, dependency.fail)
    call(two, dependency.fail)

    eventually(lambda: three.current_state == "open", within_s=5)
    assert isinstance(call(three, dependency.work), CircuitOpen)
    assert dependency.calls == 4


def test_exactly_the_allowed_probes_run_in_a_fleet(make: Make, clock: Clock) -> None:
    """Of twenty processes that ask at once."""
    breakers = [make(probes=2) for _ in range(20)]
    trip(breakers[0])
    eventually(lambda: all(b.current_state == "open" for b in breakers), within_s=5)
    clock.now += 601
    eventually(lambda: all(b._circuit.may_ask for b in breakers), within_s=5)
    barrier, gate, ran, refused = threading.Barrier(20), threading.Event(), [], []

    def probe(number: int) -> None:
        barrier.wait()
        try:
            with breakers[number].calling():
                ran.append(number)
                gate.wait(10)
        except CircuitOpen:
            refused.append(number)

    threads = [threading.Thread(target=probe, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(refused) == 18, within_s=10)
    assert len(ran) == 2
    gate.set()
    for thread in threads:
        thread.join()
    eventually(lambda: all(b.current_state == "closed" for b in breakers), within_s=5)


def test_a_call_begun_before_the_trip_changes_nothing_after(
    make: Make, clock: Clock
) -> None:
    """Its failure neither re-opens a recovered circuit nor prolongs an open one."""
    breaker = make(min_calls=1)
    late = breaker.enter()
    call(breaker, Dependency().fail)
    eventually(lambda: breaker.current_state == "open", within_s=5)
    opened_at = breaker.fleet_state.opened_at
    breaker.leave(late, ConnectionError())
    clock.now += 601
    eventually(lambda: call(breaker, Dependency().work) == "done", within_s=5)
    assert breaker.current_state == "closed"

    breaker.leave(late, ConnectionError())
    call(breaker, Dependency().work)
    call(make(), Dependency().work)
    assert breaker.current_state == "closed"
    assert breaker.fleet_state.opened_at in (0, opened_at)


def test_one_transition_is_told_once_in_the_fleet(make: Make, clock: Clock) -> None:
    """By the process that made it: as an event, and to its listeners."""
    events: list[str] = []
    stops = [
        observe(f"circuits.{name}", lambda name=name, **_: events.append(name))
        for name in ("opened", "half_opened", "closed")
    ]
    heard: list[tuple[str, str]] = []

    class Listener(pybreaker.CircuitBreakerListener):
        """Counts what it hears."""

        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            """Heard once."""
            heard.append((old_state.name, new_state.name))

        def success(self, cb: Any) -> None:
            """A listener may fail."""
            raise RuntimeError("broken listener")

    breakers = [make() for _ in range(4)]
    for breaker in breakers:
        breaker.add_listener(Listener())  # type: ignore[arg-type]
    trip(breakers[0])
    eventually(lambda: all(b.current_state == "open" for b in breakers), within_s=5)
    clock.now += 601
    eventually(lambda: call(breakers[1], Dependency().work) == "done", within_s=5)
    eventually(lambda: all(b.current_state == "closed" for b in breakers), within_s=5)
    for stop in stops:
        stop()

    assert events == ["opened", "half_opened", "closed"]
    assert heard == [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


def test_pybreakers_commands_are_the_fleets(make: Make) -> None:
    """open(), half_open() and close(), seen by others."""
    one, two = make(), make()
    one.open()
    eventually(lambda: two.current_state == "open", within_s=5)
    assert isinstance(call(one, Dependency().work), CircuitOpen)
    assert two.state.name == "open"
    two.half_open()
    assert two.current_state == "half-open"
    one.open()
    two.close()
    assert call(two, Dependency().work) == "done"
    eventually(lambda: one.current_state == "closed", within_s=5)


@pytest.mark.parametrize("is_heard", [True, False])
def test_a_refusal_in_a_body_spends_no_retry(make: Make, *, is_heard: bool) -> None:
    """`autoretry_for` lets Celery's Retry pass; outside of a body it is none."""
    breaker = make()
    breaker.open()
    token = HEARS_OF_CIRCUITS.set(is_heard)
    refused = call(breaker, Dependency().work)
    HEARS_OF_CIRCUITS.reset(token)

    assert isinstance(refused, CircuitOpen)
    assert isinstance(refused, Retry) is is_heard
    if is_heard:
        assert isinstance(refused, CircuitOpenInTask)
        assert "circuit bank is open" in str(refused)
        assert isinstance(pickle.loads(pickle.dumps(refused)), CircuitOpenInTask)


# --- a dependency that says how long -----------------------------------------------------


class TooMany(Exception):
    """As requests' HTTPError has it."""

    def __init__(self, retry_after: str) -> None:
        super().__init__("429")
        self.response = type(
            "Response", (), {"headers": {"Retry-After": retry_after}}
        )()


def test_retry_after_is_heard(make: Make) -> None:
    """Of the exception's response."""
    breaker = make(min_calls=1)

    def refuse() -> None:
        raise TooMany("7")

    call(breaker, refuse)
    eventually(lambda: breaker.current_state == "open", within_s=5)
    state = breaker.fleet_state
    assert state.retry_at - state.opened_at == pytest.approx(7)


# --- the user's own pybreaker -------------------------------------------------------------


def test_a_plain_breaker_works_as_it_is() -> None:
    """Its counts, listeners and state; but the original exception is raised."""
    own = pybreaker.CircuitBreaker(fail_max=2, reset_timeout=600, name="own")
    plain = PlainBreaker(own)

    def run(exc: BaseException | None) -> None:
        plain.leave(plain.enter(), exc)

    run(ConnectionError())
    run(Retry())
    run(SystemExit())
    assert own.fail_counter == 1
    run(None)
    assert own.fail_counter == 0
    run(ConnectionError())
    run(ConnectionError())
    assert own.current_state == "open"
    with pytest.raises(CircuitOpen) as raised:
        plain.enter()
    assert raised.value.name == "own"
    assert 590 < raised.value.retry_after_s <= 600


def test_a_plain_breaker_is_not_locked_during_a_call() -> None:
    """Its own `call` would be."""
    own = pybreaker.CircuitBreaker()
    plain = PlainBreaker(own)
    started = plain.enter()
    entered: list[Any] = []
    thread = threading.Thread(target=lambda: entered.append(plain.enter()))
    thread.start()
    thread.join(10)

    assert entered
    plain.leave(started, None)
