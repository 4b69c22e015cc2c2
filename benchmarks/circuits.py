"""
What a guarded call costs, beside pybreaker's own storages and one other breaker.

Every breaker guards a function that does nothing, in one thread; what is left is the
breaker's own time of the processor, and where each call asks Redis, on the same
machine, the time until it has answered. The other
breaker, interlock, is measured where it is installed: `pip install --group bench`.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pybreaker
from celery import Celery
from kombu.serialization import dumps
from redis import Redis

from benchmarks.figures import Figure
from celery_resilience import ResilientTask
from celery_resilience.circuits.breaker import FleetBreaker
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.redis_store import LIMITS, RedisCircuitStore
from celery_resilience.stores.redis import RedisServer
from tests import services

#: Calls in a block, and how many blocks; the best is told, what others do beside it is
#: none of a breaker's time.
BLOCK = 500
BLOCKS = 20

#: The same where each call asks Redis.
SLOW_BLOCK = 50

#: Seconds of calls in which round trips are counted.
COUNTED_S = 3.0

Call = Callable[[], object]


def measure() -> Iterator[Figure]:
    """A guarded call, closed and open, and the guard of a message."""
    with services.running("redis") as server:
        url = server.url
        closed, opened = ours(url, "closed"), ours(url, "open")
        opened.open()
        yield timed("guarded call, closed", calling(closed), BLOCK, at_most=5.0)
        yield round_trips(url, calling(closed))
        yield timed("guarded call, open", refused(opened), BLOCK, at_most=3.0)
        memory = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=600)
        yield timed("pybreaker, memory, closed", calling(memory), BLOCK)
        memory.open()
        yield timed("pybreaker, memory, open", refused(memory), BLOCK)
        storage = pybreaker.CircuitRedisStorage("closed", Redis.from_url(url))
        shared = pybreaker.CircuitBreaker(
            fail_max=5, reset_timeout=600, state_storage=storage
        )
        yield timed("pybreaker, Redis, closed", calling(shared), SLOW_BLOCK)
        shared.open()
        yield timed("pybreaker, Redis, open", refused(shared), SLOW_BLOCK)
        yield from other(url)
    yield from guard()


def nothing() -> None:
    """What is guarded."""


def ours(url: str, name: str) -> FleetBreaker:
    """A circuit in Redis."""
    limits: dict[str, Any] = dict(LIMITS)
    server = RedisServer(url, "bench", **limits)
    store = RedisCircuitStore(server)
    fleet = Circuits(lambda: store, lambda: {name: CircuitOptions(open_s=600.0)})
    return FleetBreaker(fleet, fleet.get(name))


def calling(breaker: Any) -> Call:
    """A call that goes through."""
    return partial(breaker.call, nothing)


def refused(breaker: Any) -> Call:
    """A call that does not."""
    call = breaker.call

    def run() -> None:
        with contextlib.suppress(pybreaker.CircuitBreakerError):
            call(nothing)

    return run


def other(url: str) -> Iterator[Figure]:
    """interlock on Redis, or why it was not measured."""
    names = ("interlock, Redis, closed", "interlock, Redis, open")
    try:
        interlock: Any = importlib.import_module("interlock")
        storages: Any = importlib.import_module("interlock.integrations.redis")
        storage = storages.RedisStorage(Redis.from_url(url))
        breaker = interlock.CircuitBreaker(name="bench", storage=storage)
        yield timed(names[0], calling(breaker), BLOCK)
        breaker.force_open()
        call = breaker.call

        def run() -> None:
            with contextlib.suppress(interlock.CircuitOpenError):
                call(nothing)

        yield timed(names[1], run, BLOCK)
    except Exception as exc:
        yield Figure(names[0], None, "µs", raw=[f"{type(exc).__name__}: {exc}"])


def timed(name: str, call: Call, block: int, at_most: float | None = None) -> Figure:
    """Microseconds of a call in the best block."""
    best, all_of_them = best_us(call, block)
    return Figure(name, best, "µs", at_most=at_most, raw=[all_of_them])


def best_us(call: Call, block: int) -> tuple[float, str]:
    """Of the blocks' calls, and what the others took."""
    clock = time.thread_time if block == BLOCK else time.perf_counter
    call()
    found = []
    for _ in range(BLOCKS):
        began = clock()
        for _ in range(block):
            call()
        found.append((clock() - began) / block * 1e6)
    return min(found), f"median of {BLOCKS} blocks {statistics.median(found):.2f}"


def round_trips(url: str, call: Call) -> Figure:
    """Commands that Redis is sent for a call of a closed circuit, which is busy."""
    client = Redis.from_url(url)

    def commands() -> int:
        return int(client.info("stats")["total_commands_processed"])

    call()
    before, calls, until = commands(), 0, time.monotonic() + COUNTED_S
    while time.monotonic() < until:
        call()
        calls += 1
    # Each look at the statistics is one itself; a script counts its own commands too.
    sent = commands() - before - 1
    told = [f"{sent} commands for {calls} calls in {COUNTED_S:g} s"]
    name = "round trips of a guarded call, closed"
    return Figure(name, sent / calls, "", at_most=0.05, raw=told)


class Encoding:
    """A Producer that encodes, as kombu's does, and sends nothing."""

    connection = SimpleNamespace(
        _reraise_as_library_errors=contextlib.nullcontext,
        transport=SimpleNamespace(driver_type="redis"),
    )

    def publish(self, body: Any, serializer: str | None = None, **_: Any) -> None:
        """Encode what is not encoded."""
        if serializer is not None:
            dumps(body, serializer)


def guard() -> Iterator[Figure]:
    """What `max_message_kib` adds to `apply_async`."""
    app = Celery("bench", broker="memory://", set_as_current=False)

    @app.task(base=ResilientTask, name="free", shared=False)
    def free(order: int, note: str) -> None: ...

    @app.task(base=ResilientTask, name="kept", shared=False, max_message_kib=64)
    def kept(order: int, note: str) -> None: ...

    tasks = app.tasks
    producer: Any = Encoding()
    costs: dict[str, list[float]] = {"free": [], "kept": []}
    for _ in range(BLOCKS):
        for name, found in costs.items():
            send = tasks[name].apply_async
            call = partial(send, (7, "a note"), producer=producer)
            call()
            began = time.thread_time()
            for _ in range(SLOW_BLOCK):
                call()
            found.append((time.thread_time() - began) / SLOW_BLOCK * 1e6)
    more = min(costs["kept"]) - min(costs["free"])
    told = [f"{min(costs['free']):.1f} µs without, {min(costs['kept']):.1f} with"]
    yield Figure("guard of a message, more", more, "µs", at_most=10.0, raw=told)
