"""A task asks its circuit before it runs, and tells it what came of it."""

from __future__ import annotations

import gc
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from celery.exceptions import Retry

from celery_resilience.chance import chance
from celery_resilience.circuits.circuit import check_name
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.errors import (
    CircuitIsOpen,
    CircuitSnooze,
    ConfigurationError,
    RetryByRule,
)
from celery_resilience.message import marks_of

if TYPE_CHECKING:
    from celery_resilience.circuits.breaker import FleetBreaker, PlainBreaker

IfOpen = Literal["snooze", "pause", "fail"] | Callable[..., Any]

#: Seconds that circuits keep a task waiting: then it fails as `circuit_open`.
MAX_WAIT_S = 86_400.0

#: Most seconds of one snooze; and least seconds over which those of one circuit are
#: spread.
MAX_SNOOZE_S = 900.0
MIN_SPREAD_S = 1.0


class Breakers:
    """
    The breakers of one app in this process, each made when it is first asked for.

    Args:
        circuits: What they are of.
    """

    def __init__(self, circuits: Circuits) -> None:
        self.circuits = circuits
        self._lock = threading.Lock()
        self._made: dict[str, FleetBreaker] = {}

    def get(self, name: str) -> FleetBreaker:
        """
        The breaker of the circuit *name*.

        Raises:
            ConfigurationError: The name is none.
        """
        found = self._made.get(name)
        if found is not None:
            return found
        from celery_resilience.circuits.breaker import FleetBreaker

        circuit = self.circuits.get(name)
        with self._lock:
            if name not in self._made:
                self._made[name] = FleetBreaker(self.circuits, circuit)
            return self._made[name]


class TaskCircuit:
    """
    The circuit around a task's body.

    Args:
        circuit: Its name; or the user's own `pybreaker.CircuitBreaker`.
        breakers: Those of the process.
        can_wait: The task is snoozed where it is refused.
    """

    def __init__(
        self, circuit: Any, breakers: Callable[[], Breakers], *, can_wait: bool
    ) -> None:
        self._can_wait = can_wait
        self._circuit = circuit
        self._breakers = breakers
        self._breaker: FleetBreaker | PlainBreaker | None = None

    def enter(self) -> Any:
        """
        Ask whether the task may run.

        Raises:
            CircuitOpen: It may not now.
        """
        if self._breaker is None:
            self._breaker = self._made()
        return self._breaker.enter(can_wait=self._can_wait)

    def leave(self, permit: Any, exc: BaseException | None, task: Any) -> None:
        """
        Tell what came of the run.

        Args:
            permit: From `enter`.
            exc: What it ended in. Celery's Retry counts nothing, and that of a task
                with `autoretry_for`, or by a retry rule, as what the body had raised.
            task: Whose run it was.
        """
        assert self._breaker is not None
        retried_for = tuple(getattr(task, "autoretry_for", ()))
        if isinstance(exc, RetryByRule):
            exc = exc.raised
        elif isinstance(exc, Retry) and isinstance(exc.exc, retried_for):
            exc = exc.exc
        self._breaker.leave(permit, exc)

    @property
    def name(self) -> str | None:
        """Of a circuit of the fleet's."""
        return self._circuit if isinstance(self._circuit, str) else None

    def _made(self) -> FleetBreaker | PlainBreaker:
        if isinstance(self._circuit, str):
            return self._breakers().get(self._circuit)
        from celery_resilience.circuits.breaker import FleetBreaker, PlainBreaker

        if isinstance(self._circuit, FleetBreaker):
            return self._circuit
        return PlainBreaker(self._circuit)


def task_circuit(
    task: type[Any],
    breakers: Callable[[], Breakers],
    has_queues: Callable[[str], bool],
) -> TaskCircuit | None:
    """
    The circuit of *task*; None where it has none.

    Args:
        breakers: Those of the process.
        has_queues: Whether a circuit has queues that are paused.

    Raises:
        ConfigurationError: Its options are wrong.
    """
    if_open = inspect.getattr_static(task, "if_circuit_open")
    if not (if_open in ("snooze", "pause", "fail") or callable(_plain(if_open))):
        raise ConfigurationError(
            "if_circuit_open must be 'snooze', 'pause', 'fail' or a callable that takes "
            f"the task's arguments, got {if_open!r}"
        )
    circuit = inspect.getattr_static(task, "circuit")
    if if_open == "pause" and not (isinstance(circuit, str) and has_queues(circuit)):
        raise ConfigurationError(
            "if_circuit_open = 'pause' needs a circuit= whose entry in "
            "resilience_circuits has queues"
        )
    if circuit is None:
        return None
    if isinstance(circuit, str):
        check_name(circuit)
    else:
        from pybreaker import CircuitBreaker

        if not isinstance(circuit, CircuitBreaker):
            raise ConfigurationError(
                "circuit must be the name of a circuit, or a pybreaker.CircuitBreaker, "
                f"got {circuit!r}"
            )
    return TaskCircuit(circuit, breakers, can_wait=if_open in ("snooze", "pause"))


def when_open(
    task: Any,
    request: Any,
    exc: CircuitIsOpen,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    breakers: Breakers,
    visible_s: float,
    clock: Callable[[], float] = time.time,
) -> Any:
    """
    What becomes of a task whose circuit is open.

    Args:
        exc: What the circuit raised.
        breakers: Those of the process.
        visible_s: After so many seconds the broker may deliver a held message again.
        clock: Wall time.

    Returns:
        What the task's own `if_circuit_open` returns.

    Raises:
        Snooze: The task runs again later.
        CircuitOpen: It fails.
    """
    if_open = _plain(inspect.getattr_static(task, "if_circuit_open"))
    if if_open == "fail":
        raise exc
    # What a worker has already fetched from a paused queue is snoozed.
    if if_open not in ("snooze", "pause"):
        return if_open(*args, **kwargs)
    now = clock()
    since = min(marks_of(request.__dict__).get("waits_since", now), now)
    if now - since >= MAX_WAIT_S:
        from celery_resilience.circuits.breaker import CircuitOpen

        waited = f"circuit {exc.name} has kept the task waiting for {now - since:.0f} s"
        raise CircuitOpen(waited, exc.name, exc.retry_after_s, exc.generation) from None
    turn_s = None
    if exc.generation:  # not of a pybreaker of the app's own
        turn_s = breakers.get(exc.name).return_in_s(exc)
    wait_s = snooze_s(exc.retry_after_s, turn_s, chance(), visible_s)
    # What Celery and billiard leave of the run before, if that was snoozed too: a ring
    # with 300 KB of numbers, which Python does not count as garbage, so that a child
    # grew by 200 MB in an outage (``einfo.py``, billiard 4.3: `co_positions`).
    gc.collect(1)
    raise CircuitSnooze(wait_s, exc.name, since) from None


def snooze_s(
    retry_after_s: float, turn_s: float | None, chance: float, visible_s: float
) -> float:
    """
    Seconds until a task looks again: not all at once, nor held for too long.

    Args:
        retry_after_s: Until the circuit lets somebody try.
        turn_s: Until it is this task's turn; None: nobody knows how many wait.
        chance: From 0 to 1.
        visible_s: After so many seconds the broker may deliver a held message again.
    """
    most_s = min(MAX_SNOOZE_S, visible_s / 2)
    if turn_s is not None and max(retry_after_s, turn_s) <= most_s:
        return max(retry_after_s, turn_s)
    if turn_s is not None:
        # Not piled up at the cap; then they take other tickets.
        return most_s * (1 + chance) / 2
    spread_s = max(MIN_SPREAD_S, retry_after_s)
    if retry_after_s + spread_s > most_s:
        spread_s = most_s / 2
        retry_after_s = min(retry_after_s, most_s - spread_s)
    return retry_after_s + chance * spread_s


def _plain(value: Any) -> Any:
    return value.__func__ if isinstance(value, staticmethod) else value
