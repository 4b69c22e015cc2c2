"""What a process asks the store of circuits, and what it does without it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import pytest
from polling import always, eventually
from unit.specimens import fresh_name

from celery_resilience.circuits import fleet as fleet_module
from celery_resilience.circuits import policy
from celery_resilience.circuits.circuit import Circuit, Permit
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.circuits.memory_store import MemoryCircuitStore
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.page import SLOT, Note, Page
from celery_resilience.circuits.policy import Entry, Forced, Position, State
from celery_resilience.circuits.probing import check_probes
from celery_resilience.circuits.redis_store import LIMITS, RedisCircuitStore
from celery_resilience.circuits.store import Answer, Stored
from celery_resilience.circuits.telling import tell_change
from celery_resilience.deadline import answer_within
from celery_resilience.errors import ConfigurationError, StoreUnavailable
from celery_resilience.events import observe
from celery_resilience.stores.redis import RedisServer


class CountingStore(MemoryCircuitStore):
    """
    A store that counts, and does not answer when it is told so.

    Attributes:
        trips, swaps: Round trips, and those that write.
        asked_slots: How often a slot was asked for, and answered.
        is_dead: It refuses.
        hangs: It answers when this is set.
    """

    def __init__(self) -> None:
        super().__init__(time.time)
        self.trips = 0
        self.swaps = 0
        self.asked_slots = 0
        self.is_dead = False
        self.hangs = Event()
        self.hangs.set()

    def read(self, names: Sequence[str]) -> Answer:
        """Counted."""
        self._trip()
        return super().read(names)

    def swap(self, name: str, seen: str, new: Stored, *, keep_s: float) -> Answer:
        """Counted."""
        self.swaps += 1
        self._trip()
        return super().swap(name, seen, new, keep_s=keep_s)

    def take_slot(self, name: str, token: str, *, limit: int, lease_s: float) -> bool:
        """Counted."""
        self._trip()
        self.asked_slots += 1
        return super().take_slot(name, token, limit=limit, lease_s=lease_s)

    def _trip(self) -> None:
        self.trips += 1
        self.hangs.wait(20)
        if self.is_dead:
            raise StoreUnavailable("it is dead")


@pytest.fixture
def store() -> Iterator[CountingStore]:
    """An empty one."""
    store = CountingStore()
    yield store
    store.hangs.set()


def process(store: Any, **options: Any) -> Circuit:
    """The circuit "bank" in a process."""
    given = {"min_calls": 3, "open_s": 600.0, "jitter": 0.0, **options}
    return Circuits(lambda: store, lambda: {"bank": CircuitOptions(**given)}).get(
        "bank"
    )


def call(circuit: Circuit, is_success: bool | None = True) -> bool:
    """One call; whether it was let through."""
    permit = circuit.enter()
    if isinstance(permit, Entry):
        return False
    circuit.leave(permit, is_success)
    return True


# --- round trips ------------------------------------------------------------------------


def test_a_closed_circuit_asks_nobody(store: CountingStore) -> None:
    """In a second of calls, a few reads, by the thread."""
    circuit = process(store)
    call(circuit)
    before, calls, until = store.trips, 0, time.monotonic() + 1.0
    while time.monotonic() < until:
        call(circuit)
        calls += 1

    assert calls > 1_000
    assert (store.trips - before) / calls < 0.05
    assert store.trips - before <= 8
    assert store.swaps == 0


def test_a_circuit_that_is_not_used_is_not_read(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle process is silent, and looks when it is used again."""
    monkeypatch.setattr(fleet_module, "USED_S", 0.3)
    circuit = process(store)
    call(circuit)
    seen = [0]

    def is_silent() -> bool:
        is_same = store.trips == seen[0]
        seen[0] = store.trips
        return is_same

    eventually(is_silent, within_s=5, every_s=0.6)
    always(lambda: store.trips == seen[0], for_s=0.8)
    call(circuit)
    assert store.trips == seen[0] + 1


def test_failures_are_told_several_at_once(store: CountingStore) -> None:
    """A hundred, in a few trips."""
    circuit = process(store, min_calls=1_000)
    for _ in range(100):
        call(circuit, False)

    eventually(lambda: circuit.state.failures == 100, within_s=5)
    assert store.trips < 10


def test_tickets_are_taken_several_at_once(store: CountingStore) -> None:
    """And each process has its own."""
    one, two = process(store), process(store)
    taken = [c._fleet.ticket(c, 7) for c in [one] * 15 + [two] * 5]

    assert taken == [*range(10), *range(10, 15), *range(20, 25)]
    assert one._fleet.ticket(one, 8) == 0


def test_after_closing_no_more_run_at_once_than_the_limit(
    store: CountingStore,
) -> None:
    """Of those who can wait; and the limit grows, and goes."""
    one, two = process(store, probes=1), process(store)
    one._fleet.order(one, lambda s, now: (policy.opened(s, one.options, now=now), None))
    one._fleet.order(one, lambda s, now: (policy.half_open(s, now=now), None))
    assert call(one)
    eventually(lambda: two.look().limit == 2, within_s=5)

    running = [c.enter(can_wait=True) for c in (one, two, one, two)]
    assert [isinstance(it, Permit) for it in running] == [True, True, False, False]
    assert isinstance(two.enter(), Permit)  # one that cannot wait
    for circuit, permit in zip((one, two), running, strict=False):
        assert isinstance(permit, Permit)
        circuit.leave(permit, True)
    eventually(lambda: one.look().limit > 2.8, within_s=5)
    assert isinstance(two.enter(can_wait=True), Permit)


def closed_with_a_limit(store: CountingStore) -> Circuit:
    """A circuit that has just closed: two tasks may run at once."""
    circuit = process(store, open_s=0.0, ramp_from=2)
    for _ in range(3):
        call(circuit, False)
    eventually(lambda: circuit.look().position is Position.OPEN)
    assert call(circuit)
    assert circuit.look().limit == 2
    return circuit


@pytest.mark.parametrize("is_dead", [True, False], ids=["dead", "hangs"])
def test_a_limit_holds_while_the_store_is_away(
    store: CountingStore, is_dead: bool
) -> None:
    """In each process by itself: all at once would bring the dependency down again."""
    circuit = closed_with_a_limit(store)
    store.is_dead = is_dead
    if not is_dead:
        store.hangs.clear()

    entries = [circuit.enter(can_wait=True) for _ in range(20)]

    running = [entry for entry in entries if isinstance(entry, Permit)]
    assert len(running) <= 2
    for permit in running:
        circuit.leave(permit, True)
    eventually(lambda: isinstance(circuit.enter(can_wait=True), Permit))


def test_a_slot_that_is_had_too_late_is_given_back(store: CountingStore) -> None:
    """Else the tasks that wait would find none for the length of its lease."""
    circuit = closed_with_a_limit(store)
    store.hangs.clear()

    assert circuit._fleet.take_slot(circuit, 2) is None
    store.hangs.set()

    eventually(lambda: store.asked_slots == 1)
    eventually(lambda: not store._slots["bank"])


def test_one_worker_consumes_what_the_others_have_paused(store: CountingStore) -> None:
    """Once it may be tried; all of them when it has closed, or the store is away."""
    one, two = process(store, queues=("bank",)), process(store, queues=("bank",))
    workers = (one, two)
    for worker in workers:
        worker._fleet.share()
        worker._fleet.start_reading()
    assert one._fleet.queues() == {"bank": ["bank"]}
    one._fleet.order(one, lambda s, now: (policy.opened(s, one.options, now=now), None))
    eventually(lambda: all(w.is_paused for w in workers), within_s=5)
    one._fleet.order(one, lambda s, now: (policy.half_open(s, now=now), None))
    eventually(lambda: sum(w.is_paused for w in workers) == 1, within_s=5)
    always(lambda: sum(w.is_paused for w in workers) == 1, for_s=0.8)
    assert call(one)
    eventually(lambda: not any(w.is_paused for w in workers), within_s=5)

    one._fleet.order(one, lambda s, now: (policy.opened(s, one.options, now=now), None))
    eventually(lambda: all(w.is_paused for w in workers), within_s=5)
    store.is_dead = True
    eventually(lambda: not any(w.is_paused for w in workers), within_s=5)


# --- the probe function ------------------------------------------------------------------

#: What the probe functions below do next, and how often one was called.
PROBE: dict[str, Any] = {}


def probe() -> Any:
    """The function that the circuits below name."""
    PROBE["calls"] += 1
    if "hangs" in PROBE:
        PROBE["hangs"].wait(20)
    answer = PROBE["answer"]
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def workers(store: CountingStore) -> list[Circuit]:
    """The circuit of two workers, and of a process that is none; it may be tried."""
    PROBE.clear()
    PROBE.update(calls=0, answer=True)
    options = {"probe": f"{__name__}:probe", "queues": ("bank",), "open_s": 1.0}
    found = [process(store, **options) for _ in range(3)]
    one = found[0]
    one._fleet.order(one, lambda s, now: (policy.opened(s, one.options, now=now), None))
    for worker in found[:2]:
        worker._fleet.share()
        worker._fleet.start_reading()
    return found


def test_one_worker_calls_the_probe_function(workers: list[Circuit]) -> None:
    """No ordinary call is a probe meanwhile, nor is a paused queue consumed."""
    PROBE["hangs"] = Event()
    eventually(lambda: PROBE["calls"], within_s=5)
    always(
        lambda: (
            not any(call(worker) for worker in workers)
            and all(worker.is_paused for worker in workers[:2])
        ),
        for_s=0.8,
    )
    PROBE["hangs"].set()
    eventually(lambda: all(call(worker) for worker in workers), within_s=5)

    assert PROBE["calls"] == 1


@pytest.mark.parametrize("answer", [False, None, ValueError("down")], ids=repr)
def test_a_probe_function_that_says_no_opens_it_again(
    workers: list[Circuit], answer: Any
) -> None:
    """For twice as long; and it is asked again then."""
    PROBE["answer"] = answer
    eventually(lambda: workers[0].look().openings == 2, within_s=5)
    assert not any(call(worker) for worker in workers)
    PROBE["answer"] = "up"
    eventually(lambda: call(workers[2]), within_s=10)

    assert PROBE["calls"] == 2


def test_a_probe_function_that_hangs_is_given_up(store: CountingStore) -> None:
    """As a failure, before its lease lapses; and is not called beside itself."""
    PROBE.clear()
    PROBE.update(calls=0, answer=True, hangs=Event())
    circuit = process(store, probe=f"{__name__}:probe", open_s=0.3, probe_lease_s=0.5)
    circuit._fleet.order(
        circuit, lambda s, now: (policy.opened(s, circuit.options, now=now), None)
    )
    circuit._fleet.share()
    circuit._fleet.start_reading()
    eventually(lambda: circuit.look().openings == 2, within_s=5)
    always(lambda: PROBE["calls"] == 1, for_s=1.5)
    PROBE["hangs"].set()

    eventually(lambda: call(circuit), within_s=10)
    assert PROBE["calls"] == 2


def test_without_a_worker_an_ordinary_call_is_the_probe(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would call the function."""
    monkeypatch.setattr(policy, "OVERDUE_S", 1.0)
    circuit = process(store, probe=f"{__name__}:probe", open_s=0.2)
    circuit._fleet.order(
        circuit, lambda s, now: (policy.opened(s, circuit.options, now=now), None)
    )
    began = time.monotonic()
    eventually(lambda: call(circuit), within_s=10)

    assert time.monotonic() - began >= 1.2
    assert circuit.look().position is Position.CLOSED


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:probe", "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:no_such_probe", "cannot be imported: AttributeError"),
        (f"{__name__}:PROBE", "must be the name of a function"),
    ],
)
def test_a_probe_that_is_no_function_is_refused_at_start(name: str, said: str) -> None:
    """With the circuit and the name."""
    with pytest.raises(ConfigurationError, match=f"bank: probe.*{said}"):
        check_probes({"bank": CircuitOptions(probe=name)})


# --- what is told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forced_s", "said"),
    [
        (
            600.0,
            [
                "circuit bank would have opened for 20.0 s",
                "circuit bank would be half-open",
                "circuit bank would have closed",
            ],
        ),
        (
            0.0,
            [
                "circuit bank opened for 20.0 s",
                "circuit bank is half-open",
                "circuit bank closed",
            ],
        ),
    ],
    ids=["shadow", "no more"],
)
def test_a_shadow_says_what_would_have_been(
    store: CountingStore,
    caplog: pytest.LogCaptureFixture,
    forced_s: float,
    said: list[str],
) -> None:
    """For nothing is refused there; and what is, once that has lapsed."""
    circuit = process(store)
    circuit.look()
    now = circuit.store_now()
    shut = policy.forced(State(), Forced.SHADOW, now=now, for_s=forced_s)
    opened = replace(shut, position=Position.OPEN, opened_at=now, retry_at=now + 20)

    with caplog.at_level("INFO", "celery_resilience.circuits"):
        tell_change(circuit, shut, opened)
        half_open = replace(opened, position=Position.HALF_OPEN)
        tell_change(circuit, opened, half_open)
        tell_change(circuit, half_open, shut)

    assert caplog.messages == said


# --- without a store ---------------------------------------------------------------------


def test_a_store_that_dies_is_done_without(
    store: CountingStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The circuit works here; it is said once; and it is used again when it is back."""
    events: list[str] = []
    stops = [
        observe(f"circuits.{name}", lambda name=name, **_: events.append(name))
        for name in ("store_away", "store_back")
    ]
    circuit = process(store)
    call(circuit)
    store.is_dead = True
    eventually(lambda: events, within_s=5)
    for _ in range(3):
        assert call(circuit, False)
    eventually(lambda: circuit.state.position is Position.OPEN, within_s=5)
    assert not call(circuit)
    assert len([r for r in caplog.records if "own while" in r.message]) == 1

    store.is_dead = False
    eventually(lambda: events == ["store_away", "store_back"], within_s=5)
    eventually(lambda: call(circuit), within_s=5)
    for stop in stops:
        stop()


def test_a_store_that_hangs_is_waited_for_once(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of a second, and no call after that."""
    waits: list[float] = []

    def counted(seconds: float, ask: Callable[[], Any]) -> Any:
        waits.append(seconds)
        return answer_within(seconds, ask)

    monkeypatch.setattr(fleet_module, "answer_within", counted)
    circuit = process(store)
    call(circuit)
    waits.clear()
    store.hangs.clear()
    always(lambda: call(circuit), for_s=1.5, every_s=0.01)

    assert waits == [0.1]


def test_what_was_open_stays_open_without_the_store(store: CountingStore) -> None:
    """The last that was known is gone by."""
    circuit = process(store)
    for _ in range(3):
        call(circuit, False)
    eventually(lambda: not call(circuit), within_s=5)
    store.is_dead = True

    always(lambda: not call(circuit), for_s=1.2)


def test_an_app_without_a_store_has_circuits_of_its_own() -> None:
    """In each process."""
    circuit = process(None)
    for _ in range(3):
        assert call(circuit, False)
    eventually(lambda: not call(circuit), within_s=5)


# --- children -----------------------------------------------------------------------------


def forked(work: Callable[[], bool]) -> bool:
    """What *work* says in a child."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() else 1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_children_read_what_their_worker_has_read(store: CountingStore) -> None:
    """Without a trip of their own, as soon as the main process has been told of it."""
    circuit = process(store)
    circuits = circuit._fleet
    circuits.share()
    circuits.start_reading()
    call(circuit)
    page = circuits._page
    assert page is not None
    eventually(lambda: page.read("bank"), within_s=5)

    def in_child() -> bool:
        before = store.trips  # of this process, from here on
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            if not call(circuit):
                return False
        return store.trips == before

    assert forked(in_child)


def test_a_child_tells_what_it_has_seen(servers: Any) -> None:
    """And not what its parent had."""
    server = RedisServer(servers("redis").url, fresh_name("shop"), **LIMITS)
    circuit = process(RedisCircuitStore(server), min_calls=1_000)
    call(circuit)
    circuit.leave(Permit(0, "", 0.0), False)

    def in_child() -> bool:
        call(circuit, False)
        # One of them is what the parent has seen, which it tells itself.
        eventually(lambda: circuit.state.failures >= 2, within_s=10)
        return True

    assert forked(in_child)
    eventually(lambda: circuit.look().failures == 2, within_s=10)
    server.close()


def test_a_torn_page_is_not_read() -> None:
    """Nor one of another circuit with the same slot, nor what is too long."""
    page = Page()
    assert page.use("bank", 1.0)
    note = Note(Stored("v", "text"), 2.0, 3.0)
    page.write("bank", note)
    assert page.read("bank") == note
    page.write("bank", Note(Stored("w", "x" * SLOT), 4.0, 5.0))
    assert page.read("bank") == note
    assert list(page.used()) == [("bank", 1.0)]

    same = next(n for n in map(str, range(10_000)) if _slot(n) == _slot("bank"))
    assert not page.use(same, 6.0)
    assert page.read(same) is None
    page._memory[_slot("bank") + 300] ^= 1
    assert page.read("bank") is None


def _slot(name: str) -> int:
    from celery_resilience.circuits.page import _start

    return _start(name)


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "x" * 65, 7, None])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError, match="a circuit's name must be"):
        Circuits(lambda: None, dict).get(name)


# --- as a fleet -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "opens"), [(0.15, True), (0.5, False)])
def test_eight_processes_with_a_fifth_of_failures(
    servers: Any, rate: float, opens: bool
) -> None:
    """Open within a window at 15 %, never at 50 %."""
    url, namespace = servers("redis").url, fresh_name("shop")
    opened: list[int] = []
    pids = []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            server = RedisServer(url, namespace, **LIMITS)
            circuit = process(
                RedisCircuitStore(server),
                failure_rate=rate,
                window_s=3.0,
                min_calls=40,
            )
            chance = random.Random(number)
            until = time.monotonic() + 3.0
            beat = Event()
            while time.monotonic() < until:
                beat.wait(0.005)
                if not call(circuit, chance.random() >= 0.2):
                    os._exit(7)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        opened.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    assert opened == [7 if opens else 0] * 8


def test_twenty_processes_at_a_half_open_circuit(
    servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the allowed probes run; and killed ones are replaced after their lease."""
    # To a process that has no processor for so long, the store would be away.
    monkeypatch.setattr(fleet_module, "WAIT_S", 10.0)
    server = RedisServer(servers("redis").url, fresh_name("shop"), **LIMITS)
    # Long enough for twenty processes on a busy machine to ask within it.
    lease_s = 5.0
    circuit = process(RedisCircuitStore(server), probes=2, probe_lease_s=lease_s)
    circuit._fleet.order(
        circuit, lambda s, now: (policy.opened(s, circuit.options, now=now), None)
    )
    circuit._fleet.order(circuit, lambda s, now: (policy.half_open(s, now=now), None))
    at = time.monotonic() + 1.0
    pids = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            circuit.look()
            Event().wait(max(0.0, at - time.monotonic()))
            os._exit(7 if isinstance(circuit.enter(), Permit) else 0)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    began = time.monotonic()

    assert sorted(codes) == [0] * 18 + [7] * 2
    # The two have died in their calls.
    for _ in range(2):
        eventually(lambda: call(circuit), within_s=10)
    assert time.monotonic() - began < lease_s + 1.0
    eventually(lambda: circuit.look().position is Position.CLOSED, within_s=5)
    server.close()


def test_threads_lose_no_outcome(store: CountingStore) -> None:
    """Of one process."""
    circuit = process(store, min_calls=100_000)

    def work() -> None:
        for _ in range(500):
            call(circuit, False)

    threads = [Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    eventually(lambda: circuit.look().failures == 4_000, within_s=5)
