"""The worker's flags: `celery -A shop worker --max-crashes 5`."""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryOption

HELP_GROUP = "Resilience options"

#: Keyword arguments of each option, by the name the worker gets it under.
WORKER_FLAGS: dict[str, dict[str, Any]] = {
    "max_crashes": {
        "param_decls": ("--max-crashes",),
        "type": click.IntRange(min=1),
        "help": "Runs that may kill their process before a resilient task is failed "
        "as worker_lost. Celery's reject_on_worker_lost alone has no limit.",
    },
    "collect_failed": {
        "param_decls": ("--collect-failed",),
        "is_flag": True,
        "help": "Also run the collector of failed tasks, in a process of its own, "
        "as -B runs beat.",
    },
}


def add_worker_flags(app: Any) -> None:
    """Add the flags to `celery worker --help`; a flag beats its setting."""
    for options in WORKER_FLAGS.values():
        app.user_options["worker"].add(
            CeleryOption(default=None, help_group=HELP_GROUP, **options)
        )
