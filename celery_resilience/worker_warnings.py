"""What a worker says at its start of what is weaker there than it should be."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from celery_resilience import _celery, _celery_worker
from celery_resilience.errors import ResilienceError
from celery_resilience.forks import thread_gate
from celery_resilience.install import Installation
from celery_resilience.task import ResilientTask

logger = logging.getLogger("celery_resilience.worker")

#: RabbitMQ's `consumer_timeout` where nobody has set another, since 3.8.17.
CONSUMER_TIMEOUT_S = 1_800.0

#: kombu's own for Redis (``kombu/transport/redis.py``), where nobody has set another.
VISIBILITY_TIMEOUT_S = 3_600.0


class WorkerWarnings:
    """
    The warnings of one worker.

    Args:
        installation: What is installed in its app.
    """

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._app = installation.app

    def sentences(self) -> list[str]:
        """What is weaker here than it should be."""
        found = []
        weak_doors = _celery_worker.missing_doors(_celery_worker.OTHER_DOORS)
        if weak_doors:
            found.append(
                f"this release of Celery lacks {', '.join(weak_doors)}: "
                f"{len(weak_doors)} promises are weaker"
            )
        method = getattr(self._app.conf, "worker_pool_start_method", None) or "fork"
        if method != "fork":
            found.append(
                f"worker_pool_start_method is {method!r}: children cannot tell this "
                "process what only they know, so that Skip counts as succeeded, "
                "retries_exhausted as exception, an exception that cannot be pickled "
                "by its wrapper, and whole-worker deaths do not add to a child's crashes"
            )
        with self._app.connection_for_read() as connection:
            is_amqp = connection.transport.driver_type == "amqp"
        too_long = sorted(
            f"{task.name} ({limit:.0f} s)"
            for task in self._app.tasks.values()
            if isinstance(task, ResilientTask)
            and task.acks_late
            and (limit := _celery.time_limit_of(task) or 0) > CONSUMER_TIMEOUT_S
        )
        if is_amqp and too_long:
            found.append(
                "RabbitMQ closes the channel of a message that is unacknowledged for "
                f"{CONSUMER_TIMEOUT_S / 60:.0f} minutes, unless its consumer_timeout is "
                "longer, and delivers it again; these late-acked tasks may run longer: "
                f"{', '.join(too_long)}"
            )
        return found + self._weak_keys()

    def _keyed_tasks(self) -> list[ResilientTask]:
        return [
            task
            for task in self._app.tasks.values()
            if isinstance(task, ResilientTask) and task.has_key
        ]

    def look_at_key_store(self) -> None:
        """Warn of a store that may forget keys; a thread of its own, as it may be slow."""
        if self._keyed_tasks():
            threading.Thread(target=self._look_at_key_store, daemon=True).start()

    def _look_at_key_store(self) -> None:
        try:
            with thread_gate.inside():
                store = self._installation.key_store()
                for weakness in () if store is None else store.weaknesses():
                    logger.warning("idempotency keys may be forgotten: %s", weakness)
        except ResilienceError as exc:
            logger.warning("idempotency keys: %s", exc)

    def _weak_keys(self) -> list[str]:
        """Tasks whose idempotency key holds less than it seems."""
        keyed = self._keyed_tasks()
        found = []
        if keyed and self._installation.store_choice.url is None:
            waits = self._installation.settings.if_store_down == "wait"
            found.append(
                "there is no store for idempotency keys "
                f"({self._installation.store_choice.why}), and tasks that have one "
                f"{'wait until there is' if waits else 'run without'}: {_names(keyed)}"
            )
        if early := [task for task in keyed if not task.acks_late]:
            found.append(
                "these tasks have an idempotency key and acks_late = False: a run that "
                "is cut off is not delivered again, and its key may stay in doubt until "
                f"its lease lapses: {_names(early)}"
            )
        visible_s = visibility_timeout_s(self._app)
        if self._app.connection_for_read().transport.driver_type == "redis" and (
            long := [t for t in keyed if t.idempotency_lease_s > visible_s / 2]
        ):
            found.append(
                "these tasks have an idempotency_lease_s above half the visibility "
                f"timeout of {visible_s:.0f} s: what a killed worker had is delivered "
                f"again, and waits for the lease: {_names(long)}"
            )
        return found


def visibility_timeout_s(app: Any) -> float:
    """Seconds after which Redis delivers an unacknowledged message again."""
    options = app.conf.broker_transport_options or {}
    return float(options.get("visibility_timeout") or VISIBILITY_TIMEOUT_S)


def _names(tasks: Iterable[ResilientTask]) -> str:
    return ", ".join(sorted(task.name for task in tasks))
