"""No thread of ours holds anything when a process is forked."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from polling import eventually
from services import free_port
from unit.specimens import a_message, a_settlement
from unit.test_forks import Forking, forked, kept_inside

from celery_resilience import forks
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.probing import Prober
from celery_resilience.delivery.send_again import send_again
from celery_resilience.draining import SharedFlags
from celery_resilience.forks import ForkGate
from celery_resilience.idempotency.heartbeat import Heartbeat
from celery_resilience.idempotency.record import Claim
from celery_resilience.idempotency.reservations import FreesReservations
from celery_resilience.lifecycle import watch
from celery_resilience.lifecycle.bootstep import Lifecycle
from celery_resilience.lifecycle.health import Answer
from celery_resilience.lifecycle.policy import StopConditions
from celery_resilience.lifecycle.server import HealthServer
from celery_resilience.message import KEY
from celery_resilience.outcome import Outcome
from celery_resilience.packing import message_to_text
from celery_resilience.publisher import Publisher
from celery_resilience.shelf import policy as shelf_policy
from celery_resilience.shelf.shelf import Shelf
from celery_resilience.shelf.store import Claimed, Shelved
from celery_resilience.telemetry import bootstep as metrics_bootstep
from celery_resilience.telemetry import drops as telemetry_drops
from celery_resilience.telemetry.bootstep import WorkerMetrics
from celery_resilience.telemetry.drops import Drops
from celery_resilience.telemetry.probes import Probe
from celery_resilience.worker_warnings import WorkerWarnings

#: In the place of a round trip.
Held = Callable[..., Any]

#: Begins a thread of ours that makes a round trip; returns what ends it.
Begin = Callable[[Held, pytest.MonkeyPatch], Callable[[], object]]


def probe(held: Held, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """A question for the metrics."""
    has_ended = Event()
    threading.Thread(target=Probe("store", held).run, args=(has_ended,)).start()
    return has_ended.set


def drops(held: Held, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """The counts of what could not be sent."""
    monkeypatch.setattr(telemetry_drops, "LOOK_S", 0.01)
    its = Drops(lambda: 0.0)
    monkeypatch.setattr(its, "tell", held)
    its.watch()
    return its.close


def metrics(held: Held, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """What was noted is counted."""
    monkeypatch.setattr(metrics_bootstep, "TICK_S", 0.01)
    its: Any = WorkerMetrics(None, None, address=None, tasks=(), questions=Any)  # type: ignore[arg-type]
    monkeypatch.setattr(its.metrics, "tick", held)
    threading.Thread(target=its._tick).start()
    return its.ended


def heartbeat(held: Held, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """Leases are renewed."""
    store = SimpleNamespace(renew=lambda claims: held() or set(), purge=lambda limit: 0)
    its = Heartbeat(lambda: store)  # type: ignore[arg-type, return-value]
    claim = Claim("k" * 64, "k", "shop.charge", "owner", "token", lease_s=0.05)
    its.add(claim)
    return partial(its.remove, claim)


def reservations(held: Held, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """The key of what will not run is freed."""
    its = FreesReservations(lambda task: True, held)
    marks = {KEY: ["k", "token"]}
    its.heard(settlement=a_settlement(outcome=Outcome.REVOKED, marks=marks))
    return Event


def warnings(held: Held, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """A store that may forget keys."""
    its = WorkerWarnings(SimpleNamespace(app=None, key_store=held))  # type: ignore[arg-type]
    threading.Thread(target=its._look_at_key_store).start()
    return Event


def publisher(held: Held, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """A failed task's message is published, in the thread that reads the results."""
    its = Publisher(None)
    monkeypatch.setattr(its, "_publish_once", held)
    threading.Thread(target=its.publish, args=(a_message(),)).start()
    return its.close


def circuits(held: Held, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """What was seen is told."""
    its = Circuits(lambda: None, dict)

    def work() -> bool:
        held()
        return False

    monkeypatch.setattr(its, "_work", work)
    its._start_thread()
    its.wake()
    return Event


def circuit_probe(held: Held, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """What a probe function found is told."""
    options = CircuitOptions(probe="builtins:dict", probe_lease_s=5)
    its: Any = SimpleNamespace(name="bank", options=options, leave=held)
    threading.Thread(target=Prober()._probe, args=(its, "builtins:dict", None)).start()
    return Event


def watches(held: Held, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """The pool is looked at, and the store is asked."""
    monkeypatch.setattr(watch, "TICK_S", 0.01)
    monkeypatch.setattr(watch._pools, "children_of", held_then(held, []))
    its = a_life()
    threading.Thread(target=its._watch.run).start()
    return its.drain.has_ended.set


def stop_conditions(held: Held, _: pytest.MonkeyPatch) -> Callable[[], object]:
    """The queues are asked for."""
    queues = SimpleNamespace(consume_from={})
    its = a_life(SimpleNamespace(amqp=SimpleNamespace(queues=queues)))
    its.worker.app.connection_for_read = held
    threading.Thread(target=its._are_queues_empty).start()
    return Event


def a_life(app: Any = None) -> Lifecycle:
    """Of a worker that is not there."""
    worker = SimpleNamespace(exitcode=None, hostname="w@unit", pool=None, app=app)
    conditions = StopConditions(when_empty=True)
    return Lifecycle(worker, SharedFlags(), drain_timeout_s=30, conditions=conditions)


def served(
    path: str, held: Held, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], object]:
    """What is told over HTTP."""
    pages = {"/metrics": held_then(held, ("text/plain", b""))}
    answers, port = {"/live": held_then(held, Answer())}, free_port()
    facts = held_then(held if path == "/ready" else dict, {})
    answers["/ready"] = Answer
    server = HealthServer(("127.0.0.1", port), answers, facts, pages)
    server.serve()
    url = f"http://127.0.0.1:{port}{path}"
    threading.Thread(target=urllib.request.urlopen, args=(url,)).start()
    return server.close


def held_then(held: Held, answer: Any) -> Callable[..., Any]:
    """Makes the round trip, and answers."""

    def ask(*_: Any) -> Any:
        held()
        return answer

    return ask


def shelf(
    where: str, held: Held, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], object]:
    """Snoozed messages are stored, taken and forgotten."""
    message = send_again(a_message(), delay_s=0, marks={"waits_since": 1.0})
    due = [Shelved("id", message_to_text(message))]
    trips = {"put": None, "claim": Claimed(due, None, 0), "remove": None}
    done = {
        name: held_then(held if name == where else dict, answer)
        for name, answer in trips.items()
    }
    store = SimpleNamespace(**done)
    publisher = SimpleNamespace(publish=held_then(dict, None), close=dict)
    monkeypatch.setattr(shelf_policy, "FIRST_S", 0.0)
    its = Shelf(lambda: store, publisher)  # type: ignore[arg-type, return-value]
    its.start()
    its.put(message, 60, lambda is_stored: None)
    return partial(its.stop, 10)


BEGINNINGS: dict[str, Begin] = {
    it.__name__: it
    for it in (
        *(probe, drops, metrics, heartbeat, reservations, warnings),
        *(publisher, circuits, circuit_probe, watches, stop_conditions),
    )
}
BEGINNINGS |= {
    f"page {it}": partial(served, it) for it in ("/live", "/ready", "/metrics")
}
BEGINNINGS |= {f"shelf {it}": partial(shelf, it) for it in ("put", "claim", "remove")}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_fork_waits_for_a_round_trip(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its child would find the driver's locks locked, for good."""
    monkeypatch.setattr(forks.thread_gate, "_fork_waits_s", 30.0)
    is_inside, goes_on = Event(), Event()

    def held(*_: Any) -> Any:
        is_inside.set()
        goes_on.wait(30)

    end = BEGINNINGS[name](held, monkeypatch)
    assert is_inside.wait(10)
    forking = Forking()
    forking.join(0.3)
    assert forking.exit_code is None
    goes_on.set()

    assert eventually(lambda: forking.exit_code is not None)
    assert forking.exit_code == 0
    end()


def test_who_was_waited_for_in_vain_is_waited_for_no_more() -> None:
    """A server that hangs does not slow down each fork; one that has answered may."""
    gate = ForkGate(fork_waits_s=0.2)
    thread, leaves = kept_inside(gate.inside())
    assert forked(lambda: 0) == 0

    gate._fork_waits_s = 30.0
    forking = Forking()
    assert eventually(lambda: forking.exit_code is not None, within_s=10)
    leaves.set()
    thread.join()

    thread, leaves = kept_inside(gate.inside())
    assert gate._slow == set()
    forking = Forking()
    forking.join(0.3)
    assert forking.exit_code is None
    leaves.set()
    assert eventually(lambda: forking.exit_code is not None)
