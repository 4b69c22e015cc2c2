"""`manage.py failed_tasks VERB`, which is `celery -A app failed VERB`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from celery_resilience.django.command import run


class Command(BaseCommand):
    """
    Runs the verbs of `celery failed`, with Django's options around them.

    `call_command` writes to its *stdout* and *stderr*, and raises a CommandError
    with the exit code as its `returncode` where the shell would see that code.
    """

    help = "Show, replay and discard failed tasks."
    requires_system_checks = ()

    def create_parser(
        self, prog_name: str, subcommand: str, **kwargs: Any
    ) -> CommandParser:
        """Django's parser, for what stands before the verb; click takes the rest."""
        parser = super().create_parser(
            prog_name, subcommand, **{**kwargs, "add_help": False}
        )
        self._parser = parser
        return parser

    def add_arguments(self, parser: CommandParser) -> None:
        """Add our options to Django's own."""
        parser.add_argument(
            "-A",
            "--app",
            help="The module of the Celery app, such as shop.celery; the default is "
            "the app that the project's package imports.",
        )
        parser.add_argument("-h", "--help", action="store_true")
        parser.add_argument("args", nargs=argparse.REMAINDER)

    def print_help(self, prog_name: str, subcommand: str) -> None:
        """Answer `manage.py help failed_tasks`."""
        parser = self.create_parser(prog_name, subcommand)
        run(parser, ["--help"], {}, is_typed=True)

    def handle(self, *words: str, **options: Any) -> None:
        """Run one verb; its exit code is the process's."""
        if options["help"]:
            words = ("--help", *words)
        is_typed = self._called_from_command_line
        with contextlib.ExitStack() as stack:
            if not is_typed:
                self.stdout.ending = self.stderr.ending = None
                self.stderr.style_func = None
                stack.enter_context(contextlib.redirect_stdout(self.stdout))
                stack.enter_context(contextlib.redirect_stderr(self.stderr))
            code = run(self._parser, words, options, is_typed=is_typed)
        if code and is_typed:
            sys.exit(code)
        if code:
            raise CommandError(
                f"failed_tasks {' '.join(words[:1])} ended with exit code {code}",
                returncode=code,
            )
