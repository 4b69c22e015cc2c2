"""Around a task body: what it takes of databases is clean before and after it."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from celery import signals

from celery_resilience.errors import LeftBehind
from celery_resilience.events import emit
from celery_resilience.redaction import safe_text
from celery_resilience.sessions import resources
from celery_resilience.sessions.policy import Leak
from celery_resilience.sessions.run import Run, current

logger = logging.getLogger("celery_resilience.sessions")

#: Modules with which a library is there to be listened to.
SQLALCHEMY, ORM, DJANGO = "sqlalchemy", "sqlalchemy.orm", "django.db"


class Sessions:
    """
    The room around each body of a resilient task, in every process that runs one.

    Args:
        is_strict: A body that leaves something behind, and returns, is failed.
        keeps: Connections of Django's are kept for the next task of this thread; not
            where each task has a greenlet of its own.
    """

    def __init__(self, *, is_strict: bool = False, keeps: bool = True) -> None:
        self._is_strict = is_strict
        self._keeps = keeps
        self._sqlalchemy: Any = None
        self._hears_orm = False
        self._django: Any = None
        self._has_signals = False
        self._has_failed = False
        self._running = 0
        self.attach()
        os.register_at_fork(before=self.attach)
        signals.worker_process_shutdown.connect(
            _on_process_shutdown,
            weak=False,
            dispatch_uid="celery_resilience.sessions",
        )

    def attach(self) -> None:
        """Listen to the libraries that this process has imported by now."""
        try:
            self._attach()
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                logger.exception("a library cannot be listened to (told once)")

    def _attach(self) -> None:
        if self._sqlalchemy is None and SQLALCHEMY in sys.modules:
            from celery_resilience.sessions import sqlalchemy_runs

            sqlalchemy_runs.attach(self.hear_results)
            self._sqlalchemy = sqlalchemy_runs
        # Which our stores do not import: it takes a third of what SQLAlchemy does.
        if not self._hears_orm and ORM in sys.modules:
            self._sqlalchemy.attach_sessions()
            self._hears_orm = True
        if self._django is None and DJANGO in sys.modules:
            from celery_resilience.sessions import django_runs

            if django_runs.attach(self.hear_results):
                self._django = django_runs

    def hear_results(self) -> None:
        """
        A library is used: hear of each result from now on.

        The signal costs each run some microseconds, also those of other tasks.
        """
        if not self._has_signals:
            self._has_signals = True
            uid = "celery_resilience.sessions"
            signals.task_postrun.disconnect(dispatch_uid=uid)
            signals.task_postrun.connect(
                self.after_result, weak=False, dispatch_uid=uid
            )

    def before(self, task: Any, request: Any) -> None:
        """The body starts with nothing of another run."""
        run = current.get()
        self._running += 1
        try:
            if run is not None and run.name:
                # Nobody has told of its end.
                self._end(run)
            if self._django is not None:
                self._django.before_body()
        except Exception:
            logger.exception("%s: what came before it could not be cleaned", task.name)
        if run is None or run.name:
            current.set(Run(task.name, request.id))
        else:
            # What a receiver of task_prerun has begun is this body's.
            run.begin(task.name, request.id)

    def after(self, task: Any, request: Any, exc: BaseException | None) -> None:
        """
        The body has ended: what it has left is rolled back and told of.

        Raises:
            LeftBehind: In strict mode, where the body had returned.
        """
        self._running -= 1
        run = current.get()
        if run is None:
            return
        run.is_running = False
        if (
            (self._sqlalchemy is None and SQLALCHEMY in sys.modules)
            or (not self._hears_orm and ORM in sys.modules)
            or (self._django is None and DJANGO in sys.modules)
        ):
            self._first_look(run)
        if not run.libraries and not run.resources and self._django is None:
            return
        leaks: list[Leak] = []
        try:
            if run.resources:
                resources.close_all(run)
            if SQLALCHEMY in run.libraries:
                leaks += self._sqlalchemy.end_body(run.libraries[SQLALCHEMY])
            if self._django is not None and self._django.has_connections():
                leaks += self._django.end_body(keeps=self._keeps)
        except Exception:
            logger.exception("%s: what it has left could not be cleaned", task.name)
        if leaks:
            self._tell(run, leaks, exc)

    def after_result(self, sender: Any = None, task_id: Any = None, **_: Any) -> None:
        """The result is stored: what came after the body is cleaned too."""
        run = current.get()
        if run is None:
            return
        # One without a name has what was done around a body that did not run.
        is_others = run.task_id != task_id if run.name else sender.request.is_eager
        if is_others:
            return  # applied within this one, and perhaps the very same task
        try:
            if run.libraries or self._django is not None:
                self._end(run)
        except Exception:
            logger.exception("%s: what came after it could not be cleaned", run.name)
        current.set(None)

    def _end(self, run: Run) -> None:
        if SQLALCHEMY in run.libraries:
            self._sqlalchemy.end_run(run.libraries.pop(SQLALCHEMY))
        if self._django is not None and self._django.has_connections():
            self._django.end_body(keeps=self._keeps)

    def _first_look(self, run: Run) -> None:
        """A body may be the first to import a library: it was not listened to."""
        was_heard = self._hears_orm
        self.attach()
        if not was_heard and self._hears_orm and self._running == 0:
            # No other body runs here, so that every session is this one's.
            self._sqlalchemy.end_all_sessions()

    def _tell(self, run: Run, leaks: list[Leak], exc: BaseException | None) -> None:
        """
        Tell of a body that has returned, and left something.

        One that has raised was cut off in what it did, and is told of as a failure.

        Raises:
            LeftBehind: In strict mode.
        """
        told = "; ".join(map(str, leaks))
        level = logging.WARNING if exc is None else logging.INFO
        logger.log(
            level, "task %s[%s] left behind: %s", run.name, safe_text(run.task_id), told
        )
        emit(
            "sessions.leaked",
            task=run.name,
            task_id=run.task_id,
            leaks=[
                {"kind": leak.kind, "open_s": leak.open_s, "where": leak.where}
                for leak in leaks
            ],
            has_raised=exc is not None,
        )
        if self._is_strict and exc is None:
            raise LeftBehind(f"the task left behind: {told}")


def _on_process_shutdown(**_: Any) -> None:
    # A child of a prefork pool ends without Python's own exit.
    resources.close_shared()
