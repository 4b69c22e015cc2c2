"""The options of a resilient task: their types for checkers, and their checks."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from celery_resilience.finite import is_finite
from celery_resilience.memory_amount import MEMORY_AMOUNT, is_memory_amount

if TYPE_CHECKING:
    from celery_resilience.circuits.task import IfOpen
    from celery_resilience.idempotency.options import IfDone, IfInterrupted, IfRunning
    from celery_resilience.retries.rules import Never, On

#: Names of arguments; one string is no list of them.
Names = list[str] | tuple[str, ...] | set[str] | frozenset[str]


class TaskOptions(TypedDict, total=False):
    """
    The options of a resilient task, for type checkers: they check what they see here.

    `@app.task(base=ResilientTask, **TaskOptions(max_crashes=2))` is the same to
    Celery as `@app.task(base=ResilientTask, max_crashes=2)`, whose options no checker
    knows. What they mean is told at `ResilientTask`.
    """

    failed_queue: str | Literal[False] | None
    redact: Names
    max_crashes: int | None
    idempotency_key: str | Literal[True] | Callable[..., str | None] | None
    idempotency_keep_s: float
    idempotency_lease_s: float
    if_running: IfRunning
    if_done: IfDone
    if_interrupted: IfInterrupted
    unique_enqueue: bool
    max_message_kib: float | None
    memory_limit_mib: float | str | None
    retry_rules: Sequence[On | Never]
    circuit: Any
    if_circuit_open: IfOpen


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return is_finite(value) and bool(value > 0)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(name, str) for name in value
    )


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "failed_queue": (
        lambda value: (
            value in (None, False) or (isinstance(value, str) and value != "")
        ),
        "the name of a queue, False or None",
    ),
    "redact": (_is_names, "a list of argument names"),
    "max_crashes": (
        lambda value: value is None or _is_count(value),
        "a whole number from 1, or None",
    ),
    "max_message_kib": (
        lambda value: value is None or _is_positive(value),
        "a number of KiB above 0, or None",
    ),
    "memory_limit_mib": (
        lambda value: value is None or is_memory_amount(value),
        f"{MEMORY_AMOUNT}, or None",
    ),
}


def _is_circuit(value: Any) -> bool:
    # It imports redis-py, which not every fleet needs.
    pybreaker: Any = sys.modules.get("pybreaker")
    return (isinstance(value, str) and value != "") or (
        pybreaker is not None and isinstance(value, pybreaker.CircuitBreaker)
    )


#: Whether a value is one of an option with whose name an app's own may be confused: then
#: it is a mistake, and else the app's own.
_NEARLY: Mapping[str, Callable[[Any], bool]] = {
    "redact": _is_names,
    "circuit": _is_circuit,
    "if_circuit_open": lambda value: (
        callable(value)
        or (isinstance(value, str) and value in ("snooze", "pause", "fail"))
    ),
}

#: What is written for an option, and not like it enough to be taken for a slip.
_SHORT = {"if_open": "if_circuit_open"}


def misspelt_options(task: type[Any], known: Iterable[str]) -> list[str]:
    """
    What a task says that nobody reads, and that is nearly an option of ours.

    Args:
        known: The names that its base classes have.
    """
    said = {name: value for name, value in vars(task).items() if name not in known}
    meant = {name: _meant_by(name) or _confused_with(name, said[name]) for name in said}
    return [
        f"unknown option {name}, did you mean {option}?"
        for name, option in meant.items()
        if option is not None
    ]


def _confused_with(name: str, value: Any) -> str | None:
    """The option of ours that *name* is near, if the value is one of it."""
    option = _near(name)
    return option if option is not None and _NEARLY[option](value) else None


@lru_cache(maxsize=1_000)  # the tasks of an app have the same few
def _meant_by(name: str) -> str | None:
    """The option of ours that *name* is a mistake for."""
    ours = [*TaskOptions.__annotations__]
    for meant in difflib.get_close_matches(name, ours, n=1, cutoff=0.85):
        if not _is_of_one_word(name, meant):
            return meant
    return None


def nearly_options(own: Mapping[str, Any]) -> list[tuple[str, str]]:
    """
    Those names that may be the app's own, each with the option that it is near.

    Args:
        own: What a task says itself, by the names.
    """
    return [
        (name, option)
        for name, value in sorted(own.items(), key=lambda said: said[0])
        if (option := _near(name)) is not None and not _NEARLY[option](value)
    ]


@lru_cache(maxsize=1_000)
def _near(name: str) -> str | None:
    """The option of ours that *name* is near, though it may be the app's own."""
    for option in TaskOptions.__annotations__:
        if name != option and _is_of_one_word(name, option):
            return option
    return _SHORT.get(name)


def _is_of_one_word(name: str, option: str) -> bool:
    """
    Whether *name* has the word of an option with an ending, as `redacted` has.

    An app may well call something of its own so, whose value tells; of an option of
    several words it is a mistake.
    """
    return (
        "_" not in option and name.startswith(option) and len(name) <= len(option) + 3
    )


def wrong_options(task: type[Any], known: Iterable[str]) -> list[str]:
    """
    What is wrong with a task's options, a sentence each.

    Args:
        known: The names that its base classes have.
    """
    found = [
        f"{name} must be {accepted}, got {getattr(task, name)!r}"
        for name, (is_right, accepted) in _CHECKS.items()
        if not is_right(getattr(task, name))
    ]
    return found + misspelt_options(task, known)
