"""The `celery` sub-commands `failed` and `resilience`.

Imported by every `celery` call, so that it imports nothing heavy until a verb
runs; what a verb does is in `failed/console/`, `idempotency/console.py` and
`circuits/console.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_resilience.click_types import SECONDS, FiniteRange
from celery_resilience.flags import command_is_imported

command_is_imported()


def _filters(default_states: str) -> Callable[..., Any]:
    """FILTERS, in the same words for every verb, which has states of its own."""
    states = (
        f"unresolved, replaying, resolved, discarded or all; else {default_states}."
    )
    options = [
        click.option("--task", metavar="GLOB", help="The task's name."),
        click.option("--queue", metavar="Q", help="The queue it came from."),
        click.option("--failed-queue", metavar="Q", help="Its failed queue."),
        click.option("--exception", metavar="GLOB", help="The exception's name."),
        click.option("--message", metavar="TEXT", help="A part of its message."),
        click.option("--reason", metavar="R", help="Why it failed."),
        click.option("--group", metavar="FP", help="The start of a fingerprint."),
        click.option("--since", metavar="TIME", help="Failed since: 2h, or ISO 8601."),
        click.option("--until", metavar="TIME", help="Failed until: 2h, or ISO 8601."),
        click.option(
            "--state",
            metavar="STATE",
            help=states,
        ),
        click.option(
            "--arg", multiple=True, metavar="NAME=VALUE", help="An argument's value."
        ),
        click.option("--release", metavar="R", help="The app's release."),
        click.option("--worker", metavar="GLOB", help="The worker's name."),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _verb(name: str, *decorators: Callable[..., Any]) -> Callable[..., Any]:
    """A verb of `failed`; what it does is in `failed/console/run.py`."""

    def register(describe: Callable[..., None]) -> Callable[..., None]:
        @click.pass_context
        def run(context: click.Context, /, **words: Any) -> None:
            module = import_module("celery_resilience.failed.console.run")
            code = module.run(
                context.obj.app,
                name,
                words,
                with_traceback=getattr(context.obj, "with_traceback", False),
            )
            # Where nobody reads any more (`| head -1`), click is quiet about it;
            # the end of the interpreter is not.
            sys.stdout.flush()
            context.exit(code)

        run.__doc__ = describe.__doc__
        command: Any = run
        for decorate in reversed(decorators):
            command = decorate(command)
        failed.command(name=name, cls=CeleryCommand)(command)
        return describe

    return register


def _output(*kinds: str) -> Callable[..., Any]:
    """How data is printed; the first kind is the default."""
    return click.option(
        "-o", "--output", type=click.Choice(kinds), default=kinds[0], show_default=True
    )


_ids = click.argument("ids", nargs=-1, metavar="[ID]...")
_unresolved = _filters("unresolved")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_all = click.option("--all", "everything", is_flag=True, help="Every one.")
_limit = click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="At most so many."
)


@click.group(name="failed")
@click.pass_context
@handle_preload_options
def failed(context: click.Context) -> None:
    """Show, replay and discard failed tasks."""


@_verb(
    "list",
    _unresolved,
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        default=50,
        show_default=True,
        metavar="N",
        help="At most so many.",
    ),
    _output("table", "json", "jsonl", "csv", "ids"),
)
def _list() -> None:
    """List failed tasks, last failed first."""


@_verb(
    "show",
    click.argument("ids", nargs=-1, required=True, metavar="ID..."),
    click.option("-v", "--verbose", is_flag=True, help="Also headers and attempts."),
    click.option("--raw", is_flag=True, help="The whole envelope, unredacted."),
    _output("text", "json"),
)
def _show() -> None:
    """Show failed tasks by id, the start of it, or task id."""


@_verb(
    "stats",
    click.option(
        "--check",
        "checks",
        multiple=True,
        metavar="RULE",
        help="Exit 5 if it holds: 'unresolved>100', 'oldest>1h'.",
    ),
    _output("text", "json"),
)
def _stats() -> None:
    """Count failed tasks by state, reason and task."""


@_verb(
    "replay",
    _ids,
    _unresolved,
    _all,
    _limit,
    _yes,
    click.option("--dry-run", is_flag=True, help="Say what would be sent."),
    click.option("--to-queue", metavar="Q", help="Another queue than the original."),
    click.option("--new-id", is_flag=True, help="Give each message a new task id."),
    click.option(
        "--force",
        is_flag=True,
        help="Run what has an idempotency key that is done or interrupted, too.",
    ),
    click.option("--wait", is_flag=True, help="Wait until every replay has ended."),
    _output("text", "json"),
)
def _replay() -> None:
    """Send failed tasks again, with their chains, links and priority."""


@_verb("discard", _ids, _unresolved, _all, _limit, _yes)
def _discard() -> None:
    """Mark failed tasks as never to be replayed; `reopen` undoes it."""


@_verb("reopen", _ids, _filters("discarded"), _all, _limit, _yes)
def _reopen() -> None:
    """Undo a discard, or give up a replay that never came back."""


@_verb(
    "prune",
    click.option("--older-than", metavar="AGE", help="Failed last before 30d, 12h."),
    click.option(
        "--keep", type=click.IntRange(min=0), metavar="N", help="All but the newest N."
    ),
    _filters("resolved and discarded"),
    click.option(
        "--archive",
        type=click.Path(dir_okay=False),
        metavar="F",
        help="A new file, compressed, that takes them first; `import` reads it.",
    ),
    _yes,
)
def _prune() -> None:
    """Forget failed tasks: those resolved and discarded, or what --state says."""


@_verb(
    "export",
    _filters("all"),
    click.option(
        "-f",
        "--file",
        type=click.Path(dir_okay=False),
        metavar="F",
        help="Write there; compressed if it ends in .gz.",
    ),
    click.option(
        "--raw", is_flag=True, help="Whole and unredacted; only that can be imported."
    ),
)
def _export() -> None:
    """Write failed tasks as lines of JSON."""


@_verb(
    "import",
    click.argument("file", type=click.File("rb"), metavar="F"),
    click.option("--dry-run", is_flag=True, help="Say what would be imported."),
)
def _import() -> None:
    """Take in what `export --raw` or an archive holds; - is standard input."""


@_verb(
    "collect",
    click.option("--once", is_flag=True, help="Empty the failed queues, and end."),
)
def _collect() -> None:
    """Move failed tasks from their queues and the spool into the store."""


@click.group(name="resilience")
@click.pass_context
@handle_preload_options
def resilience(context: click.Context) -> None:
    """Look after celery-resilience itself."""


@resilience.command(cls=CeleryCommand)
@click.option("--sql", is_flag=True, required=True, help="Print the statements.")
@click.option(
    "--once",
    type=click.Choice(["sqlite", "postgresql", "mysql"]),
    help="Those of the table of once() instead, for your own database of that kind.",
)
@click.pass_context
def schema(context: click.Context, sql: bool, once: str | None) -> None:
    """Print the statements that make the store's tables."""
    if once is not None:
        table = import_module("celery_resilience.idempotency.once.sql_table")
        click.echo(table.ddl(once), nl=False)
        return
    module = import_module("celery_resilience.failed.console.run")
    context.exit(module.run(context.obj.app, "schema", {}))


@resilience.command(cls=CeleryCommand)
@_output("table", "json")
@click.pass_context
def explain(context: click.Context, output: str) -> None:
    """Say for each task what adopting celery-resilience changes, and what is risky."""
    module = import_module("celery_resilience.explaining")
    context.exit(module.run(context.obj.app, output))


def _address(context: click.Context, param: click.Parameter, value: Any) -> Any:
    """A port, or host:port; checked as the setting is."""
    if value is None:
        return None
    settings = import_module("celery_resilience.settings")
    try:
        return settings.address(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), context, param) from exc


_mib = FiniteRange(min=1)


@resilience.command(cls=CeleryCommand)
@click.argument("kind", type=click.Choice(["systemd", "kubernetes", "supervisor"]))
@click.option("--name", metavar="NAME", help="Of the unit; else by the namespace.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Children; else worker_concurrency.",
)
@click.option("-Q", "--queues", metavar="Q1,Q2", help="Else the app's own.")
@click.option(
    "--drain-timeout-s",
    type=SECONDS,
    metavar="S",
    help="Else resilience_drain_timeout_s, or the longest hard time limit.",
)
@click.option(
    "--health-port",
    metavar="[HOST:]PORT",
    callback=_address,
    help="Else resilience_health_port; on Kubernetes else 8081.",
)
@click.option(
    "--child-memory-mib",
    type=_mib,
    metavar="MIB",
    help="What a child may have, from which the memory of the whole follows. Else "
    "resilience_memory_recycle_mib and resilience_memory_limit_mib, if they are MiB.",
)
@click.option(
    "--main-memory-mib",
    type=_mib,
    metavar="MIB",
    help="What the main process has; else 256.",
)
@click.option(
    "--memory-mib",
    type=_mib,
    metavar="MIB",
    help="What the whole may have; refused where the children may have more.",
)
@click.option("--collect-failed", is_flag=True, help="This worker also collects.")
@click.option("--collector", is_flag=True, help="The collector's unit instead.")
@click.option("--user", metavar="USER", help="Who runs it, on a host.")
@click.option("--directory", metavar="DIR", help="Where it runs; else here.")
@click.option("--celery", metavar="PATH", help="The command; else the one of here.")
@click.option("--image", metavar="IMAGE", help="Of the container, on Kubernetes.")
@click.option(
    "--replicas",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="N",
    help="On Kubernetes.",
)
@click.pass_context
def units(context: click.Context, /, kind: str, **words: Any) -> None:
    """Print a deployment file whose grace period and memory add up."""
    module = import_module("celery_resilience.lifecycle.command")
    install = import_module("celery_resilience.install")
    errors = import_module("celery_resilience.errors")
    app = context.obj.app
    try:
        settings = install.installed_or_new(app).settings
    except errors.ConfigurationError as exc:
        click.echo(f"refused: {exc}", err=True)
        context.exit(2)
    named = context.find_root().params.get("app")
    app_name = named if isinstance(named, str) else ""
    context.exit(module.run(app, settings, app_name, kind, words))


@resilience.command(cls=CeleryCommand)
@click.argument("kind", type=click.Choice(["grafana", "alerts"]))
def dashboards(kind: str) -> None:
    """Print the dashboard for Grafana, or the alert rules for Prometheus."""
    module = import_module("celery_resilience.telemetry.dashboards")
    click.echo(module.PRINTED[kind](), nl=False)


@resilience.group(name="keys", invoke_without_command=True)
@click.pass_context
def keys(context: click.Context) -> None:
    """Look at idempotency keys, and forget them; without a verb, list them."""
    if context.invoked_subcommand is None:
        context.invoke(_list_keys)


def _run_keys(context: click.Context, verb: str, words: dict[str, Any]) -> None:
    """A verb of `keys`; what it does is in `idempotency/console.py`."""
    module = import_module("celery_resilience.idempotency.console")
    code = module.run(
        context.obj.app,
        verb,
        words,
        with_traceback=getattr(context.obj, "with_traceback", False),
    )
    sys.stdout.flush()
    context.exit(code)


@keys.command(name="list", cls=CeleryCommand)
@click.option(
    "--state",
    metavar="STATE",
    help="queued, running, retrying, done, failed or interrupted.",
)
@click.option("--task", metavar="GLOB", help="The task's name.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="At most so many.",
)
@_output("table", "json")
@click.pass_context
def _list_keys(context: click.Context, /, **words: Any) -> None:
    """List keys, in any order."""
    _run_keys(context, "list", words)


@keys.command(name="show", cls=CeleryCommand)
@click.argument("key", metavar="KEY")
@_output("text", "json")
@click.pass_context
def _show_key(context: click.Context, /, **words: Any) -> None:
    """Show a key by its name, or the start of its 64 digits; never its result."""
    _run_keys(context, "show", words)


@keys.command(name="forget", cls=CeleryCommand)
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option("--running", is_flag=True, help="Also one that is running.")
@_yes
@click.pass_context
def _forget_keys(context: click.Context, /, **words: Any) -> None:
    """Forget keys, so that their effects may happen again."""
    _run_keys(context, "forget", words)


@resilience.group(name="circuits", invoke_without_command=True)
@click.pass_context
def circuits(context: click.Context) -> None:
    """Look at circuits, and change them for the fleet; without a verb, list them."""
    if context.invoked_subcommand is None:
        context.invoke(_list_circuits)


def _run_circuits(context: click.Context, verb: str, words: dict[str, Any]) -> None:
    """A verb of `circuits`; what it does is in `circuits/console.py`."""
    module = import_module("celery_resilience.circuits.console")
    code = module.run(
        context.obj.app,
        verb,
        words,
        with_traceback=getattr(context.obj, "with_traceback", False),
    )
    sys.stdout.flush()
    context.exit(code)


_for_s = click.option(
    "--for-s",
    type=FiniteRange(min=0, min_open=True, max=604_800),
    default=3_600,
    show_default=True,
    metavar="SECONDS",
    help="How long it holds, at most a week.",
)


@circuits.command(name="list", cls=CeleryCommand)
@_output("table", "json")
@click.pass_context
def _list_circuits(context: click.Context, /, **words: Any) -> None:
    """List the circuits that a setting or a task names, and those in the store."""
    _run_circuits(context, "list", words)


@circuits.command(name="open", cls=CeleryCommand)
@click.argument("name", metavar="NAME")
@_for_s
@click.pass_context
def _open_circuit(context: click.Context, /, **words: Any) -> None:
    """Keep a circuit open: no call, and no probe."""
    _run_circuits(context, "open", words)


@circuits.command(name="close", cls=CeleryCommand)
@click.argument("name", metavar="NAME")
@click.pass_context
def _close_circuit(context: click.Context, /, **words: Any) -> None:
    """Close a circuit, also one that is kept open; it counts from zero."""
    _run_circuits(context, "close", words)


@circuits.command(name="reset", cls=CeleryCommand)
@click.argument("name", metavar="NAME")
@click.pass_context
def _reset_circuit(context: click.Context, /, **words: Any) -> None:
    """Close a circuit, and take back whatever was said of it."""
    _run_circuits(context, "reset", words)


@circuits.command(name="disable", cls=CeleryCommand)
@click.argument("name", metavar="NAME")
@_for_s
@click.pass_context
def _disable_circuit(context: click.Context, /, **words: Any) -> None:
    """Let every call through, and count none."""
    _run_circuits(context, "disable", words)


@circuits.command(name="shadow", cls=CeleryCommand)
@click.argument("name", metavar="NAME")
@_for_s
@click.pass_context
def _shadow_circuit(context: click.Context, /, **words: Any) -> None:
    """Let every call through, and say when it would have opened."""
    _run_circuits(context, "shadow", words)
