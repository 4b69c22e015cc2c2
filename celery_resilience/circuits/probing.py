"""The functions that say whether a dependency is back, in the place of a task's call."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery_resilience.circuits import policy
from celery_resilience.circuits.circuit import Circuit, Permit
from celery_resilience.circuits.options import CircuitOptions
from celery_resilience.deadline import answer_within
from celery_resilience.errors import ConfigurationError, StoreUnavailable
from celery_resilience.forks import thread_gate
from celery_resilience.retry_after import retry_after_of
from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.circuits")

#: The share of its lease after which a probe is given up, before another begins.
PATIENCE = 0.9


def find_probe(circuit: str, name: str) -> Callable[[], Any]:
    """
    The function of a dotted name.

    Args:
        circuit: Whose option it is.
        name: `package.module:function`.

    Raises:
        ConfigurationError: There is none.
    """
    module, _, function = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as exc:
        raise ConfigurationError(
            f"resilience_circuits: {circuit}: probe {name!r} cannot be imported: "
            f"{type(exc).__name__}: {exc}"
        ) from exc
    if not callable(found):
        raise ConfigurationError(
            f"resilience_circuits: {circuit}: probe must be the name of a function, "
            f"and {name!r} is {found!r}"
        )
    probe: Callable[[], Any] = found
    return probe


def check_probes(options: Mapping[str, CircuitOptions]) -> None:
    """
    Make sure that every probe function can be called.

    Raises:
        ConfigurationError: One is missing.
    """
    for name, its in options.items():
        if its.probe is not None:
            find_probe(name, its.probe)


class Prober:
    """
    Calls the probe functions of a worker's circuits, each in a thread of its own.

    The lease of a probe, of which the fleet has `probes`, makes one worker call it.
    """

    def __init__(self) -> None:
        self._running: set[str] = set()

    def look(self, circuit: Circuit) -> None:
        """Call the function of *circuit* if it is time, and nobody else does."""
        name = circuit.options.probe
        if name is None or circuit.name in self._running:
            return
        now, state = circuit.store_now(), circuit.state
        if policy.entry_now(state, now) is not None:
            return
        if not policy.has_free_probe(state, circuit.options, now):
            return
        permit = circuit.enter(is_prober=True)
        if not isinstance(permit, Permit):
            return
        if not permit.token:
            circuit.leave(permit, None)
            return
        self._running.add(circuit.name)
        start_deaf(lambda: self._probe(circuit, name, permit), "probe")

    def _probe(self, circuit: Circuit, name: str, permit: Permit) -> None:
        within_s = circuit.options.probe_lease_s * PATIENCE
        has_ended: list[bool] = []

        def call() -> Any:
            try:
                return find_probe(circuit.name, name)()
            finally:
                has_ended.append(True)
                self._running.discard(circuit.name)

        exc: Exception | None = None
        try:
            answer = answer_within(within_s, call)
            said = f"returned {answer!r}"
            is_up = bool(answer)
        except StoreUnavailable as raised:
            is_up, exc = False, raised
            # Called again only when it has ended: its threads would pile up.
            said = f"raised {raised}" if has_ended else f"took over {within_s:.0f} s"
        except Exception as raised:
            is_up, exc = False, raised
            said = f"raised {type(raised).__name__}: {raised}"
        if not is_up:
            logger.info("circuit %s: the probe %s %s", circuit.name, name, said)
        with thread_gate.inside():
            circuit.leave(permit, is_up, None if exc is None else retry_after_of(exc))
