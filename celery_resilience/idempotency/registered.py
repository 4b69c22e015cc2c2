"""How a registered task's keys are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery_resilience.errors import ConfigurationError, ResilienceError
from celery_resilience.idempotency.key import KeyMaker, MadeKey
from celery_resilience.idempotency.options import KeyOptions, key_options

_OPTIONS = (
    *("idempotency_keep_s", "idempotency_lease_s", "if_running", "if_done"),
    *("if_interrupted", "unique_enqueue"),
)


@dataclass(frozen=True, slots=True)
class TaskKeys:
    """
    The keys of one task.

    Attributes:
        maker: Makes the key of a call.
        options: What the task says about them.
    """

    maker: KeyMaker
    options: KeyOptions


def task_keys(
    task: type[Any],
    is_hidden: Callable[[str], bool],
    own_options: Collection[str] = (),
) -> TaskKeys | None:
    """
    How the keys of *task* are made; None where it has none.

    Args:
        is_hidden: Whether an argument of a name is never shown.
        own_options: Names that the task itself says, and no base class of it.

    Raises:
        ConfigurationError: An option, or the key's template, is wrong.
    """
    options = key_options({name: _plain(task, name) for name in _OPTIONS})
    spec = _plain(task, "idempotency_key")
    if spec is None:
        # A base class may say them for those of its tasks that have keys.
        said = [name for name in _OPTIONS if name in own_options]
        if said:
            raise ConfigurationError(
                f"{', '.join(said)}: nothing without an idempotency_key"
            )
        return None
    signature = _signature(task)
    maker = KeyMaker(spec, signature, task.name, is_hidden)
    for name, value in (
        ("idempotency_key", spec),
        ("if_interrupted", options.if_interrupted),
    ):
        if callable(value) and not takes_calls_of(value, signature):
            raise ConfigurationError(
                f"{name} is called as the task is, and takes no call that the task "
                f"takes: the task's arguments are {signature}, and its own are "
                f"{inspect.signature(value)}"
            )
    return TaskKeys(maker, options)


def takes_calls_of(function: Callable[..., Any], task: inspect.Signature) -> bool:
    """
    Whether any call of a task could be one of *function*.

    Where that cannot be known, it is taken to be so.
    """
    try:
        own = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    parameters = [*task.parameters.values()]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return True
    needed = [p for p in parameters if p.default is p.empty]
    return any(
        _binds(own, found[:count], found[count:])
        for found in (needed, parameters)
        for count in range(len(found) + 1)
    )


def _binds(
    signature: inspect.Signature,
    by_position: Sequence[inspect.Parameter],
    by_name: Sequence[inspect.Parameter],
) -> bool:
    try:
        signature.bind(*by_position, **{p.name: None for p in by_name})
    except TypeError:
        return False
    return True


def _plain(task: type[Any], name: str) -> Any:
    """An option as it was written: a function in a class is no method here."""
    found = inspect.getattr_static(task, name)
    return found.__func__ if isinstance(found, staticmethod) else found


def _signature(task: type[Any]) -> inspect.Signature:
    """The parameters of a task's body, without a bound `self`."""
    run = inspect.getattr_static(task, "run")
    if isinstance(run, staticmethod | classmethod):
        return inspect.signature(run.__get__(None, task))
    signature = inspect.signature(run)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def received_key(
    maker: KeyMaker, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> MadeKey | None:
    """
    The key of a call whose arguments are as the worker sees them.

    Returns:
        None: this call has none, or the body would not take these arguments.

    Raises:
        NoKey: No key can be made of them.
    """
    try:
        return maker.make(args, kwargs)
    except ResilienceError:
        raise
    except TypeError:
        return None  # Celery, or the body, says so
