"""Reads an app for `explain.py`, and what `celery resilience explain` prints.

Works for an app that has not adopted celery-resilience: nothing is installed,
and no broker or store is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import click

from celery_resilience import _celery
from celery_resilience.errors import ConfigurationError
from celery_resilience.explain import (
    MEANINGS,
    AppFacts,
    Fates,
    Keys,
    TaskExplained,
    TaskFacts,
    explain_task,
    summary_of,
)
from celery_resilience.install import Installation, installed_or_new
from celery_resilience.redaction import printable
from celery_resilience.task import ResilientTask

#: Cases, in the order of the columns.
CASES = ("on_failure", "on_dead_child", "on_dead_worker", "on_hard_limit")

DONE, REFUSED = 0, 2

#: Tasks that are named with a risk in the table; -o json names all.
NAMED = 3


def explain_app(app: Any) -> list[TaskExplained]:
    """
    What adopting changes, or has changed, for each task of *app*, by name.

    Raises:
        ConfigurationError: A setting is wrong, or an option of a circuit or a retry
            budget in one.
    """
    app.loader.import_default_modules()
    app.finalize()
    tasks = [app.tasks[name] for name in sorted(app.tasks)]
    installation = installed_or_new(app)
    installation.check_late_options()
    facts = app_facts(app, installation)
    return [
        explain_task(task_facts(task, installation), facts)
        for task in tasks
        if not task.name.startswith("celery.")
    ]


def app_facts(app: Any, installation: Installation) -> AppFacts:
    """What is asked of the app's configuration; no connection is made."""
    conf = app.conf
    timeout = (conf.broker_transport_options or {}).get("visibility_timeout")
    return AppFacts(
        driver=_driver(app),
        redelivered_after_s=None if timeout is None else float(timeout),
        pool=str(conf.worker_pool),
        is_enabled=installation.settings.enabled,
        has_store=installation.store_choice.url is not None,
    )


def _driver(app: Any) -> str:
    """kombu's word for the broker's kind; its library may be missing here."""
    with app.connection_for_read() as connection:
        try:
            driver = str(connection.transport.driver_type)
        except Exception:  # each library refuses in its own way
            driver = "N/A"
        if driver != "N/A":
            return driver
        scheme = str(connection.transport_cls or "")
        return re.split(r"[+:]", scheme)[0].lower()


#: The words of the table for what becomes of a duplicate.
DUPLICATES = {
    "snooze": "it looks again later",
    "skip": "it ends without a result",
    "error": "it fails",
    "return_saved": "it ends with the saved result",
    "rerun": "it runs",
    "fail": "it fails as interrupted",
    "a callable": "a callable looks whether it runs",
}


def task_facts(task: Any, installation: Installation) -> TaskFacts:
    """What is asked of a task, with the defaults that its binding has filled in."""
    base = next(kind for kind in type(task).__mro__[1:] if not _is_made(kind, task.app))
    return TaskFacts(
        name=task.name,
        base=f"{base.__module__}.{base.__qualname__}",
        is_resilient=isinstance(task, ResilientTask),
        failed_queue=installation.failed_queue_of(task),
        acks_late=bool(task.acks_late),
        reject_on_worker_lost=task.reject_on_worker_lost,
        retry_on_worker_lost=bool(getattr(task, "retry_on_worker_lost", False)),
        acks_on_failure=_celery.is_acknowledged_on(task, time_limit=False),
        acks_on_timeout=_celery.is_acknowledged_on(task, time_limit=True),
        soft_time_limit_s=_celery.time_limit_of(task, soft=True),
        time_limit_s=_celery.time_limit_of(task),
        max_retries=task.max_retries,
        retry_rules=tuple(map(str, getattr(task, "retry_rules", ()))),
        max_crashes=getattr(task, "max_crashes", None) or installation.max_crashes,
        has_own_strategy=task.Strategy != "celery.worker.strategy:default",
        keys=_keys_of(task),
        app_acks_late=bool(task.app.conf.task_acks_late),
        app_reject_on_worker_lost=task.app.conf.task_reject_on_worker_lost,
    )


def _keys_of(task: Any) -> Keys | None:
    if not (isinstance(task, ResilientTask) and task.has_key):
        return None
    key, looks = task.idempotency_key, task.if_interrupted
    if not isinstance(key, str):
        key = "all arguments" if key is True else "a callable"
    return Keys(
        key=key,
        asks_for=task.asked_by_key,
        if_running=task.if_running,
        if_done=task.if_done,
        if_interrupted=looks if isinstance(looks, str) else "a callable",
        unique_enqueue=task.unique_enqueue,
    )


def _is_made(kind: type[Any], app: Any) -> bool:
    """Whether a class is the one that Celery makes for each app."""
    return kind is app.Task and kind.__module__.startswith("celery.")


# --- the command ---------------------------------------------------------------------


def run(app: Any, output: str) -> int:
    """
    Print what adopting changes, as "table" or "json".

    Returns:
        The exit code: 0 done, 2 refused.
    """
    try:
        explained = explain_app(app)
    except ConfigurationError as exc:
        click.echo(printable(str(exc)), err=True)
        return REFUSED
    if output == "json":
        documents = [task.to_dict() for task in explained]
        click.echo(json.dumps(documents, indent=2))
    elif explained:
        for line in table(explained):
            click.echo(printable(line))
    else:
        click.echo("the app has no tasks of its own", err=True)
    return DONE


def table(explained: Sequence[TaskExplained]) -> Iterator[str]:
    """A line for each task, then what its words mean, then the risks."""
    head = ("TASK", "BASE", "ACK", "LIMITS", "FAILED QUEUE", *map(_title, CASES))
    rows = [head, *map(_cells, explained)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()
    used = {
        fate
        for task in explained
        for case in CASES
        for fate in (getattr(task, case).plain, getattr(task, case).resilient)
    }
    yield ""
    yield "in Celery > with celery-resilience; one word where they are the same:"
    for fate, meaning in MEANINGS.items():
        if fate in used:
            yield f"  {fate:<18} {meaning}"
    yield from _about_keys(explained)
    yield from _about_rules(explained)
    risks = [*summary_of([*explained])]
    if risks:
        yield ""
        yield "to know, with celery-resilience:"
    for code, text, tasks in risks:
        yield f"  {code} ({_named(tasks)})"
        yield f"    {text}"


def _about_keys(explained: Sequence[TaskExplained]) -> Iterator[str]:
    if any(task.keys for task in explained):
        yield ""
        yield "idempotency keys:"
    for task in explained:
        keys = task.keys
        if keys is None:
            continue
        yield f"  {task.task}: {keys.key}"
        if keys.asks_for:
            yield f"    makes True, unless the task says otherwise: {', '.join(keys.asks_for)}"
        yield (
            "    a duplicate: "
            f"while another runs, {DUPLICATES[keys.if_running]}; "
            f"when it is done, {DUPLICATES[keys.if_done]}; "
            f"after a run that died with its process, {DUPLICATES[keys.if_interrupted]}"
        )
        if keys.unique_enqueue:
            yield "    a second one is not sent while the first waits"


def _about_rules(explained: Sequence[TaskExplained]) -> Iterator[str]:
    ruled = [task for task in explained if task.retry_rules]
    if ruled:
        yield ""
        yield "retry rules, the first that matches:"
    for task in ruled:
        yield f"  {task.task}"
        for rule in task.retry_rules:
            yield f"    {rule}"


def _title(case: str) -> str:
    return case.replace("_", " ").upper()


def _cells(task: TaskExplained) -> tuple[str, ...]:
    return (
        task.task,
        "resilient" if task.is_resilient else task.base.rpartition(".")[2],
        "late" if task.acks_late else "early",
        f"{_limit(task.soft_time_limit_s)}/{_limit(task.time_limit_s)}",
        task.failed_queue or "-",
        *(_fates(getattr(task, case)) for case in CASES),
    )


def _limit(limit_s: float | None) -> str:
    return "-" if limit_s is None else f"{limit_s:g}"


def _fates(fates: Fates) -> str:
    if fates.plain is fates.resilient:
        return str(fates.plain)
    return f"{fates.plain} > {fates.resilient}"


def _named(tasks: Sequence[str]) -> str:
    named = ", ".join(tasks[:NAMED])
    more = len(tasks) - NAMED
    return named if more <= 0 else f"{named} and {more} more"
