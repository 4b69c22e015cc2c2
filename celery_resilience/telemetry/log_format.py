"""How our records, and with `resilience_log_format` all of a worker's, are written.

Policy only: the standard library's `json` and twenty lines for logfmt. A JSON library
would bring a formatter, which the user's own configuration has where it is wanted, and
would make a setting need an extra.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from celery_resilience.redaction import (
    MASK,
    is_hidden,
    printable,
    safe_text,
    without_secrets,
)

#: What every record has, and what `Formatter` adds.
_OF_EVERY_RECORD = frozenset(
    {
        *vars(logging.LogRecord("", 0, "", 0, "", (), None)),
        *("asctime", "message", "taskName", "data"),
    }
)

#: The names of facts on a record, where `logging`, Celery or structlog has another use
#: for the name.
ATTRIBUTES = {
    "args": "task_args",
    "event": "event_name",
    "exception": "exception_type",
    "kwargs": "task_kwargs",
    "message": "exception_message",
    "task": "task_name",
}

Write = Callable[[Mapping[str, Any]], str]


class Told:
    """
    What one of our records tells.

    Args:
        facts: By their names, redacted.
        sentence: The same for those who read with their eyes.
        write: Writes the facts; None: the sentence is the text.
    """

    __slots__ = ("_write", "facts", "sentence")

    def __init__(
        self, facts: Mapping[str, Any], sentence: str, write: Write | None
    ) -> None:
        self.facts = facts
        self.sentence = sentence
        self._write = write

    def __str__(self) -> str:
        return self.sentence if self._write is None else self._write(self.facts)


def tell(
    logger: logging.Logger,
    level: int,
    facts: Mapping[str, Any],
    sentence: str,
    log_format: str | None,
) -> None:
    """Write one record, with its facts as attributes; those that it has stay."""
    if not logger.isEnabledFor(level):
        return
    told = Told(facts, sentence, WRITERS[log_format])
    path, line, function, _ = logger.findCaller()
    record = logger.makeRecord(
        logger.name, level, path, line, "%s", (told,), None, function
    )
    # With `extra`, `logging` would raise for what an app's record factory has set.
    for name, value in facts.items():
        vars(record).setdefault(ATTRIBUTES.get(name, name), value)
    logger.handle(record)


def as_json(facts: Mapping[str, Any]) -> str:
    """One line of JSON, in ASCII."""
    try:
        return _dumps(facts)
    except (TypeError, ValueError, RecursionError):
        # Keys that are no texts, a value within itself, or a number that is none.
        return _dumps({str(name): _json_value(it) for name, it in facts.items()})


def _dumps(value: Any) -> str:
    return json.dumps(value, default=safe_text, allow_nan=False)


def _json_value(value: Any) -> Any:
    try:
        _dumps(value)
    except (TypeError, ValueError, RecursionError):
        return safe_text(value)
    return value


def as_logfmt(facts: Mapping[str, Any]) -> str:
    """Pairs of name and value, without those that are None."""
    return " ".join(
        f"{_logfmt_name(name)}={_logfmt_value(value)}"
        for name, value in facts.items()
        if value is not None
    )


def _logfmt_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in str(name))


def _logfmt_value(value: Any) -> str:
    text = printable(safe_text(value, 65_536), keep_newlines=True)
    if text and not any(c in text for c in ' ="\n\t'):
        return text
    return json.dumps(text, ensure_ascii=False)


WRITERS: Mapping[str | None, Write | None] = {
    None: None,
    "json": as_json,
    "logfmt": as_logfmt,
}


class LineFormatter(logging.Formatter):
    """
    Writes each record of a worker as one line of facts.

    Args:
        log_format: "json" or "logfmt".
        hidden: Names of attributes that are masked, besides the usual ones, in lower
            case.
        instead_of: The formatter that it replaces.
    """

    def __init__(
        self,
        log_format: str,
        hidden: Collection[str] = (),
        instead_of: logging.Formatter | None = None,
    ) -> None:
        super().__init__()
        self.instead_of = instead_of
        self._hidden = frozenset(hidden)
        write = WRITERS[log_format]
        assert write is not None
        self._write = write

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = datetime.fromtimestamp(record.created, UTC)
        facts: dict[str, Any] = {
            "at": at.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.processName,
        }
        told = (
            record.args[0] if isinstance(record.args, tuple) and record.args else None
        )
        if isinstance(told, Told):
            facts.update(told.facts)
            facts.setdefault("message", told.sentence)
        else:
            facts["message"] = printable(record.getMessage(), keep_newlines=True)
            for name, value in vars(record).items():
                if name not in _OF_EVERY_RECORD and name not in facts:
                    is_secret = is_hidden(name, self._hidden)
                    facts[name] = (
                        MASK if is_secret else without_secrets(value, self._hidden)
                    )
        traceback = record.exc_text
        if record.exc_info and not traceback:
            traceback = self.formatException(record.exc_info)
        if traceback:
            facts["traceback"] = printable(traceback, keep_newlines=True)
        if record.stack_info:
            facts["stack"] = self.formatStack(record.stack_info)
        return self._write(facts)
