"""What an app says about a circuit, checked at start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from celery_resilience.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class CircuitOptions:
    """
    The options of one circuit.

    Attributes:
        failure_rate: Share of the calls in the window, above 0 and at most 1, at
            which it opens. A slow call is a failure.
        window_s: Seconds that a call is counted.
        min_calls: Calls in the window below which the share says nothing.
        consecutive: Failures of one process without a success between them, or of
            several, at which it opens too, however few calls there are. None: never.
        slow_call_s: Seconds from which a call is slow. None: none is.
        open_s: Seconds that it stays open the first time; twice as long each time
            that the probe fails.
        max_open_s: Most seconds that it stays open.
        jitter: Share by which the open time is longer at random, from 0 to 1.
        probes: Calls that are let through when the time has passed, and that must
            succeed for it to close.
        probe_lease_s: Seconds after which another probe replaces one that was not
            heard of.
        release_per_s: Waiting tasks that come back each second, from when it may be
            tried.
        ramp_from: Tasks that run at once in the fleet after it has closed; one more
            each time so many have succeeded, fewer where one fails. None: any number.
        queues: Queues that no worker consumes while it is open, but for one that takes
            the probe.
        exclude: Types of exceptions that count nothing, as pybreaker's.
        probe: `package.module:function`, called by one worker of the fleet in the place
            of a task: the circuit closes where it returns something true. It is given
            up after nine tenths of `probe_lease_s`.
    """

    failure_rate: float = 0.5
    window_s: float = 60.0
    min_calls: int = 20
    consecutive: int | None = None
    slow_call_s: float | None = None
    open_s: float = 30.0
    max_open_s: float = 600.0
    jitter: float = 0.1
    probes: int = 1
    probe_lease_s: float = 60.0
    release_per_s: float = 50.0
    ramp_from: int | None = 2
    queues: tuple[str, ...] = ()
    exclude: tuple[type[BaseException], ...] = ()
    probe: str | None = None


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and isfinite(value)
    )


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 604_800


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_SECONDS = (_is_seconds, "a number of seconds above 0, at most a week")
_COUNT = (_is_count, "a whole number from 1")

_PROBE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_CHECKS: Mapping[str, tuple[Any, str]] = {
    "failure_rate": (
        lambda v: _is_number(v) and 0 < v <= 1,
        "a share above 0 and at most 1",
    ),
    "window_s": _SECONDS,
    "min_calls": _COUNT,
    "consecutive": (lambda v: v is None or _is_count(v), f"{_COUNT[1]}, or None"),
    "slow_call_s": (lambda v: v is None or _is_seconds(v), f"{_SECONDS[1]}, or None"),
    "open_s": _SECONDS,
    "max_open_s": _SECONDS,
    "jitter": (lambda v: _is_number(v) and 0 <= v <= 1, "a share from 0 to 1"),
    "probes": _COUNT,
    "probe_lease_s": _SECONDS,
    "release_per_s": (
        lambda v: _is_number(v) and 0 < v <= 1_000_000,
        "a number above 0",
    ),
    "ramp_from": (lambda v: v is None or _is_count(v), f"{_COUNT[1]}, or None"),
    "queues": (
        lambda v: (
            isinstance(v, list | tuple) and all(isinstance(q, str) and q for q in v)
        ),
        "a list of queue names",
    ),
    "exclude": (
        lambda v: (
            isinstance(v, list | tuple)
            and all(isinstance(t, type) and issubclass(t, BaseException) for t in v)
        ),
        "a list of types of exceptions",
    ),
    "probe": (
        lambda v: v is None or (isinstance(v, str) and _PROBE.fullmatch(v) is not None),
        "the name of a function, package.module:function, or None",
    ),
}


def circuit_options(name: str, values: Mapping[str, Any]) -> CircuitOptions:
    """
    Check the options of the circuit *name*, all at once.

    Raises:
        ConfigurationError: Some are wrong; the message names each, its value and what
            is accepted.
    """
    wrong: list[str] = []
    known = [field.name for field in fields(CircuitOptions)]
    for option, value in values.items():
        if option not in known:
            near = get_close_matches(str(option), known, n=1)
            meant = f", did you mean {near[0]}?" if near else ""
            wrong.append(f"unknown option {option}{meant}")
        elif not _CHECKS[option][0](value):
            wrong.append(f"{option} must be {_CHECKS[option][1]}, got {value!r}")
    given = {k: v for k, v in values.items() if k in known}
    if not wrong:
        unset = CircuitOptions()
        open_s = given.get("open_s", unset.open_s)
        given.setdefault("max_open_s", max(open_s, unset.max_open_s))
        if given["max_open_s"] < open_s:
            wrong.append(
                f"max_open_s must be at least open_s, got {given['max_open_s']!r}"
            )
    if wrong:
        raise ConfigurationError(f"resilience_circuits: {name}: {'; '.join(wrong)}")
    given["queues"] = tuple(given.get("queues", ()))
    given["exclude"] = tuple(given.get("exclude", ()))
    return CircuitOptions(**given)
