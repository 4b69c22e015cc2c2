"""What a batch is told by who begins it, and the checks of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery_resilience.batches.tally import ErrorLimits
from celery_resilience.errors import ConfigurationError

#: Items of a chunk, and what may go wrong in a batch, unless it is said.
CHUNK = 500
MAX_ERRORS = 100
MIN_ITEMS = 50

#: So that the name of its place in the store is at most 64.
MAX_NAME_CHARS = 57

#: Threads of one batch.
MAX_CONCURRENCY = 256

ErrorTypes = type[Exception] | tuple[type[Exception], ...]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """
    The options of `RunView.batch`, which says what they mean.

    Raises:
        ConfigurationError: One is wrong; the message names it and what is accepted.
    """

    name: str
    key: Callable[[Any], Any] | str | None = None
    chunk: int = CHUNK
    skip: tuple[type[Exception], ...] = ()
    stop: tuple[type[Exception], ...] = ()
    max_errors: int | None = MAX_ERRORS
    max_error_rate: float | None = None
    min_items: int = MIN_ITEMS
    concurrency: int = 1
    session: Any = None
    savepoints: bool = True
    keep_failed: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        self._check(
            "name",
            isinstance(self.name, str) and 1 <= len(self.name) <= MAX_NAME_CHARS,
            f"a text of 1 to {MAX_NAME_CHARS} characters",
        )
        self._check(
            "key",
            self.key is None or callable(self.key) or isinstance(self.key, str),
            "a callable that takes an item, the name of an attribute or field, or None",
        )
        self._check("chunk", _is_count(self.chunk), "a whole number from 1")
        for name in ("skip", "stop"):
            object.__setattr__(self, name, self._types(name))
        self._check(
            "max_errors",
            self.max_errors is None
            or (_is_whole(self.max_errors) and self.max_errors >= 0),
            "a whole number from 0, or None",
        )
        rate = self.max_error_rate
        self._check(
            "max_error_rate",
            rate is None
            or (
                isinstance(rate, int | float)
                and not isinstance(rate, bool)
                and 0 <= rate <= 1
            ),
            "a number from 0 to 1, or None",
        )
        self._check("min_items", _is_count(self.min_items), "a whole number from 1")
        self._check(
            "concurrency",
            _is_count(self.concurrency) and self.concurrency <= MAX_CONCURRENCY,
            f"a whole number from 1 to {MAX_CONCURRENCY}",
        )
        self._check(
            "session",
            self.session is None or hasattr(self.session, "begin_nested"),
            "a Session of SQLAlchemy's, or None",
        )
        self._check(
            "keep_failed",
            # Called, a task or a signature runs the body here.
            self.keep_failed is None
            or (callable(self.keep_failed) and not _is_sent(self.keep_failed)),
            "a callable that takes an item's key and returns a signature, such as "
            f"keep_failed={getattr(self.keep_failed, '__name__', 'enrich_row')}.s, or "
            "None",
        )
        if self.keep_failed is not None and self.key is None:
            raise ConfigurationError(
                f"batch {self.name!r}: keep_failed needs key=, by which the failed task "
                "finds its item again"
            )

    @property
    def limits(self) -> ErrorLimits:
        """How much may go wrong."""
        return ErrorLimits(self.max_errors, self.max_error_rate, self.min_items)

    @property
    def column(self) -> str:
        """By which a query is read, unless it is said."""
        return self.key if isinstance(self.key, str) else "id"

    def _types(self, name: str) -> tuple[type[Exception], ...]:
        value: Any = getattr(self, name)
        types = value if isinstance(value, tuple) else (value,)
        self._check(
            name,
            all(inspect.isclass(t) and issubclass(t, Exception) for t in types),
            "an exception's type, or a tuple of them",
        )
        found: tuple[type[Exception], ...] = types
        return found

    def _check(self, name: str, is_right: bool, accepted: str) -> None:
        if not is_right:
            raise ConfigurationError(
                f"batch {self.name!r}: {name} must be {accepted}, "
                f"got {getattr(self, name)!r}"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_sent(value: Any) -> bool:
    """Whether it is a task, or a signature of one."""
    return hasattr(value, "apply_async")
