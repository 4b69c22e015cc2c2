"""The app that tests run: every task misbehaves in one way, and tells a ledger.

`make_app` is called by the test, and by `fleet_worker` in the worker.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import batch_tasks
import circuit_tasks
import keyed_tasks
import memory_tasks
import metric_tasks
import retry_tasks
import stream_tasks
from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject
from kombu import Exchange, Queue
from kombu.common import Broadcast
from retrying import SOON_S

from celery_resilience import Resilience, ResilientTask, Skip, Snooze


class Unpicklable(Exception):
    """Holds what no pickle takes."""

    def __init__(self, what: str, more: str) -> None:
        super().__init__(what)
        self.handle = lambda: more


class Hostile(Exception):
    """Raises when it is asked for its text."""

    def __str__(self) -> str:
        raise RuntimeError("no text for you")

    __repr__ = __str__


class Unheard(BaseException):
    """Not an Exception."""


def make_app(conf: dict[str, Any], *, is_plain: bool = False) -> Celery:
    """
    An app with the tasks below.

    Args:
        conf: Celery's and our settings; and `fleet_queues`, the arguments of
            queues by their names, each bound to a topic exchange of its name; and
            `fleet_broadcast`, what every worker listens to besides; and
            `fleet_database`, see `session_tasks`; and `fleet_log`, see `log_tasks`; and
            `fleet_databases`, several of them by the prefixes of their tasks; and
            `fleet_constants`, see `fleet_worker`.
        is_plain: Without celery-resilience, for comparison.
    """
    app = Celery("fleet", set_as_current=False)
    app.conf.update({k: v for k, v in conf.items() if not k.startswith("fleet_")})
    queues: dict[str, dict[str, Any]] = conf.get("fleet_queues", {})
    if queues:
        app.conf.task_queues = [
            Queue(name, Exchange(name, type="topic"), name, queue_arguments=arguments)
            for name, arguments in queues.items()
        ]
    if "fleet_broadcast" in conf:
        default = app.conf.task_default_queue
        app.conf.task_queues = [
            Queue(default, Exchange(default), default),
            Broadcast(conf["fleet_broadcast"]),
        ]
    base: Any = Task if is_plain else ResilientTask
    if not is_plain:
        Resilience(app)
    _register(app, base)
    keyed_tasks.register(app, base, note)
    stream_tasks.register(app, base, note)
    memory_tasks.register(app, base, note, conf)
    if "fleet_database" in conf and conf.get("fleet_is_late"):
        _register_late(app, base, conf)
    elif "fleet_database" in conf:
        import session_tasks

        session_tasks.register(app, base, note, conf)
    if "fleet_log" in conf:
        import log_tasks

        log_tasks.register(app, base, conf["fleet_log"])
    for prefix, database in conf.get("fleet_databases", {}).items():
        import session_tasks

        session_tasks.register(app, base, note, database, prefix)
    if not is_plain:
        circuit_tasks.register(app, base, note)
        batch_tasks.register(app, base, note)
        metric_tasks.register(app, base, conf)
        retry_tasks.register(app, base, note)
    return app


def _register_late(app: Celery, base: Any, conf: dict[str, Any]) -> None:
    """Tasks whose bodies are the first to import SQLAlchemy."""
    apps: list[Any] = []

    def late(name: str, *args: Any) -> Any:
        if not apps:
            import session_tasks

            apps.append(Celery("late", set_as_current=False))
            session_tasks.register(apps[0], Task, note, conf)
        return apps[0].tasks[name].run(*args)

    @app.task(base=base, name="late", shared=False)
    def task(name: str, *args: Any) -> Any:
        return late(name, *args)


def note(event: str, *facts: Any) -> None:
    """Append a line to the ledger; it is written when its end is."""
    line = json.dumps([event, *facts]) + "\n"
    ledger = os.environ.get("FLEET_LEDGER")
    if ledger:
        descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def marks_of(task: Any) -> dict[str, Any]:
    """What celery-resilience has written on the message of a running task."""
    found: dict[str, Any] = getattr(task.request, "resilience", None) or {}
    return found


def _register(app: Celery, base: Any) -> None:
    def task(**options: Any) -> Any:
        return app.task(base=base, bind=True, shared=False, **options)

    def started(self: Any) -> None:
        note(self.name, self.request.id, self.request.retries)

    @task(name="ok")
    def ok(self: Any, value: Any = None, **_: Any) -> Any:
        started(self)
        return value

    @task(name="small", max_message_kib=16)
    def small(self: Any, value: Any = None) -> None:
        started(self)
        note("value", self.request.id, value)

    @task(name="small_retry", max_message_kib=16)
    def small_retry(self: Any, value: Any = None) -> None:
        started(self)
        raise self.retry(args=("x" * 20_000,), countdown=SOON_S)

    @task(name="add")
    def add(self: Any, x: int, y: int) -> int:
        started(self)
        return x + y

    @task(name="boom")
    def boom(self: Any, what: str = "boom", password: str = "") -> None:
        started(self)
        raise ValueError(f"{what} {password}".strip())

    @task(name="boom_unless")
    def boom_unless(self: Any, path: str, value: Any = None) -> Any:
        started(self)
        if not Path(path).exists():
            raise ValueError("not yet")
        note("effect", self.request.id)
        return value

    # Untold: a ledger's line is JSON, which knows no UUID.
    @task(name="boom_unless_untold")
    def boom_unless_untold(self: Any, path: str) -> None:
        if not Path(path).exists():
            raise ValueError("not yet")

    @task(name="busy_untold")
    def busy_untold(self: Any, run: str, end: str) -> None:
        Path(run).touch()
        _busy(60, end)

    @task(name="skipped_untold")
    def skipped_untold(self: Any) -> None:
        raise Skip("nothing to do")

    @task(name="unpicklable")
    def unpicklable(self: Any) -> None:
        started(self)
        raise Unpicklable("cannot be pickled", "at all")

    @task(name="hostile")
    def hostile(self: Any) -> None:
        started(self)
        raise Hostile

    @task(name="odd_text")
    def odd_text(self: Any) -> None:
        started(self)
        raise ValueError("nul \0 surrogate \ud800 escape \x1b[31m bell \a")

    @task(name="huge_text")
    def huge_text(self: Any) -> None:
        started(self)
        raise ValueError("x" * 5_000_000)

    @task(name="memory_error")
    def memory_error(self: Any) -> None:
        started(self)
        raise MemoryError("none left")

    @task(name="system_exit")
    def system_exit(self: Any) -> None:
        started(self)
        sys.exit(3)

    @task(name="keyboard_interrupt")
    def keyboard_interrupt(self: Any) -> None:
        started(self)
        raise KeyboardInterrupt("not from a keyboard")

    @task(name="unheard")
    def unheard(self: Any) -> None:
        started(self)
        raise Unheard("of")

    @signals.task_postrun.connect(weak=False)
    def slow_to_end(sender: Any = None, task_id: str = "", **_: Any) -> None:
        if sender.app is app and sender.name.startswith("slow_to_end"):
            note("ending", task_id)
            _busy(60)

    @task(name="slow_to_end")
    def slow_to_end_early(self: Any) -> None:
        started(self)

    @task(name="slow_to_end_limited", time_limit=1)
    def slow_to_end_limited(self: Any) -> None:
        started(self)

    @task(name="killed_if", acks_late=True)
    def killed_if(self: Any, path: str) -> None:
        started(self)
        if Path(path).exists():
            os.kill(os.getpid(), signal.SIGKILL)

    @task(name="hard_limit", time_limit=1)
    def hard_limit(self: Any) -> None:
        started(self)
        _busy(60)

    @task(
        name="hard_limit_unacked",
        time_limit=1,
        acks_late=True,
        acks_on_timeout=False,
        acks_on_failure_or_timeout=False,
        acks_on_failure=True,
    )
    def hard_limit_unacked(self: Any) -> None:
        started(self)
        _busy(60)

    @task(name="soft_limit", soft_time_limit=1)
    def soft_limit(self: Any) -> None:
        started(self)
        _busy(60)

    @task(name="killed_early", acks_late=False)
    def killed_early(self: Any) -> None:
        started(self)
        os.kill(os.getpid(), signal.SIGKILL)

    @task(name="killed_late", acks_late=True)
    def killed_late(self: Any) -> None:
        started(self)
        os.kill(os.getpid(), signal.SIGKILL)

    @task(name="killed_once", acks_late=True)
    def killed_once(self: Any, path: str) -> str:
        started(self)
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    @task(name="killed_then_sleeps", acks_late=True)
    def killed_then_sleeps(self: Any, path: str, seconds: float) -> None:
        started(self)
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        note("alone", self.request.id)
        _busy(seconds)
        note("slept", self.request.id)

    @task(name="killed_when", acks_late=True)
    def killed_when(self: Any, path: str) -> None:
        started(self)
        if not Path(f"{path}.once").exists():
            _busy(60, path)
            Path(f"{path}.once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        note("slept", self.request.id)

    @task(name="exits_late", acks_late=True, reject_on_worker_lost=True)
    def exits_late(self: Any) -> None:
        started(self)
        os._exit(0)

    @task(name="killed_no_rerun", acks_late=True, reject_on_worker_lost=False)
    def killed_no_rerun(self: Any) -> None:
        started(self)
        os.kill(os.getpid(), signal.SIGKILL)

    @task(name="kills_worker", acks_late=True)
    def kills_worker(self: Any, main_pid_file: str) -> None:
        started(self)
        os.kill(int(Path(main_pid_file).read_text()), signal.SIGKILL)
        _busy(60)

    @task(name="requeued_until", acks_late=True)
    def requeued_until(self: Any, path: str) -> str:
        started(self)
        if not Path(path).exists():
            raise Reject("not yet", requeue=True)
        return "done"

    @task(name="ignored")
    def ignored(self: Any) -> None:
        started(self)
        raise Ignore

    @task(name="rejected", acks_late=True)
    def rejected(self: Any) -> None:
        started(self)
        raise Reject("not for me", requeue=False)

    @task(name="rejected_unless", acks_late=True)
    def rejected_unless(self: Any, path: str) -> None:
        started(self)
        if not Path(path).exists():
            raise Reject("not yet", requeue=False)
        note("effect", self.request.id)

    @task(name="killed_unless", acks_late=True, reject_on_worker_lost=True)
    def killed_unless(self: Any, path: str) -> None:
        started(self)
        if not Path(path).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        note("effect", self.request.id)

    @task(name="requeued_once", acks_late=True)
    def requeued_once(self: Any, path: str) -> str:
        started(self)
        if not Path(path).exists():
            Path(path).touch()
            raise Reject("again", requeue=True)
        return "done"

    @task(name="skipped")
    def skipped(self: Any) -> None:
        started(self)
        raise Skip("nothing to do", result=42)

    @task(
        name="skipped_with_autoretry",
        autoretry_for=(Exception,),
        max_retries=2,
        retry_backoff=False,
        default_retry_delay=SOON_S,
    )
    def skipped_with_autoretry(self: Any) -> None:
        started(self)
        raise Skip("nothing to do", result=42)

    @task(
        name="snoozed_with_autoretry",
        acks_late=True,
        autoretry_for=(Exception,),
        max_retries=0,
        retry_backoff=False,
    )
    def snoozed_with_autoretry(self: Any) -> str:
        started(self)
        if "snoozes" not in marks_of(self):
            raise Snooze(0.1, "later")
        return "awake"

    @task(name="snoozed", acks_late=True)
    def snoozed(self: Any) -> str:
        started(self)
        if marks_of(self).get("snoozes", 0) < 2:
            raise Snooze(0.5, "later")
        return "awake"

    @task(name="snoozed_by_retries", acks_late=True)
    def snoozed_by_retries(self: Any) -> str:
        started(self)
        if self.request.retries < 5:
            raise Snooze(0.0, "later")
        return "awake"

    @task(name="snoozed_for", acks_late=True)
    def snoozed_for(self: Any, countdown_s: float) -> str:
        started(self)
        if not marks_of(self).get("snoozes"):
            raise Snooze(countdown_s, "later")
        return "awake"

    @task(name="retried_once", max_retries=3)
    def retried_once(self: Any) -> str:
        started(self)
        if self.request.retries == 0:
            raise self.retry(exc=ValueError("first"), countdown=1)
        return "second"

    @task(name="retries_spent", max_retries=1)
    def retries_spent(self: Any) -> None:
        started(self)
        try:
            raise ValueError("every time")
        except ValueError as exc:
            raise self.retry(exc=exc, countdown=1) from exc

    @task(
        name="autoretries_spent",
        autoretry_for=(ValueError,),
        max_retries=1,
        retry_backoff=False,
        default_retry_delay=1,
    )
    def autoretries_spent(self: Any) -> None:
        started(self)
        raise ValueError("every time, by itself")

    @task(name="retried_with_headers", max_retries=1)
    def retried_with_headers(self: Any, path: str) -> None:
        started(self)
        if not Path(path).exists():
            raise ValueError("not yet")
        if self.request.retries == 0:
            raise self.retry(countdown=SOON_S, headers={"x-mine": "kept"})
        note("effect", self.request.id, self.request.headers["x-mine"])

    @task(name="replaced")
    def replaced(self: Any, path: str, end: str, how: str) -> None:
        started(self)
        if not Path(path).exists():
            raise ValueError("not yet")
        heir = app.tasks["fail_when"].si(end)
        raise self.replace(app.tasks["ok"].si() | heir if how == "chain" else heir)

    @task(name="sleep", acks_late=True)
    def sleep(self: Any, seconds: float, end: str = "") -> str:
        started(self)
        _busy(seconds, end)
        note("slept", self.request.id)
        return "slept"

    @task(name="sleep_early", acks_late=False)
    def sleep_early(self: Any, seconds: float, end: str = "") -> str:
        started(self)
        _busy(seconds, end)
        note("slept", self.request.id)
        return "slept"

    @task(name="deaf", acks_late=True)
    def deaf(self: Any, seconds: float, end: str = "") -> None:
        started(self)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not Path(end).exists():
            with contextlib.suppress(BaseException):
                _busy(1, end)

    @task(name="until_stopping", acks_late=True)
    def until_stopping(self: Any, seconds: float, end: str = "") -> None:
        started(self)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.resilience.stopping:
            time.sleep(0.02)
        note("slept", self.request.id)

    @task(name="fail_when", acks_late=True)
    def fail_when(self: Any, end: str) -> None:
        started(self)
        _busy(60, end)
        note("failing", self.request.id)
        raise ValueError("it was time")

    @task(name="fail_when_early", acks_late=False)
    def fail_when_early(self: Any, end: str) -> None:
        started(self)
        _busy(60, end)
        note("failing", self.request.id)
        raise ValueError("it was time")

    @task(name="retry_when", acks_late=True, max_retries=3)
    def retry_when(self: Any, end: str) -> None:
        started(self)
        _busy(60, end)
        note("failing", self.request.id)
        raise self.retry(exc=ValueError("it was time"), countdown=1)

    @task(name="die_when", acks_late=True)
    def die_when(self: Any, end: str) -> None:
        started(self)
        if not Path(end).exists():
            _busy(60, end)
            note("ending", self.request.id)
            os.kill(os.getpid(), signal.SIGKILL)
        note("effect", self.request.id)

    def snoozing(self: Any, end: str) -> None:
        started(self)
        if not Path(end).exists():
            _busy(60, end)
            note("ending", self.request.id)
            raise Snooze(1)
        note("effect", self.request.id)

    task(name="snooze_when", acks_late=True)(snoozing)
    task(name="snooze_when_early", acks_late=False)(snoozing)

    @task(name="errback")
    def errback(self: Any, *_: Any) -> None:
        note("errback", self.request.id)

    @task(name="not_kept", failed_queue=False)
    def not_kept(self: Any) -> None:
        started(self)
        raise ValueError("nobody wants to know")

    @task(name="kept_apart", failed_queue="apart.failed")
    def kept_apart(self: Any) -> None:
        started(self)
        raise ValueError("in a queue of its own")

    @task(name="row_of_its_own", acks_late=True, reject_on_worker_lost=True)
    def effect(self: Any, url: str, number: int, is_keyed: bool) -> Any:
        from effects import have_effect

        return have_effect(url, number, is_keyed=is_keyed)

    @task(name="expected", throws=(LookupError,))
    def expected(self: Any) -> None:
        started(self)
        raise LookupError("as it may be")

    @task(name="telltale", acks_late=True, redact=["pin_of_customer"], max_retries=1)
    def telltale(
        self: Any, how: str, password: str, customer: Any, pin_of_customer: str
    ) -> None:
        started(self)
        secrets = f"{password} {customer['card_number']} {pin_of_customer}"
        logging.getLogger("shop").error("about to fail with %s", secrets)
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "retry" and not self.request.retries:
            raise self.retry(exc=ValueError(secrets), countdown=SOON_S)
        raise ValueError(secrets)

    @task(name="hidden", redact=["iban_of_customer"])
    def hidden(self: Any, iban_of_customer: str, note: str = "") -> None:
        raise ValueError(f"cannot charge {iban_of_customer}")


def _busy(seconds: float, end: str = "") -> None:
    """Take time; ends early when the file *end* appears."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (end and Path(end).exists()):
        time.sleep(0.02)
