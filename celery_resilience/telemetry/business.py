"""What a run counts and observes itself, on its way to the worker's main process.

A run adds up what it counts; the sum goes with its facts, once, when its body has
ended in whichever way but its process's death.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

from celery_resilience.errors import ConfigurationError
from celery_resilience.telemetry.instruments import BUSINESS_BOUNDS, PREFIX

logger = logging.getLogger("celery_resilience.telemetry")

#: Characters of what one run may tell, which is half of what its facts may have; what is
#: above is counted as dropped.
MAX_CHARS = 60_000

#: Characters of one sum, or of all the buckets of one name, besides name and labels.
_NUMBER_CHARS, _BUCKETS_CHARS = 40, 500

#: Labels of one name, and characters of a label's value.
MAX_LABELS = 8
MAX_VALUE_CHARS = 100

#: Names and labels that a process remembers to be right.
MAX_CHECKED = 1_000

NAME = re.compile(r"[a-z][a-z0-9]*(?:[._][a-z0-9]+)*")
MAX_NAME = 64

#: Of what may be counted or observed: sums of it are floats, too.
MAX_AMOUNT = 1e300

#: Endings that Prometheus gives a name, and labels that are its own.
_ENDINGS = ("_total", "_count", "_sum", "_bucket", "_created", "_info")
_RESERVED_LABELS = frozenset({"le", "quantile", "job", "instance"})

Key = tuple[str, tuple[tuple[str, str], ...]]

#: Names and labels that were looked at already, and values that were told of.
_checked: set[tuple[str, tuple[str, ...]]] = set()
_refused_values: set[str] = set()


class RunCounts:
    """
    What one run has counted and observed.

    Args:
        hides: Whether a label of that name would show what is never shown.
    """

    __slots__ = ("_chars", "_counts", "_dropped", "_hides", "_observed")

    def __init__(self, hides: Callable[[str], bool]) -> None:
        self._hides = hides
        self._counts: dict[Key, float] = {}
        self._observed: dict[Key, list[Any]] = {}
        self._dropped = 0
        self._chars = 0

    def count(self, name: str, amount: float, labels: Mapping[str, Any]) -> None:
        """
        Count *amount* more.

        Raises:
            ConfigurationError: The name, a label or the type of the amount is none.
        """
        key = self._key(name, labels)
        if not self._is_usable(name, amount, least=0):
            return
        if key in self._counts or self._has_room(key, _NUMBER_CHARS):
            self._counts[key] = self._counts.get(key, 0) + amount

    def observe(self, name: str, value: float, labels: Mapping[str, Any]) -> None:
        """
        Put *value* into its bucket.

        Raises:
            ConfigurationError: The name, a label or the type of the value is none.
        """
        key = self._key(name, labels)
        if not self._is_usable(name, value, least=-MAX_AMOUNT):
            return
        found = self._observed.get(key)
        if found is None:
            if not self._has_room(key, _BUCKETS_CHARS):
                return
            found = self._observed[key] = [0.0, {}]
        found[0] += value
        bucket = bisect_left(BUSINESS_BOUNDS, value)
        found[1][bucket] = found[1].get(bucket, 0) + 1

    def fact(self) -> list[Any]:
        """All of it, for JSON."""
        return [
            [[*key, amount] for key, amount in self._counts.items()],
            [[*key, sum, [*b.items()]] for key, (sum, b) in self._observed.items()],
            self._dropped,
        ]

    def _has_room(self, key: Key, more: int) -> bool:
        chars = len(json.dumps(key)) + more
        if self._chars + chars <= MAX_CHARS:
            self._chars += chars
            return True
        self._dropped += 1
        return False

    def _is_usable(self, name: str, value: Any, *, least: float) -> bool:
        """Whether a number can be added: a wrong one must not fail a payment."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(
                f"metric {name}: the amount must be an int or a float, got {value!r}"
            )
        if least <= value <= MAX_AMOUNT:
            return True
        self._dropped += 1
        if name not in _refused_values:
            _refused_values.add(name)
            logger.warning(
                "metric %s: a number that is not finite, above %g, or negative though it "
                "is counted, is not taken (told once)",
                name,
                MAX_AMOUNT,
            )
        return False

    def _key(self, name: str, labels: Mapping[str, Any]) -> Key:
        names = (*sorted(labels),)
        if (name, names) not in _checked:
            self._check(name, names)
        return name, tuple(
            (label, _value(name, label, labels[label])) for label in names
        )

    def _check(self, name: str, labels: tuple[str, ...]) -> None:
        wrong = _wrong_name(name)
        if not wrong and len(labels) > MAX_LABELS:
            wrong = f"may have at most {MAX_LABELS} labels, got {len(labels)}"
        for label in labels:
            if wrong:
                break
            if NAME.fullmatch(label) is None or "." in label or len(label) > MAX_NAME:
                wrong = f"label {label!r} must be lower case letters, digits and _"
            elif label in _RESERVED_LABELS:
                wrong = f"label {label!r} is one of Prometheus's own"
            elif self._hides(label):
                wrong = f"label {label!r} is the name of what is never shown"
        if wrong:
            raise ConfigurationError(f"metric {name!r}: {wrong}")
        if len(_checked) < MAX_CHECKED:
            _checked.add((name, labels))


def _wrong_name(name: Any) -> str:
    if (
        not isinstance(name, str)
        or NAME.fullmatch(name) is None
        or len(name) > MAX_NAME
    ):
        return (
            f"the name must be lower case words of at most {MAX_NAME} characters, "
            'joined by _ or ".", such as "orders" or "amount_eur"'
        )
    if name.startswith((PREFIX, PREFIX.replace(".", "_"))):
        return f"names that begin with {PREFIX} are our own"
    if name.replace(".", "_").endswith(_ENDINGS):
        return f"the name must not end in {', '.join(_ENDINGS)}, which are added"
    return ""


def _value(name: str, label: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise ConfigurationError(
            f"metric {name}: label {label} must be a text, an int or a bool, "
            f"got {value!r}"
        )
    return str(value)[:MAX_VALUE_CHARS]
