"""Ends a process at one exact point, once, for tests of what survives it.

`FLEET_SABOTAGE=sabotage` with `FLEET_KILL_AT=<point>` in the environment. A file
beside the ledger remembers that it has happened. A point may end in a number:
"before-publish-317" is the 317th publish of the process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any


def die_once(point: str) -> None:
    """Kill this process where *point* is the one that was asked for, once."""
    flag = Path(f"{os.environ['FLEET_LEDGER']}.{point}")
    if os.environ.get("FLEET_KILL_AT") == point and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, point: str) -> None:
    """Die before or after the first, or a later, call of *owner*.name."""
    wrapped: Callable[..., Any] = getattr(owner, name)
    calls = count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        die_once(f"before-{point}")
        die_once(f"before-{point}-{number}")
        result = wrapped(*args, **kwargs)
        die_once(f"after-{point}")
        die_once(f"after-{point}-{number}")
        return result

    setattr(owner, name, dying)


def sabotage(app: Any) -> None:
    """Set every trap; the environment says which one bites."""
    from celery_resilience.failed import collector
    from celery_resilience.failed.inbox import Batch
    from celery_resilience.failed.redis_store import RedisFailedTaskStore
    from celery_resilience.failed.sql_store import SqlFailedTaskStore
    from celery_resilience.idempotency.redis_store import RedisKeyStore
    from celery_resilience.idempotency.sql_store import SqlKeyStore
    from celery_resilience.publisher import Publisher
    from celery_resilience.shelf import policy as shelf_policy

    collector.STALE_CLAIM_S = float(os.environ.get("FLEET_STALE_S", "60"))
    shelf_policy.MAX_HELD = int(os.environ.get("FLEET_MOST_HELD", "1000"))
    _trap_acks_of_failures()
    around(Publisher, "publish", "publish")
    around(SqlFailedTaskStore, "_forget_ghosts", "commit")
    around(RedisFailedTaskStore, "_write", "commit")
    for store in (SqlFailedTaskStore, RedisFailedTaskStore):
        around(store, "keep", "keep")
        around(store, "claim", "claim")
        around(store, "mark_sent", "mark")
    for keys in (RedisKeyStore, SqlKeyStore):
        around(keys, "finish", "finish")
    around(Batch, "__init__", "take")


def _trap_acks_of_failures() -> None:
    from celery_resilience.delivery.request import ResilientRequest
    from celery_resilience.outcome import Outcome

    acknowledge = ResilientRequest.acknowledge

    def dying(self: Any) -> None:
        if not self._is_held and self.settled_as is Outcome.FAILED:
            die_once("before-ack-of-failure")
        if not self._is_held and self.settled_as is Outcome.SUCCEEDED:
            die_once("before-ack-of-success")
        if not self._is_held and self.settled_as is Outcome.RETRIED:
            die_once("before-ack-of-retry")
        acknowledge(self)

    ResilientRequest.acknowledge = dying  # type: ignore[method-assign]
