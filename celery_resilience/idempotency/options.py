"""What a task says about its key, checked where the task is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from celery_resilience.errors import ConfigurationError

IfRunning = Literal["snooze", "skip", "error"]
IfDone = Literal["return_saved", "error", "rerun"]
IfInterrupted = Literal["rerun", "fail"] | Callable[..., Any]

#: Names of the options on a task, with the words that each accepts.
WORDS: Mapping[str, tuple[str, ...]] = {
    "if_running": ("snooze", "skip", "error"),
    "if_done": ("return_saved", "error", "rerun"),
    "if_interrupted": ("rerun", "fail"),
}


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """
    The options of a task with a key.

    Attributes:
        keep_s: Seconds a finished key is remembered.
        lease_s: Seconds a run holds its key without a heartbeat.
        if_running: What becomes of a duplicate while another run has the key.
        if_done: What becomes of a duplicate once the effect has happened.
        if_interrupted: What becomes of a run after one that ended with its process.
        is_unique_enqueue: A second send while the first waits is the first's.
    """

    keep_s: float
    lease_s: float
    if_running: IfRunning
    if_done: IfDone
    if_interrupted: IfInterrupted
    is_unique_enqueue: bool


def key_options(values: Mapping[str, Any]) -> KeyOptions:
    """
    Check the options of a task, all at once.

    Args:
        values: By their names on the task.

    Raises:
        ConfigurationError: Some are wrong; the message names each, its value and what
            is accepted.
    """
    wrong = [
        f"{name} must be a number of seconds above 0, got {values[name]!r}"
        for name in ("idempotency_keep_s", "idempotency_lease_s")
        if not _is_seconds(values[name])
    ]
    for name, words in WORDS.items():
        value = values[name]
        takes_callable = name == "if_interrupted"
        if not (
            (isinstance(value, str) and value in words)
            or (takes_callable and callable(value))
        ):
            accepted = ", ".join(map(repr, words))
            if takes_callable:
                accepted += ", or a callable that looks whether the effect happened"
            wrong.append(f"{name} must be one of {accepted}, got {value!r}")
    if not isinstance(values["unique_enqueue"], bool):
        wrong.append(
            f"unique_enqueue must be True or False, got {values['unique_enqueue']!r}"
        )
    if wrong:
        raise ConfigurationError("; ".join(wrong))
    return KeyOptions(
        keep_s=float(values["idempotency_keep_s"]),
        lease_s=float(values["idempotency_lease_s"]),
        if_running=values["if_running"],
        if_done=values["if_done"],
        if_interrupted=values["if_interrupted"],
        is_unique_enqueue=values["unique_enqueue"],
    )


def _is_seconds(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < float("inf")
    )
