"""Takes arguments, return values and secrets out of Celery's own records.

Celery puts them beside the text too, as the attribute `data`, which formatters of JSON
write. What it logs of a task is filtered at the loggers that it uses, so that whatever
handler the user has gets no other record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from celery_resilience._celery import running
from celery_resilience._celery_worker import LOG_IGNORED, LOG_RETRY, quoting_lines
from celery_resilience.redaction import MASK, mask, safe_text, show_arguments

#: The loggers by which Celery tells of a task or quotes a message.
LOGGERS = (
    "celery.app.trace",
    "celery.pool",
    "celery.worker.consumer.consumer",
    "celery.worker.request",
    "celery.worker.strategy",
)

#: What of a record's `data` is taken out, and what of that says nothing.
TAKEN_OUT = frozenset({"args", "kwargs", "return_value"})
SAYS_NOTHING = (None, "", "()", "[]", "{}", "None")


NamesOf = Callable[[Any], tuple[Sequence[str], Collection[str]]]


class CeleryRecords(logging.Filter):
    """
    Redacts Celery's records; those that our own repeat do not pass.

    Args:
        names_of: The names of a task's positional parameters, and of the arguments to
            hide besides the usual ones.
        tells: Whether a line of ours tells of retries and ignored tasks.
        is_ours: Whether a task's deliveries are settled by us.
    """

    def __init__(
        self,
        names_of: NamesOf,
        *,
        tells: Callable[[], bool],
        is_ours: Callable[[Any], bool],
    ) -> None:
        super().__init__()
        self._names_of = names_of
        self._tells = tells
        self._is_ours = is_ours

    def filter(self, record: logging.LogRecord) -> bool:
        """Take out what may be secret; False where our own line says the same."""
        data = record.__dict__.get("data")
        shown = quoting_lines().get(record.msg) if isinstance(record.msg, str) else None
        if shown is not None:
            _take_quotes_out(record, shown)
        elif isinstance(data, Mapping):
            if self._is_repeated(record, data):
                return False
            record.__dict__["data"] = _redacted(data)
            if isinstance(record.args, Mapping):
                record.args = _redacted(record.args)
        if record.exc_info or (isinstance(data, Mapping) and "exc" in data):
            self._take_secrets_out(record)
        return True

    def _is_repeated(self, record: logging.LogRecord, data: Mapping[str, Any]) -> bool:
        is_ours_too = record.msg == LOG_RETRY or (
            record.msg == LOG_IGNORED and data.get("description") == "ignored"
        )
        if not is_ours_too or (here := running()) is None:
            return False
        task, request = here
        # What is applied eagerly is no delivery, of which we would tell.
        return not request.is_eager and self._is_ours(task) and self._tells()

    def _take_secrets_out(self, record: logging.LogRecord) -> None:
        """Mask what the running task's hidden arguments hold, wherever it is quoted."""
        secrets = self._secrets()
        if not secrets:
            return
        arguments = record.args
        if isinstance(arguments, Mapping):
            masked = {name: _masked(it, secrets) for name, it in arguments.items()}
            record.args = record.__dict__["data"] = masked
        elif arguments:
            record.args = tuple(_masked(it, secrets) for it in arguments)
        if record.exc_info:
            text = logging.Formatter().formatException(record.exc_info)
            masked_text = mask(text, secrets)
            if masked_text != text:
                # Another formatter would write the exception anew.
                record.exc_info, record.exc_text = None, masked_text

    def _secrets(self) -> tuple[str, ...]:
        here = running()
        if here is None:
            return ()
        task, request = here
        parameters, hidden = self._names_of(task)
        found = show_arguments(
            request.args, request.kwargs, parameters=parameters, hidden=hidden
        ).secrets
        # An exception is told by its repr.
        return (*found, *(inner for it in found if (inner := repr(it)[1:-1]) != it))


def _redacted(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: MASK if name in TAKEN_OUT and value not in SAYS_NOTHING else value
        for name, value in data.items()
    }


class _Quoted:
    """An argument of a record whose text and repr are the same."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


def _masked(value: Any, secrets: Collection[str]) -> Any:
    if isinstance(value, str):
        return mask(value, secrets)
    if isinstance(value, BaseException):
        return _Quoted(mask(safe_text(value), secrets))
    return value


def _take_quotes_out(record: logging.LogRecord, shown: int) -> None:
    arguments = record.args if isinstance(record.args, tuple) else ()
    record.args = tuple(
        # The repr of a decoder's error holds the whole body.
        _Quoted(safe_text(it)) if isinstance(it, BaseException) else it
        for it in arguments[:shown]
    ) + (_Quoted(MASK),) * len(arguments[shown:])


def filter_celerys(records: CeleryRecords) -> None:
    """Let Celery's loggers redact what they log, in place of an earlier filter."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for known in [it for it in logger.filters if isinstance(it, CeleryRecords)]:
            logger.removeFilter(known)
        logger.addFilter(records)
