"""The options of a resilient task: their types for checkers, and their checks."""

from __future__ import annotations

import difflib
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


def misspelt_options(task: type[Any], known: Iterable[str]) -> list[str]:
    """
    What a task says that nobody reads, and that is nearly an option of ours.

    Args:
        known: The names that its base classes have.
    """
    return [
        f"unknown option {name}, did you mean {meant}?"
        for name in vars(task)
        if name not in known and (meant := _meant_by(name)) is not None
    ]


@lru_cache(maxsize=1_000)  # the tasks of an app have the same few
def _meant_by(name: str) -> str | None:
    """The option of ours that *name* is a mistake for."""
    ours = [*TaskOptions.__annotations__]
    for meant in difflib.get_close_matches(name, ours, n=1, cutoff=0.85):
        if not _is_of_one_word(name, meant):
            return meant
    return None


def nearly_options(names: Iterable[str]) -> list[tuple[str, str]]:
    """Those of *names* that may be the app's own, each with the option it is near."""
    return [
        (name, option)
        for name in sorted(names)
        for option in TaskOptions.__annotations__
        if name != option and _is_of_one_word(name, option)
    ]


def _is_of_one_word(name: str, option: str) -> bool:
    """
    Whether *name* has the word of an option with an ending, as `redacted` has.

    An app may well call something of its own so; of an option of several words it is
    a mistake.
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
