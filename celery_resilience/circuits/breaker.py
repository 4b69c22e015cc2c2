"""pybreaker's breaker with a circuit of the fleet's behind it.

Listeners and `exclude` are pybreaker's. What it does otherwise: no lock is held during
a call, an excluded exception counts nothing instead of as a success, the original
exception is never replaced, and coroutines and generators are guarded until they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from types import CoroutineType, GeneratorType
from typing import Any, NoReturn, Self

import pybreaker
from pybreaker import CircuitBreakerError, CircuitBreakerStorage

from celery_resilience.body import HEARS_OF_CIRCUITS
from celery_resilience.circuits import policy
from celery_resilience.circuits.circuit import Circuit, Permit
from celery_resilience.circuits.fleet import Circuits
from celery_resilience.circuits.policy import Entry, Position, State
from celery_resilience.errors import (
    CONTROL_FLOW,
    CircuitIsOpen,
    PassesAutoretry,
    ResilienceError,
)
from celery_resilience.events import emit, observed
from celery_resilience.retry_after import retry_after_of

logger = logging.getLogger("celery_resilience.circuits")

_STATES: dict[str, Any] = {
    Position.CLOSED: pybreaker.CircuitClosedState,
    Position.OPEN: pybreaker.CircuitOpenState,
    Position.HALF_OPEN: pybreaker.CircuitHalfOpenState,
}


class CircuitOpen(CircuitIsOpen, CircuitBreakerError):
    """The circuit is open: the call was not made.

    Attributes:
        name: The circuit's.
        retry_after_s: Seconds until it is worth another look.
        generation: Which opening it is.
    """


class CircuitOpenInTask(CircuitOpen, PassesAutoretry):
    """The same in a task's body, where it is no reason to spend a retry."""

    # Of Celery's Retry, whose own __init__ nobody calls.
    exc = None
    excs = None
    when = None
    is_eager = False
    sig = None


def refusal(name: str, retry_after_s: float, generation: int) -> CircuitOpen:
    """What a refused call raises: in a task, such that it spends no retry."""
    kind = CircuitOpenInTask if HEARS_OF_CIRCUITS.get() else CircuitOpen
    return kind(None, name, retry_after_s, generation)


class FleetStorage(CircuitBreakerStorage):
    """
    A circuit as pybreaker asks for it.

    What changes a counter alone does nothing: outcomes are told by the breaker.
    """

    def __init__(self, circuit: Circuit) -> None:
        super().__init__("fleet")
        self._circuit = circuit

    @property
    def state(self) -> str:
        """pybreaker's word for what the circuit does."""
        return self._circuit.look().position.value

    @state.setter
    def state(self, state: str) -> None:
        """The breaker changes the circuit, not its storage."""

    @property
    def counter(self) -> int:
        """Failures in the window."""
        return self._circuit.look().failures

    @property
    def success_counter(self) -> int:
        """Probes that have succeeded."""
        return self._circuit.look().successes

    @property
    def opened_at(self) -> datetime | None:
        """When it opened last."""
        at = self._circuit.look().opened_at
        return datetime.fromtimestamp(at, UTC) if at else None

    @opened_at.setter
    def opened_at(self, datetime: datetime) -> None:
        """The breaker opens the circuit, not its storage."""


class FleetBreaker(pybreaker.CircuitBreaker):
    """
    The breaker of one circuit, the same object in a whole process.

    Use it as a decorator, with `with`, `call` or `calling`, on functions, coroutines
    and generators, in any number of threads.

    Args:
        fleet: The app's circuits.
        circuit: Which of them.
    """

    def __init__(self, fleet: Circuits, circuit: Circuit) -> None:
        self._fleet = fleet
        self._circuit = circuit
        self._is_made = False
        self._entered: ContextVar[tuple[Permit, ...]] = ContextVar(
            "entered", default=()
        )
        super().__init__(
            name=circuit.name,
            state_storage=FleetStorage(circuit),
            throw_new_error_on_trip=False,
        )
        self._is_made = True
        self._broken_listeners: set[tuple[type, str]] = set()
        circuit.on_change.append(self._tell_change)

    # --- a call ----------------------------------------------------------------------

    def enter(self, *, can_wait: bool = False) -> Permit:
        """
        Begin a call.

        Args:
            can_wait: Refused, it comes again: so it is, too, where after the circuit
                has closed enough run at once.

        Raises:
            CircuitOpen: The circuit is open.
        """
        return self._entered_as(self._circuit.enter(can_wait=can_wait))

    def _entered_as(self, permit: Permit | Entry) -> Permit:
        if isinstance(permit, Entry):
            self._refuse(permit)
        if self._listeners:
            self._tell("before_call", None)
        return permit

    def leave(self, permit: Permit, exc: BaseException | None) -> None:
        """
        End a call that returned, or raised *exc*.

        What steers Celery, ends the process or is excluded counts nothing.
        """
        if exc is None:
            self._circuit.leave(permit, True)
            if self._listeners:
                self._tell("success")
        elif not self.is_system_error(exc):
            self._circuit.leave(permit, None)
        else:
            self._circuit.leave(permit, False, retry_after_of(exc))
            if self._listeners:
                self._tell("failure", exc)

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Call *func*, if the circuit lets it; a coroutine function when it is awaited.

        Raises:
            CircuitOpen: The circuit is open.
        """
        if inspect.iscoroutinefunction(func):
            return self._call_async(func, args, kwargs)
        permit = self.enter()
        try:
            result = func(*args, **kwargs)
        except BaseException as exc:
            self.leave(permit, exc)
            raise
        if type(result) is GeneratorType:
            return self._generator(permit, result)
        if type(result) is CoroutineType:
            return self._awaited(permit, result)
        self.leave(permit, None)
        return result

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Guard what is in the `with`; also around an `await`."""
        permit = self.enter()
        try:
            yield
        except BaseException as exc:
            self.leave(permit, exc)
            raise
        self.leave(permit, None)

    def __enter__(self) -> Self:
        self._entered.set((*self._entered.get(), self.enter()))
        return self

    def __exit__(
        self, kind: object, exc: BaseException | None, traceback: object
    ) -> None:
        *before, permit = self._entered.get()
        self._entered.set(tuple(before))
        self.leave(permit, exc)

    async def __aenter__(self) -> Self:
        permit = await self._enter_async()
        self._entered.set((*self._entered.get(), permit))
        return self

    async def __aexit__(
        self, kind: object, exc: BaseException | None, traceback: object
    ) -> None:
        *before, permit = self._entered.get()
        self._entered.set(tuple(before))
        await self._leave_async(permit, exc)

    def __call__(self, *functions: Any, **options: Any) -> Any:
        """A decorator: the function, guarded; its kind stays what it is."""

        def guard(function: Any) -> Any:
            if inspect.isasyncgenfunction(function):

                @functools.wraps(function)
                async def items(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                    async with self:
                        async for item in function(*args, **kwargs):
                            yield item

                return items
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def awaited(*args: Any, **kwargs: Any) -> Any:
                    return await self._call_async(function, args, kwargs)

                return awaited

            @functools.wraps(function)
            def called(*args: Any, **kwargs: Any) -> Any:
                return self.call(function, *args, **kwargs)

            return called

        return guard(*functions) if functions else guard

    async def _call_async(self, func: Any, args: Any, kwargs: Any) -> Any:
        permit = await self._enter_async()
        return await self._awaited(permit, func(*args, **kwargs))

    async def _awaited(self, permit: Permit, awaitable: Any) -> Any:
        try:
            result = await awaitable
        except BaseException as exc:
            await self._leave_async(permit, exc)
            raise
        await self._leave_async(permit, None)
        return result

    async def _enter_async(self) -> Permit:
        """The loop goes on while the store is asked."""
        if self._circuit.may_ask:
            return self._entered_as(await asyncio.to_thread(self._circuit.enter))
        return self.enter()

    async def _leave_async(self, permit: Permit, exc: BaseException | None) -> None:
        if permit.token and isinstance(exc, Exception | None):
            await asyncio.to_thread(self.leave, permit, exc)
        else:
            # Cancelled, it would be cancelled again as it waits.
            self.leave(permit, exc)

    def _generator(self, permit: Permit, generator: Any) -> Generator[Any, Any, Any]:
        try:
            result = yield from generator
        except BaseException as exc:
            self.leave(permit, exc)
            raise
        self.leave(permit, None)
        return result

    def _refuse(self, entry: Entry) -> NoReturn:
        if observed("circuits.refused"):
            emit("circuits.refused", circuit=self._circuit.name)
        generation = self._circuit.state.generation
        raise refusal(self._circuit.name, entry.retry_after_s, generation)

    # --- what pybreaker's users ask ------------------------------------------------------

    def is_system_error(self, exception: Any) -> bool:
        """Whether it says that the dependency fails."""
        if not isinstance(exception, Exception):
            return False
        if isinstance(exception, CONTROL_FLOW):
            return False
        if isinstance(exception, ResilienceError):
            return False
        for excluded in self.excluded_exceptions:
            if isinstance(excluded, type):
                if isinstance(exception, excluded):
                    return False
            elif excluded(exception):
                return False
        return True

    @property
    def excluded_exceptions(self) -> tuple[Any, ...]:
        """Types of exceptions, and callables, that count nothing."""
        return (*self._circuit.options.exclude, *self._excluded_exceptions)

    @property
    def current_state(self) -> str:
        """ "closed", "open" or "half-open", as known here."""
        return self._state_storage.state if self._is_made else Position.CLOSED.value

    def _look(self) -> Any:
        """pybreaker's object for the state; looking changes nothing."""
        return _STATES[self._circuit.look().position](self, prev_state=None)

    def _ignore(self, state: str) -> None:
        """The circuit is changed by `open`, `half_open` and `close`."""

    state = property(_look, _ignore)

    def return_in_s(self, refused: CircuitIsOpen) -> float | None:
        """
        Seconds until it is the turn of one more waiting task.

        Returns:
            None: nobody knows how many wait.
        """
        number = self._fleet.ticket(self._circuit, refused.generation)
        if number is None:
            return None
        state = self._circuit.state
        first_s = refused.retry_after_s
        if state.position is Position.CLOSED and state.forced is None:
            # They have come back since it was closed.
            first_s = state.closed_at - self._circuit.store_now()
        return first_s + number / self._circuit.options.release_per_s

    @property
    def fleet_state(self) -> State:
        """All that is known of the circuit."""
        return self._circuit.look()

    def open(self) -> bool:
        """Open the circuit for the fleet, as if it had tripped."""
        self._change(
            lambda state, now: policy.opened(state, self._circuit.options, now=now)
        )
        return False

    def half_open(self) -> None:
        """Let the next calls be probes."""
        self._change(lambda state, now: policy.half_open(state, now=now))

    def close(self) -> None:
        """Close the circuit for the fleet, with an empty window."""
        self._change(lambda state, now: policy.closed(state, now=now))

    def _change(self, change: Callable[[State, float], State]) -> None:
        self._circuit.look()

        def changed(state: State, now: float) -> tuple[State, None]:
            return change(state, now), None

        self._fleet.ask(self._circuit, changed)

    # --- listeners -----------------------------------------------------------------------

    def _tell_change(self, before: State, after: State) -> None:
        if self._listeners and before.position is not after.position:
            old, new = (
                _STATES[s.position](self, prev_state=None) for s in (before, after)
            )
            self._tell("state_change", old, new)

    def _tell(self, event: str, *facts: Any) -> None:
        """A listener that fails is logged once, and changes nothing."""
        for listener in self.listeners:
            try:
                getattr(listener, event)(self, *facts)
            except Exception:
                kind = type(listener), event
                if kind not in self._broken_listeners:
                    self._broken_listeners.add(kind)
                    logger.exception(
                        "circuit %s: %s.%s failed (told once)",
                        self._circuit.name,
                        type(listener).__name__,
                        event,
                    )


class PlainBreaker:
    """
    A pybreaker of the user's own around a call, with no lock during it.

    Args:
        breaker: Its state, listeners and storage are as the user made them.
    """

    def __init__(self, breaker: pybreaker.CircuitBreaker) -> None:
        self._breaker = breaker

    def enter(self, *, can_wait: bool = False) -> Any:
        """
        Begin a call.

        Args:
            can_wait: Nothing to a breaker of the app's own.

        Raises:
            CircuitOpen: The breaker is open.
        """
        try:
            # Its lock is held while it looks; the generator starts as the call ends.
            return self._breaker.call(_one_step)
        except CircuitBreakerError as exc:
            name = self._breaker.name or "pybreaker"
            raise refusal(name, self._retry_after_s(), 0) from exc

    def leave(self, started: Any, exc: BaseException | None) -> None:
        """End a call that returned, or raised *exc*; what steers Celery counts nothing."""
        if exc is not None and (
            not isinstance(exc, Exception)
            or isinstance(exc, (*CONTROL_FLOW, ResilienceError))
        ):
            return  # never started: it counts nothing
        try:
            next(started)
            if exc is None:
                next(started, None)
            else:
                started.throw(exc)
        except Exception as raised:
            # The call's own exception goes on; on a trip, pybreaker raises another.
            if raised is not exc and not isinstance(raised, CircuitBreakerError):
                logger.exception("circuit %s failed", self._breaker.name)

    def _retry_after_s(self) -> float:
        timeout = timedelta(seconds=self._breaker.reset_timeout)
        opened_at = self._breaker._state_storage.opened_at
        if opened_at is None:
            return timeout.total_seconds()
        return max(0.001, (opened_at + timeout - datetime.now(UTC)).total_seconds())


def _one_step() -> Iterator[None]:
    yield
