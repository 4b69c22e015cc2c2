"""Directives that write reference pages from the code itself.

`{settings}`, `{worker-flags}`, `{commands} failed` and `{documents}` have no
words of their own: a setting that is added is in the table of the next build.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from celery_resilience import command, explain, flags
from celery_resilience.failed.record import FIELDS
from celery_resilience.settings import Settings
from celery_resilience.telemetry import dashboards, instruments


def settings() -> Iterator[str]:
    """A table of every setting, with what it accepts."""
    yield "| setting | default | accepted | |"
    yield "|---|---|---|---|"
    for field in fields(Settings):
        accepted = _accepted(field.metadata["check"])
        doc = _cell(field.metadata["doc"])
        default = "" if "Default:" in doc else _default(field.default)
        yield f"| `resilience_{field.name}` | {default} | {_cell(accepted)} | {doc} |"


def _accepted(check: Any) -> str:
    """What a check says when it refuses."""
    try:
        check(object())
    except Exception as refused:
        return str(refused)
    raise AssertionError("every check refuses an object()")


def _default(value: Any) -> str:
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!r}`"


def _cell(text: str) -> str:
    """Text in a table, in which `{namespace}.failed` and URLs are code."""
    text = re.sub(r'("\{[^"]*")', r"`\1`", text.replace("|", "\\|"))
    return re.sub(r"(\b[a-z+]+://[^\s,]+)", r"`\1`", text)


def worker_flags() -> Iterator[str]:
    """A table of the flags that `celery worker` gets."""
    yield "| flag | |"
    yield "|---|---|"
    for option in flags._options():
        yield f"| `{'`, `'.join(option.opts)}` | {_cell(option.help or '')} |"


def commands(group: str) -> Iterator[str]:
    """The help of each command of a group, as a terminal shows it."""
    found: click.Group = getattr(command, group)
    yield f"{found.help}\n"
    yield from _verbs(group, found, None)


def _verbs(
    group: str, found: click.Group, above: click.Context | None
) -> Iterator[str]:
    typed = group if above else f"celery -A shop {group}"
    inside = click.Context(found, info_name=typed.split(" ")[-1] if above else typed)
    inside.parent = above
    for name, verb in found.commands.items():
        context = click.Context(verb, info_name=name, parent=inside)
        context.max_content_width = 84
        yield f"## {group} {name}\n"
        yield "```text"
        yield click.unstyle(verb.get_help(context))
        yield "```\n"


def documents() -> Iterator[str]:
    """The names of a failed task's JSON, in their order."""
    yield ", ".join(f"`{name}`" for name in FIELDS)


def fates() -> Iterator[str]:
    """What the words of `explain` mean."""
    yield "| fate | |"
    yield "|---|---|"
    for fate, meaning in explain.MEANINGS.items():
        yield f"| `{fate}` | {_cell(meaning)} |"


def risks() -> Iterator[str]:
    """What `explain` warns of."""
    yield "| risk | |"
    yield "|---|---|"
    for code, rule in explain.RISKS.items():
        yield f"| `{code}` | {_cell(rule.text)} |"


def metrics() -> Iterator[str]:
    """Every metric, by its names in Prometheus and in OpenTelemetry."""
    yield "| Prometheus | OpenTelemetry | kind, unit | labels | |"
    yield "|---|---|---|---|---|"
    for it in instruments.ALL:
        labels = ", ".join(f"`{label}`" for label in it.labels)
        yield (
            f"| `{it.series[0]}` | `{it.name}` | {it.kind}, {_cell(it.unit)} | {labels} "
            f"| {_cell(it.help)} |"
        )


def alerts() -> Iterator[str]:
    """The alerts that are shipped."""
    yield "| alert | lasts | severity | |"
    yield "|---|---|---|---|"
    for alert in dashboards.ALERTS:
        summary = _cell(alert.summary)
        yield f"| `Celery{alert.name}` | {alert.lasts} | {alert.severity} | {summary} |"


def one_name_each(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Write `a, b: text` of a docstring's section as two lines, which napoleon knows."""
    spread: list[str] = []
    rest: list[str] = []
    for line in [*lines, ""]:
        several = re.match(r"( {4})(\w+(?:, \w+)+): (.*)", line)
        if rest and not line.startswith(" " * 8):
            first, *more = rest
            indent, names, text = first.split("\0")
            for each in names.split(", "):
                spread += [f"{indent}{each}: {text}", *more]
            rest = []
        if several:
            rest = ["\0".join(several.groups())]
        elif rest:
            rest.append(line)
        else:
            spread.append(line)
    lines[:] = spread[:-1] if spread and not spread[-1] else spread


def _directive(write: Any) -> type[SphinxDirective]:
    takes = len(inspect.signature(write).parameters)

    class FromTheCode(SphinxDirective):
        required_arguments = takes

        def run(self) -> list[nodes.Node]:
            lines = "\n".join(write(*self.arguments)).split("\n")
            self.env.note_dependency(inspect.getfile(write))
            return self.parse_text_to_nodes(
                "\n".join(lines), allow_section_headings=True
            )

    return FromTheCode


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    for name, write in (
        ("settings", settings),
        ("worker-flags", worker_flags),
        ("commands", commands),
        ("documents", documents),
        ("fates", fates),
        ("risks", risks),
        ("metrics", metrics),
        ("alerts", alerts),
    ):
        app.add_directive(name, _directive(write))
    # Before napoleon, which is at 500.
    app.connect("autodoc-process-docstring", one_name_each, priority=400)
    return {"parallel_read_safe": True}
