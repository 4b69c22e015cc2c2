"""How a registered task's keys are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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


def task_keys(task: type[Any], is_hidden: Callable[[str], bool]) -> TaskKeys | None:
    """
    How the keys of *task* are made; None where it has none.

    Args:
        is_hidden: Whether an argument of a name is never shown.

    Raises:
        ConfigurationError: An option, or the key's template, is wrong.
    """
    options = key_options({name: _plain(task, name) for name in _OPTIONS})
    spec = _plain(task, "idempotency_key")
    if spec is None:
        if options.is_unique_enqueue:
            raise ConfigurationError("unique_enqueue needs an idempotency_key")
        return None
    maker = KeyMaker(spec, _signature(task), task.name, is_hidden)
    return TaskKeys(maker, options)


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
