"""What is logged, for tests to look at."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class Recorder(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def recorded(name: str, level: int = logging.INFO) -> Iterator[list[logging.LogRecord]]:
    """What a logger, and those below it, log meanwhile from *level* on."""
    logger, recorder = logging.getLogger(name), Recorder()
    before = logger.level
    logger.addHandler(recorder)
    logger.setLevel(level)
    try:
        yield recorder.records
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(before)
