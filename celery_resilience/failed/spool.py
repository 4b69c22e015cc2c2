"""Files on the worker's disk, one for each envelope that the broker would not take."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from celery_resilience.errors import ConfigurationError, PublishRefused
from celery_resilience.failed.envelope import loads, posted
from celery_resilience.failed.files import put_file
from celery_resilience.message import OriginalMessage

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

    def check(self) -> None:
        """
        Make the folder, or say why not.

        Raises:
            ConfigurationError: Nothing could be written there.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_writable = os.access(self._folder, os.W_OK | os.X_OK)
        except OSError as exc:
            raise ConfigurationError(f"resilience_spool_dir: {exc}") from exc
        if not is_writable:
            raise ConfigurationError(
                f"resilience_spool_dir: {self._folder} is not writable"
            )

    def put(self, message: OriginalMessage) -> bool:
        """
        Keep an envelope until the broker takes it.

        Returns:
            False when the disk does not take it; nothing is left behind.
        """
        name = f"{time.time_ns():020d}-{os.getpid()}-{id(message):x}{SUFFIX}"
        try:
            put_file(self._folder / name, lambda file: _write(file, message))
        except OSError as exc:
            if not self._is_full:
                logger.error(
                    "the spool %s takes nothing, so nothing more is acknowledged: %s",
                    self._folder,
                    exc,
                )
            self._is_full = True
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
            except OSError as exc:
                logger.error("cannot read %s from the spool: %s", path, exc)
                continue
            try:
                message = posted(loads(data))
            except ValueError as exc:
                logger.error("%s is no envelope (%s): set aside", path, exc)
                with contextlib.suppress(FileNotFoundError):
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


def _write(file: BinaryIO, message: OriginalMessage) -> None:
    file.write(message.body)
