"""The group of `celery failed`, with an app and with options as Django has them."""

from __future__ import annotations

import argparse
import copy
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import click
from celery import Celery
from celery.app import app_or_default
from celery.app.utils import find_app
from celery.bin.base import CeleryOption, CLIContext
from django.conf import settings

from celery_resilience.command import failed

HELP_GROUP = "Django options"

#: Actions of Django's parser that click has itself, or that are not for a verb.
NOT_FOR_VERBS = ("help", "version")


class NoApp(click.ClickException):
    """No Celery app was found; the message says what to write, and where."""

    exit_code = 2


class ManageContext(CLIContext):
    """
    What a verb finds in `context.obj`, as under `celery`.

    Attributes:
        options: Django's options, wherever they were typed.
        is_typed: The process is this command's own.
    """

    def __init__(self, options: Mapping[str, Any], *, is_typed: bool) -> None:
        self.options = dict(options)
        self.is_typed = is_typed
        self.no_color = False
        self.quiet = False
        self.workdir = None

    @property
    def with_traceback(self) -> bool:
        """Whether Django's --traceback was given."""
        return bool(self.options.get("traceback"))

    @cached_property
    def app(self) -> Celery:  # type: ignore[override]  # there it is read at once
        """The Celery app, found when a verb starts: help needs none."""
        self.no_color = bool(self.options.get("no_color"))
        if self.is_typed:
            # Celery would run Django's system checks, and not look at the result
            # (fixups/django.py, Celery 5.7); a broken URLconf must not hide failures.
            os.environ.setdefault("CELERY_SKIP_CHECKS", "1")
            if self.no_color:
                os.environ["NO_COLOR"] = "1"
        return find(self.options.get("app"), with_traceback=self.with_traceback)


def run(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    options: Mapping[str, Any],
    *,
    is_typed: bool,
) -> int:
    """
    Run one verb.

    Args:
        parser: Django's, whose options every verb takes too.
        words: The verb with its options and arguments.
        options: What Django has parsed already.
        is_typed: The process is this command's own.

    Returns:
        The exit code.
    """
    group = with_options(failed, parser)
    group.callback = None  # it asks for the app, also on the way to a verb's help
    group.context_settings = {"help_option_names": ["-h", "--help"]}
    context = ManageContext(options, is_typed=is_typed)
    try:
        group.main([*words], prog_name=parser.prog.strip(), obj=context)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def with_options(
    command: click.Command, parser: argparse.ArgumentParser
) -> click.Command:
    """A copy of a verb or group that takes Django's options, unless it has its own."""
    copied = copy.copy(command)
    taken = {name for param in command.params for name in param.opts}
    copied.params = [*command.params]
    for action in parser._actions:
        names = [name for name in action.option_strings if name not in taken]
        if names and action.dest not in NOT_FOR_VERBS:
            copied.params.append(_option(action, names))
    if isinstance(copied, click.Group):
        copied.commands = {
            name: with_options(verb, parser) for name, verb in copied.commands.items()
        }
    return copied


def _option(action: argparse.Action, names: Sequence[str]) -> click.Option:
    """An option of Django's in click's form."""
    choices = (
        None if action.choices is None else click.Choice([*map(str, action.choices)])
    )
    return CeleryOption(
        names,
        help=action.help,
        is_flag=action.nargs == 0,
        type=choices,
        expose_value=False,
        callback=_remember(action.dest),
        help_group=HELP_GROUP,
    )


def _remember(name: str) -> Callable[..., None]:
    def remember(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value is not None and value is not False:
            context.obj.options[name] = value

    return remember


def find(name: Any, *, with_traceback: bool = False) -> Celery:
    """
    The app of that name, or else the project's current app.

    Args:
        name: A module as `celery -A` takes it, or an app.
        with_traceback: Show why the module cannot be imported.

    Raises:
        NoApp: There is none.
    """
    if isinstance(name, Celery):
        return name
    if name:
        try:
            found: Celery = find_app(name)
        except Exception as exc:  # whatever the project's modules raise
            if with_traceback:
                traceback.print_exc()
            raise NoApp(f"--app {name}: {type(exc).__name__}: {exc}") from exc
        return found
    app: Any = app_or_default()
    # Celery makes one of that kind for who asks before there is any.
    if app.main == "default" and not app.set_as_current:
        raise NoApp(_advice())
    current: Celery = app
    return current


def _advice() -> str:
    module = settings.SETTINGS_MODULE or ""
    package = module.partition(".")[0] if "." in module else ""
    if package and find_spec(f"{package}.celery"):
        why = f"{package}.celery is there, but nothing in the project imports it"
    else:
        package = package or "PROJECT"
        why = f"make one in {package}/celery.py (Celery's First steps with Django)"
    return (
        f"no Celery app: {why}. Write into {package}/__init__.py\n\n"
        "    from .celery import app as celery_app\n\n"
        f"or say where it is: manage.py failed_tasks --app {package}.celery VERB"
    )
