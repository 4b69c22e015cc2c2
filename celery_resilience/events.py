"""What happened, told to whoever listens, in the process where it happened.

Rooms call `emit`; log, metrics and tracing `observe`. An observer that raises
is logged once per kind of error and breaks nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("celery_resilience.events")

Observer = Callable[..., None]

_observers: dict[str, tuple[Observer, ...]] = {}
_reported: set[tuple[str, type[BaseException]]] = set()


def observe(name: str, observer: Observer) -> Callable[[], None]:
    """
    Call *observer* with the facts of each event called *name*.

    Args:
        name: `room.past_participle`, such as "delivery.settled".
        observer: Called with the facts as keyword arguments, in the process
            and thread of the event; it should take microseconds.

    Returns:
        A function that ends the observation.
    """
    if observer not in _observers.get(name, ()):
        _observers[name] = (*_observers.get(name, ()), observer)

    def stop() -> None:
        _observers[name] = tuple(o for o in _observers[name] if o != observer)

    return stop


def observed(name: str) -> bool:
    """Whether anybody listens: for emitters whose facts cost something to gather."""
    return bool(_observers.get(name))


def emit(name: str, **facts: Any) -> None:
    """Tell the observers of *name*; never raises an Exception."""
    for observer in _observers.get(name, ()):
        try:
            observer(**facts)
        except Exception as exc:
            kind = (name, type(exc))
            if kind not in _reported:
                _reported.add(kind)
                logger.exception(
                    "an observer of %s raised %s (told once)", name, type(exc).__name__
                )
