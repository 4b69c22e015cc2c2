"""Files on the worker's disk that hold envelopes the broker would not take.

One file a document, written under another name, flushed to the disk with its
folder, and renamed: a file with its final name is whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from celery_resilience.delivery.message import OriginalMessage
from celery_resilience.errors import PublishRefused
from celery_resilience.failed.envelope import loads, posted

logger = logging.getLogger("celery_resilience.failed")

SUFFIX = ".envelope.json"
BROKEN = ".broken"


class Spool:
    """
    A folder of envelopes; several workers of one host may share it.

    Args:
        folder: Made when it is missing, readable by its owner only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_full = False

    def put(self, message: OriginalMessage) -> bool:
        """
        Keep an envelope until the broker takes it.

        Returns:
            False when the disk does not take it; nothing is left behind.
        """
        name = f"{time.time_ns():020d}-{os.getpid()}-{id(message):x}{SUFFIX}"
        partial = self._folder / f".{name}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(partial, "xb") as file:
                file.write(message.body)
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, self._folder / name)
            self._flush_folder()
        except OSError as exc:
            if not self._is_full:
                logger.error(
                    "the spool %s takes nothing, so nothing more is acknowledged: %s",
                    self._folder,
                    exc,
                )
            self._is_full = True
            with contextlib.suppress(OSError):
                partial.unlink()
            return False
        self._is_full = False
        return True

    def drain(self, publish: Callable[[OriginalMessage], None]) -> int:
        """
        Hand every envelope to *publish*, oldest first, and remove what it took.

        Returns:
            How many were taken.

        Raises:
            PublishRefused: Some were refused; the others were tried all the same.
        """
        taken, refused = 0, None
        for path in self.files():
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue  # another worker took it
            try:
                message = posted(loads(data))
            except (ValueError, KeyError) as exc:
                logger.error("%s is no envelope (%s): set aside", path, exc)
                path.rename(path.with_name(path.name + BROKEN))
                continue
            try:
                publish(message)
            except PublishRefused as exc:
                refused = exc
                continue
            path.unlink(missing_ok=True)
            taken += 1
        if refused is not None:
            raise refused
        return taken

    def files(self) -> list[Path]:
        """The envelopes that wait, oldest first."""
        try:
            return sorted(
                path
                for path in self._folder.iterdir()
                if path.name.endswith(SUFFIX) and not path.name.startswith(".")
            )
        except OSError:
            return []

    def _flush_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
