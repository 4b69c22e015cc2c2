"""What the demo shows: a page of text, with a bar that moves on a terminal."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from example_project.demo.day import Day, Sum

#: Columns of the page where the output is no terminal.
PLAIN_WIDTH = 100


class Page:
    """Prints the demo's page, from its headline to its last line."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, width=PLAIN_WIDTH)

    def headline(self, *, orders: int, broker: str, children: int) -> None:
        """What is about to happen."""
        self._console.print()
        self._console.print(
            Panel(
                f"{orders:,} order lines · broker: {broker} · {children} children\n"
                "The file has the dirt of real files. The address service is ill: it "
                "hangs and blinks,\nand goes down for a while. Customers click twice. "
                "Children are killed in the middle of\nthe day, some when the bank has "
                "just taken the money; and one order kills every child\nthat looks at "
                "it. Tasks leak, and break the session that they share; and a deploy "
                "comes in the middle\nof an import. Once with plain Celery, once with "
                "[b]base=ResilientTask[/b], where the charge has\na key and the import "
                "is a batch.",
                title="[b]One bad day at the shop, twice[/b]",
                title_align="left",
                padding=(1, 2),
            )
        )

    def chapter(self, title: str, text: str = "") -> None:
        """A heading, and a sentence."""
        self._console.print()
        self._console.rule(f"[b]{title}[/b]", align="left")
        if text:
            self._console.print(text)

    @contextlib.contextmanager
    def progress(self, orders: int) -> Iterator[Callable[[str, str, int], None]]:
        """Bars of shipped orders; what it yields is called with title, phase, count."""
        if not self._console.is_terminal:
            said: set[tuple[str, str]] = set()

            def say(title: str, phase: str, shipped: int) -> None:
                if (title, phase) not in said:
                    said.add((title, phase))
                    self._console.print(f"{title:<18}{shipped:>6,} shipped  {phase}")

            yield say
            return
        bar = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:>5,.0f} shipped"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[phase]}[/dim]"),
            console=self._console,
        )
        rows: dict[str, TaskID] = {}

        def update(title: str, phase: str, shipped: int) -> None:
            if title not in rows:
                rows[title] = bar.add_task(title, total=orders, phase="")
            if not bar.tasks[rows[title]].stop_time:
                bar.update(rows[title], completed=shipped, phase=phase)
            if phase == "closed":
                bar.stop_task(rows[title])

        with bar:
            yield update

    def comparison(self, plain: Day, resilient: Day) -> None:
        """What became of the orders, counted from the two ledgers."""
        table = Table(
            box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0)
        )
        table.add_column("counted from the ledger of effects")
        table.add_column("plain Celery", justify="right")
        table.add_column("resilient", justify="right")
        rows: list[tuple[str, str, bool]] = [
            ("children killed", "killed", False),
            ("orders shipped", "shipped", False),
            ("LOST: paid, never shipped", "paid_only", True),
            ("LOST: accepted, never charged", "unpaid", True),
            ("LOST: gone before they were accepted", "gone", True),
            ("DOUBLED: customers charged twice", "charged_twice", True),
            ("DOUBLED: customers mailed twice", "mailed_twice", True),
            ("UNEARNED: money taken for no parcel", "unearned_cents", True),
            ("kept, to be looked at and run again", "kept", False),
            ("largest child, which leaks, in MiB", "largest_mib", False),
        ]
        for title, name, is_bad in rows:
            write = _money if name.endswith("_cents") else _count
            counts = [int(getattr(day, name)) for day in (plain, resilient)]
            table.add_row(title, *(_shown(n, write(n), is_bad) for n in counts))
        self._console.print(table)

    def typed(self, words: Sequence[str]) -> None:
        """A command that is about to run."""
        self._console.print()
        line = f"$ celery -A example_project.shop failed {shlex.join(words)}"
        self._console.print(Text(line, style="bold green"))

    def logged(self, line: str) -> None:
        """One failure, as the worker's log has it."""
        self._console.print("\nThe first of them in the worker's log, on one line:")
        self._console.print(Text(line, style="dim"), soft_wrap=True)

    def sum(self, total: Sum, refused: Mapping[str, int]) -> None:
        """Every order, shipped or refused with its reason."""
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="right")
        table.add_column()
        table.add_row(
            f"[b]{total.shipped:,}[/b]", "orders shipped, each once and paid once"
        )
        for reason, count in refused.items():
            table.add_row(f"[b]{count:,}[/b]", Text(f"refused: {reason}"))
        table.add_row("─────", "")
        table.add_row(
            f"[b]{total.shipped + total.refused:,}[/b]",
            f"of {total.orders:,} order lines in the file",
        )
        table.add_row("", "")
        table.add_row(f"[b]{_money(total.charged_cents)}[/b]", "taken from customers")
        table.add_row(
            f"[b]{_money(total.shipped_cents)}[/b]", "worth of orders shipped"
        )
        table.add_row(
            f"[b]{_money(total.reported_cents)}[/b]", "in the shop's revenue report"
        )
        verdict = (
            "[bold green]It comes out even.[/bold green]"
            if total.is_even
            else "[bold red]It does not come out even.[/bold red]"
        )
        self._console.print(Group(table, "", verdict))

    def end(self, seconds: float, kept_in: Path | None) -> None:
        """The last line."""
        files = f"the files are in {kept_in}" if kept_in else "every file is removed"
        self._console.print(
            f"[dim]{seconds:.0f} seconds; every process has ended and {files}. "
            "The shop is in example_project/; its README says how to run it by "
            "hand.[/dim]"
        )

    def trouble(self, text: str) -> None:
        """Something went wrong."""
        self._console.print(Text(text, style="red"))


def _shown(number: int, text: str, is_bad: bool) -> Text:
    style = "bold red" if is_bad and number else "bold green" if is_bad else ""
    return Text(text, style=style)


def _count(count: int) -> str:
    return f"{count:,}"


def _money(cents: int) -> str:
    return f"{cents / 100:,.2f} €"
