"""The group of `celery failed` in Django's dress."""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any

import click
import pytest
from celery import Celery

from celery_resilience.command import failed
from celery_resilience.django.command import run, with_options
from celery_resilience.django.management.commands.failed_tasks import Command


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """Django's parser, as it is made for `manage.py failed_tasks`."""
    made: argparse.ArgumentParser = Command().create_parser("manage.py", "failed_tasks")
    return made


def later(told: list[Any]) -> click.Group:
    """The group with a verb, and with a group of verbs, of some later release."""
    group = copy.copy(failed)
    group.callback = None
    group.commands = dict(failed.commands)

    @group.command("count")
    @click.option("-v", "--verbose", is_flag=True)
    @click.pass_context
    def count(context: click.Context, verbose: bool) -> None:
        told.append(("count", verbose, dict(context.obj.options)))

    @group.group("ops")
    def ops() -> None:
        told.append("ops")

    @ops.command("resume")
    @click.argument("operation")
    @click.pass_context
    def resume(context: click.Context, operation: str) -> None:
        told.append((operation, dict(context.obj.options)))

    return group


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["count"], [("count", False, {})]),
        (["count", "-v"], [("count", True, {})]),
        (
            ["count", "--verbosity", "2", "--settings", "shop.settings"],
            [("count", False, {"verbosity": "2", "settings": "shop.settings"})],
        ),
        (
            ["ops", "resume", "a91f3c", "--traceback", "-A", "shop"],
            ["ops", ("a91f3c", {"traceback": True, "app": "shop"})],
        ),
        (["ops", "resume", "--", "--traceback"], ["ops", ("--traceback", {})]),
    ],
)
def test_a_verb_added_later_has_djangos_options_too(
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: list[Any],
) -> None:
    """Without a word of its own about Django, and its own short options are kept."""
    heard: list[Any] = []
    module = "celery_resilience.django.command.failed"
    monkeypatch.setattr(module, later(heard))

    assert run(parser, words, {}, is_typed=False) == 0
    assert heard == told


def test_the_group_of_celery_stays_as_it_was(parser: argparse.ArgumentParser) -> None:
    """`celery failed` in the same process gets no option of Django's."""
    before = {name: list(verb.params) for name, verb in failed.commands.items()}
    group = with_options(failed, parser)

    assert isinstance(group, click.Group)
    assert group.commands.keys() == failed.commands.keys()
    assert failed.callback is not None
    assert {name: verb.params for name, verb in failed.commands.items()} == before
    for name, verb in group.commands.items():
        assert len(verb.params) > len(before[name])


@pytest.mark.parametrize(("is_typed", "variable"), [(True, "1"), (False, None)])
def test_no_color_is_for_all_that_the_process_prints(
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    is_typed: bool,
    variable: str | None,
) -> None:
    """But a process that goes on after `call_command` keeps its environment."""
    for name in ("NO_COLOR", "CELERY_SKIP_CHECKS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    app = Celery("shop", set_as_current=False)
    heard: list[Any] = []
    group = later(heard)

    @group.command("look")
    @click.pass_context
    def look(context: click.Context) -> None:
        assert context.obj.app is app
        heard.extend((context.obj.no_color, os.environ.get("NO_COLOR")))

    monkeypatch.setattr("celery_resilience.django.command.failed", group)

    assert run(parser, ["look", "--no-color"], {"app": app}, is_typed=is_typed) == 0
    assert heard == [True, variable]
    assert ("CELERY_SKIP_CHECKS" in os.environ) is is_typed
