"""
The app of one side of the comparison of keys, in an environment of its own.

Nothing is imported here that a side does not need. `python -m benchmarks.sides` sends
as many calls as each line of its input says, and answers with seconds for each,
and of those its own processor time;
`celery -A benchmarks.sides worker` runs them.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from functools import cache
from typing import Any

from celery import Celery, Task
from redis import Redis

#: A list in Redis of the times at which the first and the last call of a block ran:
#: of the clock, and of the worker's processor time.
MARKS = "bench.marks"

#: Calls before those of a block that are measured: a process that was idle is slow.
WARM_UP = 30


def make_app(broker_url: str, kind: str, store_url: str) -> Celery:
    """
    An app with a task that does nothing.

    Args:
        broker_url: Of Redis.
        kind: "plain"; "no_key", "key" or "reserved" (ours); "once", "singleton" or
            "heimdall".
        store_url: Where keys are remembered, or locks are held.
    """
    app = Celery(f"bench_{kind}", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_default_queue=kind,
        task_default_delivery_mode="transient",
        worker_prefetch_multiplier=64,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    task: Any = app.task
    task(**_options(app, kind, store_url), name="nothing", shared=False)(nothing)
    return app


def _options(app: Celery, kind: str, store_url: str) -> dict[str, Any]:
    """What a task of this kind is made with; its app is told what it needs."""
    if kind == "plain":
        return {"base": Task}
    if kind == "once":
        from celery_once import QueueOnce  # type: ignore[import-not-found]

        app.conf.ONCE = {
            "backend": "celery_once.backends.Redis",
            "settings": {"url": store_url, "default_timeout": 3600},
        }
        return {"base": QueueOnce}
    if kind == "singleton":
        from celery_singleton import Singleton  # type: ignore[import-not-found]

        app.conf.singleton_backend_url = store_url
        return {"base": Singleton}
    if kind == "heimdall":
        from celery_heimdall import HeimdallTask  # type: ignore[import-not-found]

        # Its default waits for the lock, most of a second for each run.
        return {
            "base": HeimdallTask,
            "heimdall": {"unique": True, "unique_lock_blocking": False},
        }
    from celery_resilience import Resilience, ResilientTask

    app.conf.resilience_store_url = store_url
    Resilience(app)
    if kind == "no_key":
        return {"base": ResilientTask}
    return {
        "base": ResilientTask,
        "idempotency_key": "bench:{number}",
        "unique_enqueue": kind == "reserved",
    }


def nothing(number: int, is_marked: bool) -> None:
    """Do nothing; say when, if asked."""
    if is_marked:
        _client().rpush(MARKS, f"{time.monotonic()} {time.process_time()}")


@cache
def _client() -> Any:
    return Redis.from_url(os.environ["BENCH_BROKER_URL"])


def main() -> None:
    """Send the calls of a block for each line read."""
    task = app.tasks["nothing"]
    # Another sender's calls have others.
    numbers = itertools.count(os.getpid() * 10_000_000)
    for line in sys.stdin:
        count = int(line)
        start = busy = 0.0
        for place in range(-WARM_UP, count):
            if place == 0:
                start, busy = time.perf_counter(), time.process_time()
            task.apply_async((next(numbers), place in (0, count - 1)))
        seconds = (time.perf_counter() - start, time.process_time() - busy)
        print(*(s / count for s in seconds), flush=True)


if "BENCH_KIND" in os.environ:
    app = make_app(
        os.environ["BENCH_BROKER_URL"],
        os.environ["BENCH_KIND"],
        os.environ["BENCH_STORE_URL"],
    )

if __name__ == "__main__":
    main()
