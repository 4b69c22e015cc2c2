"""FILTERS: the one grammar with which list, replay, discard and the API select."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase

from celery_resilience.errors import ConfigurationError
from celery_resilience.failed.record import State, Summary
from celery_resilience.outcome import Reason
from celery_resilience.redaction import MAX_VALUE_CHARS, cut, storable

UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, slots=True)
class Filter:
    """
    Which failed tasks are meant; what is None does not matter.

    Attributes:
        task, exception, worker: Globs; an exception's short name matches too.
        message: A part of the message, any case.
        group: The start of a fingerprint.
        since, until: Wall time of the last failure, in seconds.
        args: Pairs of an argument's name and its text.
        ids: Only these.
    """

    task: str | None = None
    queue: str | None = None
    failed_queue: str | None = None
    exception: str | None = None
    message: str | None = None
    reason: str | None = None
    group: str | None = None
    since: float | None = None
    until: float | None = None
    state: State | None = State.UNRESOLVED
    release: str | None = None
    worker: str | None = None
    args: tuple[tuple[str, str], ...] = ()
    ids: tuple[str, ...] | None = None

    @property
    def is_everything(self) -> bool:
        """No word of the user narrows it."""
        return self == Filter(state=self.state, until=self.until)


def parse_state(text: str | None, default: State | None) -> State | None:
    """
    A state from a word, or "all" for every one.

    Raises:
        ConfigurationError: There is no such state.
    """
    if text is None:
        return default
    if text == "all":
        return None
    try:
        return State(text)
    except ValueError:
        known = ", ".join([*State, "all"])
        raise ConfigurationError(
            f"--state {text!r} is not known: use {known}"
        ) from None


def parse_reason(text: str | None) -> str | None:
    """
    A reason from a word.

    Raises:
        ConfigurationError: There is no such reason.
    """
    if text is None or text in set(Reason):
        return text
    raise ConfigurationError(
        f"--reason {text!r} is not known: use one of {', '.join(Reason)}"
    )


def parse_age_s(text: str) -> float:
    """
    Seconds from "90s", "30m", "2h", "7d" or "1w".

    Raises:
        ConfigurationError: It is not such a text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise ConfigurationError(
            f"{text!r} is not an age: write 90s, 30m, 2h, 7d or 1w"
        )
    return float(match[1]) * UNITS_S[match[2]]


def parse_time(
    text: str | float | timedelta | datetime | None, now: float
) -> float | None:
    """
    A wall time in seconds from an age ("2h" ago) or a time in ISO 8601.

    Args:
        text: A time without a zone is in UTC.
        now: Wall time, in seconds.

    Raises:
        ConfigurationError: It is neither.
    """
    if text is None:
        return None
    if isinstance(text, timedelta):
        return now - text.total_seconds()
    if isinstance(text, datetime):
        return _stamp(text)
    if isinstance(text, int | float):
        return float(text)
    if re.fullmatch(r"\d+(\.\d+)?[smhdw]", text.strip()):
        return now - parse_age_s(text)
    try:
        return _stamp(datetime.fromisoformat(text.strip()))
    except ValueError:
        raise ConfigurationError(
            f"{text!r} is not a time: write an age (90s, 30m, 2h, 7d, 1w) or "
            "ISO 8601 (2026-11-23T22:10)"
        ) from None


def parse_argument(text: str) -> tuple[str, str]:
    """
    NAME=VALUE as a pair.

    Raises:
        ConfigurationError: There is no "=" in it.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigurationError(f"--arg {text!r} must be NAME=VALUE")
    return name, value


def is_match(wanted: Filter, found: Summary, arguments: str) -> bool:
    """
    Whether a failed task is meant.

    Args:
        arguments: Its redacted arguments by name, as JSON.
    """
    return (
        _matches_words(wanted, found)
        and _matches_globs(wanted, found)
        and (wanted.message or "").casefold() in found.message.casefold()
        and (not wanted.args or _matches_arguments(wanted.args, json.loads(arguments)))
    )


def _matches_words(wanted: Filter, found: Summary) -> bool:
    equal = (
        (wanted.state, found.state),
        (wanted.queue, found.queue),
        (wanted.failed_queue, found.failed_queue),
        (wanted.reason, found.reason),
        (wanted.release, found.release),
    )
    return (
        all(word is None or storable(word) == value for word, value in equal)
        and (wanted.ids is None or found.id in wanted.ids)
        and (wanted.since is None or found.last_failed_at >= wanted.since)
        and (wanted.until is None or found.last_failed_at <= wanted.until)
        and found.fingerprint.startswith((wanted.group or "").lower())
    )


def _matches_globs(wanted: Filter, found: Summary) -> bool:
    return (
        (wanted.task is None or fnmatchcase(found.task, wanted.task))
        and (wanted.worker is None or fnmatchcase(found.worker, wanted.worker))
        and (
            wanted.exception is None
            or fnmatchcase(found.exception, wanted.exception)
            or fnmatchcase(found.exception.rpartition(".")[2], wanted.exception)
        )
    )


def _matches_arguments(
    wanted: tuple[tuple[str, str], ...], arguments: dict[str, str]
) -> bool:
    """Whether every wanted argument is there, as a text or as it is shown."""
    return all(
        name in arguments
        and arguments[name] in (value, repr(cut(value, MAX_VALUE_CHARS)))
        for name, value in wanted
    )


def _stamp(at: datetime) -> float:
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
