"""What is said of a change of a circuit, by the one process that has made it."""

from __future__ import annotations

import logging

from celery_resilience.circuits.circuit import Circuit
from celery_resilience.circuits.policy import Forced, Position, State
from celery_resilience.events import emit

logger = logging.getLogger("celery_resilience.circuits")


def tell_change(circuit: Circuit, before: State, after: State) -> None:
    """Tell the log, the observers and the circuit's listeners; never raises."""
    if before.forced != after.forced:
        emit(
            "circuits.forced",
            circuit=circuit.name,
            forced=after.forced,
            until=after.forced_until,
        )
        logger.warning(
            "circuit %s is %s", circuit.name, after.forced or "forced no more"
        )
    if before.position is after.position and before.openings == after.openings:
        return
    facts = {"circuit": circuit.name, "generation": after.generation}
    # There, every call is let through all the same.
    is_shadow = after.forced_at(circuit.store_now()) is Forced.SHADOW
    would = "would have " if is_shadow else ""
    if after.position is Position.OPEN:
        open_s = after.retry_at - after.opened_at
        emit("circuits.opened", **facts, open_s=open_s, openings=after.openings)
        logger.warning("circuit %s %sopened for %.1f s", circuit.name, would, open_s)
    elif after.position is Position.HALF_OPEN:
        emit("circuits.half_opened", **facts)
        is_now = "would be" if is_shadow else "is"
        logger.info("circuit %s %s half-open", circuit.name, is_now)
    else:
        emit("circuits.closed", **facts)
        logger.warning("circuit %s %sclosed", circuit.name, would)
    for tell in circuit.on_change:
        try:
            tell(before, after)
        except Exception:
            logger.exception("circuit %s: a listener failed", circuit.name)
