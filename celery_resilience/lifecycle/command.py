"""What `celery resilience units` prints, from an app and the words of a command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from celery_resilience import _celery
from celery_resilience.errors import ConfigurationError
from celery_resilience.lifecycle.units import MAIN_MIB, Deployment, render
from celery_resilience.settings import Settings

DONE, REFUSED = 0, 2

#: The port of the probes where nobody has named one.
HEALTH_PORT = 8081

#: The pool that enforces hard time limits.
LIMITING_POOL = "prefork"


def run(
    app: Any, settings: Settings, app_name: str, kind: str, words: dict[str, Any]
) -> int:
    """
    Print the file of one kind.

    Args:
        app: The Celery app.
        settings: Its settings.
        app_name: As it was written after `-A`; "" where it was not.
        kind: "systemd", "kubernetes" or "supervisor".
        words: The command's options.

    Returns:
        0, or 2 where the numbers do not add up.
    """
    deployment = deployment_of(app, settings, app_name, kind, words)
    try:
        text, numbers = render(deployment, kind, is_collector=words["collector"])
    except ConfigurationError as exc:
        click.echo(f"refused: {exc}", err=True)
        return REFUSED
    click.echo(text, nl=False)
    for warning in () if words["collector"] else numbers.warnings:
        click.echo(f"warning: {warning}", err=True)
    return DONE


def deployment_of(
    app: Any, settings: Settings, app_name: str, kind: str, words: dict[str, Any]
) -> Deployment:
    """What the app and the command line say of a worker."""
    app.loader.import_default_modules()
    app.finalize()
    conf = app.conf
    tasks = [t for t in app.tasks.values() if not t.name.startswith("celery.")]
    is_limiting = str(conf.worker_pool) == LIMITING_POOL
    role = "collector" if words["collector"] else "worker"
    namespace = re.sub(r"[^a-z0-9]+", "-", settings.namespace.lower()).strip("-")
    in_container = kind == "kubernetes"
    default_celery = "celery" if in_container else str(_beside_python("celery"))
    health = words["health_port"] or settings.health_port
    if health is None and in_container:
        health = ("", HEALTH_PORT)
    concurrency = words["concurrency"] or conf.worker_concurrency
    return Deployment(
        name=words["name"] or f"{namespace or 'celery'}-{role}",
        celery=words["celery"] or default_celery,
        app=app_name or str(app.main),
        concurrency=concurrency if isinstance(concurrency, int) else None,
        queues=words["queues"] or "",
        flags=("--collect-failed",) if words["collect_failed"] else (),
        drain_timeout_s=words["drain_timeout_s"] or settings.drain_timeout_s,
        limits_s={
            task.name: _celery.time_limit_of(task) if is_limiting else None
            for task in tasks
        },
        early=frozenset(task.name for task in tasks if not task.acks_late),
        child_mib=words["child_memory_mib"] or child_mib_of(settings),
        main_mib=words["main_memory_mib"] or MAIN_MIB,
        memory_mib=words["memory_mib"],
        health=health,
        user=words["user"] or "",
        directory=str(words["directory"] or Path.cwd()),
        image=words["image"] or "",
        replicas=words["replicas"],
    )


def child_mib_of(settings: Settings) -> float | None:
    """
    What a child may come to: what it may gain in its life, and one run on top.

    None where no number says how much that is.
    """
    limit, recycle = settings.memory_limit_mib, settings.memory_recycle_mib
    if not isinstance(limit, float) or isinstance(recycle, str):
        return None
    return limit + (recycle or 0.0)


def _beside_python(name: str) -> Path:
    """A command in the environment that runs this one."""
    return Path(sys.executable).absolute().parent / name
