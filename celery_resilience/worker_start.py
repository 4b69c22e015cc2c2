"""What a worker says of itself at its start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from celery_resilience import __version__
from celery_resilience.install import Installation
from celery_resilience.redaction import without_password


class Stops(Protocol):
    """What is said of how a worker ends: the room `lifecycle`."""

    def words(self) -> str: ...


class WorkerStart:
    """
    The first line of a worker, for an operator.

    Args:
        installation: What is installed in its app.
        worker: Celery's WorkController.
        failed_queues: The failed queues of the app.
        collect_queues: The broker's own dead-letter queues that are collected.
        collects: It also runs the collector.
        stops: How it ends.
    """

    def __init__(
        self,
        installation: Installation,
        worker: Any,
        *,
        failed_queues: Sequence[str],
        collect_queues: Sequence[str],
        collects: bool,
        stops: Stops,
    ) -> None:
        self._installation = installation
        self._worker = worker
        self._failed_queues = failed_queues
        self._collect_queues = collect_queues
        self._collects = collects
        self._stops = stops

    def facts(self) -> Mapping[str, Any]:
        """The same by name, for a log that is searched."""
        installation, settings = self._installation, self._installation.settings
        choice = installation.store_choice
        return {
            "version": __version__,
            "pid": os.getpid(),
            "worker": self._worker.hostname,
            "namespace": settings.namespace,
            "pool": self._pool,
            "concurrency": self._worker.concurrency,
            "queues": self._queues,
            "failed_queues": list(self._failed_queues),
            "collect_queues": list(self._collect_queues),
            "collects": self._collects,
            "store": choice.url and without_password(choice.url),
            "store_why": choice.why,
            "spool": settings.spool_dir and str(settings.spool_dir),
            "max_crashes": installation.max_crashes,
            "memory_recycle_mib": installation.memory_recycle_mib,
            "memory_limit_mib": installation.memory_limit_mib,
            "drain_timeout_s": installation.flag_or_setting("drain_timeout_s"),
            "release": settings.release,
        }

    def words(self) -> str:
        """In one line."""
        installation, settings = self._installation, self._installation.settings
        choice = installation.store_choice
        kept = (
            f"kept in {without_password(choice.url)} ({choice.why})"
            if choice.url
            else f"kept in no store ({choice.why})"
        )
        to = f"queue {', '.join(self._failed_queues)}, {kept}"
        spool = settings.spool_dir or "none: messages stay unacknowledged"
        others = ", ".join(self._collect_queues)
        return "; ".join(
            filter(
                None,
                [
                    f"{self._who()}: failed tasks of {settings.namespace!r} go to {to}",
                    f"spool {spool}",
                    f"at most {installation.max_crashes} crashes",
                    "collects here" if self._collects else "does not collect here",
                    others and f"dead-letter queues {others}",
                    self._memory(),
                    self._stops.words(),
                ],
            )
        )

    def _who(self) -> str:
        return (
            f"celery-resilience {__version__} (pid {os.getpid()}, {self._pool} "
            f"{self._worker.concurrency}, queues {', '.join(self._queues)})"
        )

    def _memory(self) -> str:
        recycle = self._installation.memory_recycle_mib
        limit = self._installation.memory_limit_mib
        return "; ".join(
            f"{what} {_with_unit(amount)}"
            for what, amount in (
                ("a child is recycled above", recycle),
                ("a run is ended above", limit),
            )
            if amount is not None
        )

    @property
    def _pool(self) -> str:
        """The pool's short name, such as prefork."""
        kind = self._worker.pool_cls
        module = kind if isinstance(kind, str) else kind.__module__
        name = module.rpartition(".")[2].partition(":")[0]
        return "threads" if name == "thread" else name

    @property
    def _queues(self) -> list[str]:
        return sorted(self._installation.app.amqp.queues.consume_from)


def _with_unit(amount: float | str) -> str:
    return amount if isinstance(amount, str) else f"{amount:g} MiB"
