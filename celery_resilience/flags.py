"""The worker's flags: `celery -A shop worker --max-crashes 5`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from celery_resilience.memory_amount import MEMORY_AMOUNT, is_memory_amount

HELP_GROUP = "Resilience options"

#: The flags, by the names under which the worker gets them.
NAMES = (
    "max_crashes",
    "collect_failed",
    "memory_recycle_mib",
    "memory_limit_mib",
    "drain_timeout_s",
    "health_port",
    "metrics_port",
    "stop_after_s",
    "stop_after_tasks",
    "stop_when_empty",
)

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

    from celery_resilience.click_types import SECONDS

    def memory(context: Any, param: Any, value: str | None) -> float | str | None:
        if value is None:
            return None
        amount: float | str = value
        with contextlib.suppress(ValueError):
            amount = float(value)
        if not is_memory_amount(amount):
            raise click.BadParameter(f"must be {MEMORY_AMOUNT}, got {value!r}")
        return amount

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
    yield CeleryOption(
        ("--memory-recycle-mib",),
        metavar="MIB",
        callback=memory,
        default=None,
        help_group=HELP_GROUP,
        help="What a child may gain in its life before it is recycled, between two "
        "tasks: MiB, or a share (\"25%\") of the container's memory. Celery's "
        "--max-memory-per-child is in KiB, and takes the peak for it.",
    )
    yield CeleryOption(
        ("--memory-limit-mib",),
        metavar="MIB",
        callback=memory,
        default=None,
        help_group=HELP_GROUP,
        help="What one run of a resilient task may take before it fails as "
        "memory_limit: MiB, or a share. Its child lives, where that is possible.",
    )
    yield CeleryOption(
        ("--drain-timeout-s",),
        type=SECONDS,
        default=None,
        help_group=HELP_GROUP,
        help="Seconds from the first signal until what still runs is cut off: put back, "
        "or kept as failed. Celery's warm shutdown has no limit, and its "
        "worker_soft_shutdown_timeout waits in vain where nothing runs any more.",
    )
    yield CeleryOption(
        ("--health-port",),
        type=_address_type(),
        metavar="[HOST:]PORT",
        default=None,
        help_group=HELP_GROUP,
        help="Answer /live and /ready over HTTP there, on every address unless a host "
        "is given. Unlike `inspect ping`, /live does not need the broker.",
    )
    yield CeleryOption(
        ("--metrics-port",),
        type=_address_type(),
        metavar="[HOST:]PORT",
        default=None,
        help_group=HELP_GROUP,
        help="Show metrics to Prometheus at /metrics there, for all children; it may be "
        "the health port. Celery has no such option.",
    )
    yield CeleryOption(
        ("--stop-after-s",),
        type=SECONDS,
        default=None,
        help_group=HELP_GROUP,
        help="Drain and exit 0 after so many seconds, for a supervisor to start again. "
        "Celery has no such option.",
    )
    yield CeleryOption(
        ("--stop-after-tasks",),
        type=click.IntRange(min=1),
        default=None,
        help_group=HELP_GROUP,
        help="Drain and exit 0 once so many tasks have ended; those that run then end "
        "too. Celery's --max-tasks-per-child replaces one child instead.",
    )
    yield CeleryOption(
        ("--stop-when-empty",),
        is_flag=True,
        default=None,
        help_group=HELP_GROUP,
        help="Drain and exit 0 once the queues are empty and nothing is held here. "
        "Celery has no such option.",
    )


def _address_type() -> Any:
    import click

    from celery_resilience.settings import address

    class Address(click.ParamType):  # type: ignore[type-arg]
        """A port, or host:port."""

        name = "address"

        def convert(self, value: Any, param: Any, ctx: Any) -> Any:
            if isinstance(value, tuple):
                return value
            try:
                return address(value)
            except ValueError as exc:
                self.fail(str(exc), param, ctx)

    return Address()
