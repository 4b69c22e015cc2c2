"""FailedTasks(app): the Python side of `celery -A shop failed`."""

from __future__ import annotations

import builtins
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from celery_resilience._kombu import lost_connection_errors
from celery_resilience.errors import BrokerUnavailable, ConfigurationError, NotFound
from celery_resilience.failed import transfer
from celery_resilience.failed.archive import Archive, dump_line
from celery_resilience.failed.caps import DAY_S, MIB, Caps, Trimmer
from celery_resilience.failed.collector import Collected, Collector
from celery_resilience.failed.envelope import dumps
from celery_resilience.failed.filters import (
    Filter,
    parse_reason,
    parse_state,
    parse_time,
)
from celery_resilience.failed.inbox import open_inboxes
from celery_resilience.failed.known_app import AppKnowledge
from celery_resilience.failed.record import FailedTask, State
from celery_resilience.failed.replay import Replayer, ReplayReport
from celery_resilience.failed.spool import Spool
from celery_resilience.failed.store import FailedTaskStore
from celery_resilience.failed.transfer import ImportReport
from celery_resilience.install import installation_of
from celery_resilience.publisher import Publisher

logger = logging.getLogger("celery_resilience.failed")

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
        self._installation.check_failed_queues()
        store = self._installation.failed_store()
        if store is None:
            raise ConfigurationError(
                f"there is no store: {self._installation.store_choice.why}"
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
        # Dead-letter queues that could not be read, which is said once.
        self._refused: set[str] = set()
        self._collector = Collector(
            self._store,
            app=AppKnowledge(app, settings.redact),
            namespace=settings.namespace,
            clock=time.time,
            spool=None if settings.spool_dir is None else Spool(settings.spool_dir),
            resend=self._replayer,
            trimmer=self._trimmer(),
        )

    def _trimmer(self) -> Trimmer:
        settings = self._installation.settings
        days, mib = settings.failed_keep_days, settings.failed_max_mib
        return Trimmer(
            self._store,
            Caps(
                keep_s=None if days is None else days * DAY_S,
                max_count=settings.failed_max,
                max_bytes=None if mib is None else int(mib * MIB),
            ),
            Archive(
                self._installation.archive_dir,
                namespace=settings.namespace,
                clock=time.time,
            ),
            clock=time.time,
        )

    def collect(self) -> Collected:
        """
        Move what waits in the failed queues and the spool into the store, and what
        waits in the queues of `resilience_collect_queues`.

        Raises:
            ConfigurationError: One of these is the queue that tasks are sent to.
            StoreUnavailable: Nothing of the last batch was acknowledged.
            BrokerUnavailable: It did not answer, or the connection broke; what is
                in the store is there, and nothing else was acknowledged.
            PublishRefused: The spool holds what the store did not take, or a
                replay whose sender had died could not be sent.
        """
        queues = self._installation.failed_queues()
        others = self._installation.collect_queues()
        connection = self._app.connection_for_read(heartbeat=0)
        try:
            with (
                connection,
                open_inboxes(connection, queues) as inboxes,
                open_inboxes(
                    connection, others, on_refused=self._say_refused
                ) as dead_letters,
            ):
                return self._collector.collect(inboxes, dead_letters)
        except lost_connection_errors(connection) as exc:
            said = f"{connection.as_uri()}: {type(exc).__name__}: {exc}"
            raise BrokerUnavailable(said) from exc
        finally:
            self._publisher.close()

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
        return [*self._store.get_many(self._ids(wanted, limit))]

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

    def resolve_all(
        self, starts: Sequence[str], *, missing: builtins.list[NotFound] | None = None
    ) -> builtins.list[str]:
        """
        The whole ids for *starts*, each once, in their order.

        Args:
            missing: Takes the errors; without it the first one is raised.

        Raises:
            NotFound: There is none for a start, or more than one.
        """
        known = self._store.known(starts)
        found: dict[str, None] = {}
        for start in starts:
            try:
                found[start if start in known else self.resolve(start)] = None
            except NotFound as exc:
                if missing is None:
                    raise
                missing.append(exc)
        return builtins.list(found)

    def replay(
        self,
        ids: Sequence[str] = (),
        *,
        wanted: Filter | None = None,
        group: str | None = None,
        to_queue: str | None = None,
        new_id: bool = False,
        force: bool = False,
        limit: int | None = None,
        dry_run: bool = False,
        report: ReplayReport | None = None,
        on_progress: Callable[[ReplayReport], None] | None = None,
    ) -> ReplayReport:
        """
        Send failed tasks' messages again.

        Args:
            ids: These, whole or shortened.
            wanted: Those that match, as of now.
            group: Those of a fingerprint.
            to_queue: Another queue than the original ones.
            new_id: Give each message a new task id.
            force: Run tasks whose idempotency key is done or interrupted, too.
            dry_run: Send nothing; the report's `would_send` are the ids.
            report: Filled in, also where an error breaks the replay off.

        Raises:
            NotFound: One of *ids* is not known; nothing was sent.
            BrokerUnavailable: The broker went away; the report's `in_doubt` may
                have been sent, and is sent again by whoever collects a minute later.
        """
        self._collect_first()
        chosen = self.resolve_all(ids)
        if wanted is not None or group is not None:
            frozen = replace(
                wanted or Filter(),
                state=State.UNRESOLVED,
                group=group or (wanted.group if wanted else None),
            )
            chosen += self.matching(frozen, limit=limit)
        chosen = builtins.list(dict.fromkeys(chosen))[:limit]
        if dry_run:
            return ReplayReport(would_send=chosen)
        try:
            return self._replayer.replay(
                chosen,
                to_queue=to_queue,
                new_id=new_id,
                force=force,
                report=report,
                on_progress=on_progress,
            )
        finally:
            self._publisher.close()

    def matching(
        self, wanted: Filter, *, limit: int | None = None
    ) -> builtins.list[str]:
        """The ids that match now; what fails later is not among them."""
        cutoff = time.time() if wanted.until is None else wanted.until
        frozen = replace(wanted, until=cutoff)
        return [*self._ids(frozen, limit)]

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

    def export(self, ids: Iterable[str], *, raw: bool = False) -> Iterator[bytes]:
        """
        Failed tasks as lines of JSON.

        Args:
            raw: Whole and unredacted, so that they may be imported; else as
                `FailedTask.to_dict()` shows them.
        """
        if raw:
            return map(dump_line, self._store.kept(ids))
        return (dumps(found.to_dict()) for found in self._store.get_many(ids))

    def import_lines(
        self, lines: Iterable[bytes], *, dry_run: bool = False
    ) -> ImportReport:
        """
        Take in what a raw export or an archive holds; what is there stays as it is.

        Raises:
            ConfigurationError: A line is not of a raw export; what came before it
                was imported.
        """
        return transfer.import_lines(self._store, lines, dry_run=dry_run)

    def prune(self, ids: Iterable[str], *, archive: Path | None = None) -> int:
        """
        Forget failed tasks that no replay is under way for; returns how many.

        Args:
            ids: Whole ids.
            archive: A new file, compressed, that takes them first.

        Raises:
            ConfigurationError: The file is there already.
            OSError: It could not be written; nothing was forgotten.
        """
        return transfer.prune(self._store, ids, archive=archive)

    @property
    def store(self) -> FailedTaskStore:
        """Where failed tasks are kept."""
        return self._store

    def _ids(self, wanted: Filter, limit: int | None) -> Iterator[str]:
        return (summary.id for summary in self._store.list(wanted, limit=limit))

    def _say_refused(self, queue: str, why: str) -> None:
        if queue not in self._refused:
            self._refused.add(queue)
            logger.warning(
                "%s of resilience_collect_queues is not collected: %s", queue, why
            )

    def _collect_first(self) -> None:
        if self._collects:
            self.collect()

    def _is_followed(self, task_name: str) -> bool:
        # A task that this process does not know may well be resilient there.
        known = task_name in self._app.tasks
        return not known or self._installation.is_resilient(task_name)
