"""Ends a process at one exact point, once, for tests of what survives it.

`FLEET_SABOTAGE=sabotage` with `FLEET_KILL_AT=<point>` in the environment. A file
beside the ledger remembers that it has happened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die_once(point: str) -> None:
    """Kill this process where *point* is the one that was asked for, once."""
    flag = Path(f"{os.environ['FLEET_LEDGER']}.{point}")
    if os.environ.get("FLEET_KILL_AT") == point and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, point: str) -> None:
    """Die before *owner*.name is called."""
    wrapped: Callable[..., Any] = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        die_once(point)
        return wrapped(*args, **kwargs)

    setattr(owner, name, dying)


def after(owner: Any, name: str, point: str) -> None:
    """Die after *owner*.name has returned."""
    wrapped: Callable[..., Any] = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        die_once(point)
        return result

    setattr(owner, name, dying)


def sabotage(app: Any) -> None:
    """Set every trap; the environment says which one bites."""
    from celery_resilience.delivery import publisher
    from celery_resilience.failed import sql_store
    from celery_resilience.failed.inbox import Batch

    _trap_acks_of_failures()
    store = sql_store.SqlFailedTaskStore
    before(publisher.Publisher, "publish", "before-capture")
    before(store, "keep", "before-upsert")
    before(store, "_forget_ghosts", "before-commit")
    after(store, "keep", "after-commit")
    before(Batch, "__init__", "after-take")
    before(store, "mark_sent", "before-mark-sent")
    after(store, "mark_sent", "after-mark-sent")
    after(store, "claim", "after-claim")


def _trap_acks_of_failures() -> None:
    from celery_resilience.delivery.outcome import Outcome
    from celery_resilience.delivery.request import ResilientRequest

    acknowledge = ResilientRequest.acknowledge

    def dying(self: Any) -> None:
        if not self._is_held and self.settled_as is Outcome.FAILED:
            die_once("before-ack-of-failure")
        if not self._is_held and self.settled_as is Outcome.SUCCEEDED:
            die_once("before-ack-of-success")
        acknowledge(self)

    ResilientRequest.acknowledge = dying  # type: ignore[method-assign]
