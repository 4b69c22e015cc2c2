"""The worker's flags: `celery -A shop worker --max-crashes 5`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

HELP_GROUP = "Resilience options"

#: The flags, by the names under which the worker gets them.
NAMES = ("max_crashes", "collect_failed")

#: Apps that were installed before the `celery` command was imported, if it ever is.
_waiting: WeakSet[Any] = WeakSet()


def add_worker_flags(app: Any) -> None:
    """
    Add the flags to `celery worker --help`; a flag beats its setting.

    The `celery` command's own modules would cost a web process more than all of
    ours, so that they are not imported for this.
    """
    if "celery.bin.base" in sys.modules:
        app.user_options["worker"].update(_options())
    else:
        _waiting.add(app)


def command_is_imported() -> None:
    """The `celery` command is there: give the apps that waited for it their flags."""
    while _waiting:
        _waiting.pop().user_options["worker"].update(_options())


def _options() -> Iterator[Any]:
    import click
    from celery.bin.base import CeleryOption

    yield CeleryOption(
        ("--max-crashes",),
        type=click.IntRange(min=1),
        default=None,
        help_group=HELP_GROUP,
        help="Runs that may kill their process before a resilient task is failed "
        "as worker_lost. Celery's reject_on_worker_lost alone has no limit.",
    )
    yield CeleryOption(
        ("--collect-failed",),
        is_flag=True,
        default=None,
        help_group=HELP_GROUP,
        help="Also run the collector of failed tasks, in a process of its own, "
        "as -B runs beat.",
    )
