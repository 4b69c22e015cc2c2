"""Files that are whole or not there, and stay after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def put_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """
    Make a file that only its owner may read.

    Written under another name, flushed to the disk with its folder, and renamed:
    a file with its final name is whole.

    Args:
        path: Its folder is made when it is missing.
        write: Writes the file.

    Raises:
        OSError: The disk does not take it; nothing is left behind, and what was
            there is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    was_there = path.exists()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(partial, "xb", opener=_owners_only) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
        _flush_folder(path.parent)
    except BaseException:
        for left in (partial,) if was_there else (partial, path):
            with contextlib.suppress(OSError):
                left.unlink()
        raise


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _owners_only(path: str, flags: int) -> int:
    """The folder may be anybody's to read; what is in it is not."""
    return os.open(path, flags, 0o600)
