"""The ledger: one appended line for each effect on the world outside.

Whatever the shop reports is counted from here. A line is written with one
system call, so that children may share the file and a killed one leaves no
half of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

#: Where the shop keeps its databases, a local queue and the ledger.
FOLDER = Path(
    os.environ.get("SHOP_FOLDER", Path(__file__).parents[1] / ".demo")
).resolve()
PATH = FOLDER / "ledger.jsonl"


class Effect(StrEnum):
    """What was done to an order; money is the bank's to take, the rest the shop's."""

    ACCEPTED = "accepted"
    CHARGED = "charged"
    SHIPPED = "shipped"
    APOLOGISED = "apologised"


@dataclass(frozen=True, slots=True)
class Entry:
    """
    One effect.

    Attributes:
        line_no: The order's line in the file.
        cents: Money that was taken, or what a parcel was worth.
        at: Wall time, in seconds.
        key: With which the bank was asked for the money, if with any.
    """

    effect: Effect
    line_no: int
    cents: int
    at: float
    key: str | None = None


def append(
    path: Path, effect: Effect, line_no: int, cents: int = 0, *, key: str | None = None
) -> None:
    """Write one effect down."""
    entry = {"effect": effect, "line_no": line_no, "cents": cents, "at": time.time()}
    if key is not None:
        entry["key"] = key
    data = f"{json.dumps(entry)}\n".encode()
    ledger = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(ledger, data)
    finally:
        os.close(ledger)


class Reader:
    """
    Follows a ledger while it grows.

    Args:
        path: May not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_entries(self) -> Iterator[Entry]:
        """What was written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            yield Entry(**{**entry, "effect": Effect(entry["effect"])})
