"""FailedTasks(app): the Python side of `celery -A shop failed`."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from celery_resilience.delivery.publisher import Publisher
from celery_resilience.errors import ConfigurationError, NotFound
from celery_resilience.failed.collector import Collected, Collector
from celery_resilience.failed.filters import (
    Filter,
    parse_reason,
    parse_state,
    parse_time,
)
from celery_resilience.failed.inbox import open_inboxes
from celery_resilience.failed.record import FailedTask, State
from celery_resilience.failed.replay import Replayer, ReplayReport
from celery_resilience.failed.spool import Spool
from celery_resilience.failed.store import FailedTaskStore
from celery_resilience.install import installation_of

#: A time as an age ("2h"), ISO 8601, or a Python object.
When = str | float | datetime | timedelta | None


class FailedTasks:
    """
    The failed tasks of an app.

    Every call collects first what waits in the failed queues, so that one can
    start without a collector.

    Args:
        app: The Celery app.
        collects: False leaves the failed queues alone.

    Raises:
        ConfigurationError: The app has no store, or celery-resilience is not
            installed in it.
    """

    def __init__(self, app: Any, *, collects: bool = True) -> None:
        self._installation = installation_of(app)
        settings = self._installation.settings
        store = self._installation.failed_store()
        if store is None:
            raise ConfigurationError(
                "resilience_store_url is not set and no store was found: "
                f"{self._installation.store_choice.why}"
            )
        self._app = app
        self._store: FailedTaskStore = store
        self._collects = collects
        self._publisher = Publisher(app)
        self._replayer = Replayer(
            self._store,
            self._publisher.publish,
            is_followed=self._is_followed,
        )
        self._collector = Collector(
            self._store,
            namespace=settings.namespace,
            clock=time.time,
            spool=None if settings.spool_dir is None else Spool(settings.spool_dir),
            resend=self._replayer,
        )

    def collect(self) -> Collected:
        """
        Move what waits in the failed queues and the spool into the store.

        Raises:
            StoreUnavailable: Nothing of the last batch was acknowledged.
            OSError: The broker did not answer.
        """
        queues = self._installation.failed_queues()
        with open_inboxes(self._app, queues) as inboxes:
            return self._collector.collect(inboxes)

    def list(
        self,
        *,
        task: str | None = None,
        queue: str | None = None,
        failed_queue: str | None = None,
        exception: str | None = None,
        message: str | None = None,
        reason: str | None = None,
        group: str | None = None,
        since: When = None,
        until: When = None,
        state: str | None = State.UNRESOLVED,
        release: str | None = None,
        worker: str | None = None,
        args: Sequence[tuple[str, str]] = (),
        limit: int | None = 50,
    ) -> builtins.list[FailedTask]:
        """
        Failed tasks that match every word, last failed first.

        Args:
            task, exception, worker: Globs.
            since, until: When it failed last.
            state: "all" for every one.
            limit: At most so many; None for all, in memory.

        Raises:
            ConfigurationError: A word is not known.
        """
        now = time.time()
        wanted = Filter(
            task=task,
            queue=queue,
            failed_queue=failed_queue,
            exception=exception,
            message=message,
            reason=parse_reason(reason),
            group=group,
            since=parse_time(since, now),
            until=parse_time(until, now),
            state=parse_state(state, None),
            release=release,
            worker=worker,
            args=tuple(args),
        )
        self._collect_first()
        found = (self._store.get(s.id) for s in self._store.list(wanted, limit=limit))
        return [failure for failure in found if failure is not None]

    def get(self, id: str) -> FailedTask:
        """
        One failed task by its id, the start of it, or its task id.

        Raises:
            NotFound: There is none, or more than one.
        """
        self._collect_first()
        found = self._store.get(self.resolve(id))
        if found is None:
            raise NotFound(f"there is no failed task {id!r}")
        return found

    def resolve(self, start: str) -> str:
        """
        The whole id for the start of one, or for a task id.

        Raises:
            NotFound: There is none, or more than one.
        """
        ids = self._store.resolve(start)
        if not ids:
            raise NotFound(f"there is no failed task {start!r}")
        if len(ids) > 1:
            raise NotFound(f"{start!r} is the start of more than one id: write more")
        return ids[0]

    def replay(
        self,
        ids: Sequence[str] = (),
        *,
        wanted: Filter | None = None,
        group: str | None = None,
        to_queue: str | None = None,
        new_id: bool = False,
        limit: int | None = None,
        dry_run: bool = False,
        on_progress: Callable[[ReplayReport], None] | None = None,
    ) -> ReplayReport:
        """
        Send failed tasks' messages again.

        Args:
            ids: These, whole or shortened.
            wanted: Those that match, as of now.
            group: Those of a fingerprint.
            dry_run: Send nothing; the report's `skipped` are the ids.

        Raises:
            NotFound: One of *ids* is not known; nothing was sent.
            BrokerUnavailable: The broker went away; what was claimed and not
                sent is sent by whoever collects a minute later.
        """
        self._collect_first()
        chosen = [self.resolve(id) for id in ids]
        if wanted is not None or group is not None:
            frozen = replace(
                wanted or Filter(),
                state=State.UNRESOLVED,
                group=group or (wanted.group if wanted else None),
            )
            chosen += self.matching(frozen, limit=limit)
        chosen = list(dict.fromkeys(chosen))[:limit]
        if dry_run:
            return ReplayReport(skipped=chosen)
        return self._replayer.replay(
            chosen, to_queue=to_queue, new_id=new_id, on_progress=on_progress
        )

    def matching(
        self, wanted: Filter, *, limit: int | None = None
    ) -> builtins.list[str]:
        """The ids that match now; what fails later is not among them."""
        cutoff = time.time() if wanted.until is None else wanted.until
        frozen = replace(wanted, until=cutoff)
        return [summary.id for summary in self._store.list(frozen, limit=limit)]

    def discard(self, ids: Sequence[str]) -> int:
        """Mark unresolved ones as never to be replayed; returns how many were."""
        return self._store.discard(ids)

    def reopen(self, ids: Sequence[str]) -> int:
        """Undo a discard, or give up a replay that never came back."""
        return self._store.reopen(ids)

    def stats(self) -> dict[str, Any]:
        """Counts by state, and of the unresolved by reason, task and age."""
        self._collect_first()
        return dict(self._store.stats())

    @property
    def store(self) -> FailedTaskStore:
        """Where failed tasks are kept."""
        return self._store

    def close(self) -> None:
        """Close the connection to the broker."""
        self._publisher.close()

    def _collect_first(self) -> None:
        if self._collects:
            self.collect()

    def _is_followed(self, task_name: str) -> bool:
        # A task that this process does not know may well be resilient there.
        known = task_name in self._app.tasks
        return not known or self._installation.is_resilient(task_name)
