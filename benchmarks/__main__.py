"""`make bench`: every figure with its bound, and the machine it was measured on."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import (
    batches,
    circuits,
    in_process,
    keys,
    life,
    start_up,
    store,
    throughput,
    watched,
)
from benchmarks.figures import Figure

SECTIONS: dict[str, Callable[[], Iterator[Figure]]] = {
    "in_process": in_process.measure,
    "batches": batches.measure,
    "start_up": start_up.measure,
    "throughput": throughput.measure,
    "store": store.measure,
    "life": life.measure,
    "circuits": circuits.measure,
    "keys": keys.measure,
    "key_stores": keys.measure_stores,
    "watched": watched.measure,
}


def main() -> int:
    """Measure the sections that were named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("sections", nargs="*", metavar="|".join(SECTIONS))
    names = parser.parse_args().sections or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}")
    console = Console(highlight=False)
    console.print(machine())
    for name in names:
        start = time.monotonic()
        for figure in SECTIONS[name]():
            console.print(_row(figure))
        console.print(f"[dim]{name}: {time.monotonic() - start:.0f} s[/dim]")
    return 0


def machine() -> str:
    """Where the figures come from."""
    with open("/proc/cpuinfo") as info:
        models = [
            line.partition(":")[2].strip() for line in info if "model name" in line
        ]
    packages = ", ".join(f"{p} {version(p)}" for p in ("celery", "kombu", "sqlalchemy"))
    return (
        f"{os.cpu_count()} x {models[0] if models else platform.machine()}, "
        f"{platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packages}"
    )


def _row(figure: Figure) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=52)
    table.add_column(width=10, justify="right")
    table.add_column(width=13)
    style = {True: "green", False: "bold red", None: ""}[figure.is_kept]
    value = "not run" if figure.value is None else f"{figure.value:.3g} {figure.unit}"
    table.add_row(figure.name, Text(value, style), figure.bound)
    for raw in figure.raw:
        table.add_row(Text(f"  {raw}", "dim"))
    return table


if __name__ == "__main__":
    sys.exit(main())
