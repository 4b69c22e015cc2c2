"""Whether a worker consumes the queues of a circuit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from celery_resilience.circuits import policy
from celery_resilience.circuits.circuit import Circuit
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.circuits.store import CircuitStore

#: Seconds for which one worker takes the probes of a circuit whose queues are paused.
CANARY_S = 10.0


def paused_queues(options: Mapping[str, CircuitOptions]) -> dict[str, list[str]]:
    """The queues that are paused, with their circuits."""
    found: dict[str, list[str]] = {}
    for name, its in options.items():
        for queue in its.queues:
            found.setdefault(queue, []).append(name)
    return found


def decide(store: CircuitStore | None, circuit: Circuit, now: float) -> None:
    """
    Decide whether this worker consumes the queues of *circuit*.

    Args:
        store: The fleet's, None while it is away: nobody would say when the circuit
            closes, and each child snoozes for itself.
        now: By the monotonic clock.

    Raises:
        StoreUnavailable: The store did not answer.
    """
    if store is None:
        circuit.is_paused = False
        return
    entry = policy.entry_now(circuit.state, circuit.store_now())
    if entry is not None:
        circuit.is_paused = not entry.is_allowed
        return
    if circuit.options.probe is not None and not circuit.may_be_tried:
        # Its function finds out, and no task.
        circuit.is_paused = True
        return
    # It may be tried: by what one worker takes.
    if now >= circuit.canary_until and store.take_slot(
        f"{circuit.name[:56]}~canary",
        secrets.token_hex(8),
        limit=1,
        lease_s=CANARY_S,
    ):
        circuit.canary_until = now + CANARY_S
    circuit.is_paused = now >= circuit.canary_until
