"""The receipts that a process has printed, all of them: this leaks."""

from __future__ import annotations

#: What a receipt with its picture of the shop takes.
BYTES = 512 << 10

_printed: list[bytes] = []


def keep(line_no: int) -> None:
    """Print a receipt, and never let go of it."""
    _printed.append(f"{line_no:<{BYTES}}".encode())
