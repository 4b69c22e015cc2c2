"""Retry rules: for which exceptions a task is tried again, and which of them counts.

Policy only: no Celery, no I/O, no clock.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from celery_resilience.errors import CONTROL_FLOW, NAMED_ONLY, ConfigurationError
from celery_resilience.known_words import known_words

#: An exception, or its name: "requests.ConnectionError", or without a module.
Named = type[Exception] | str

#: Most seconds of a wait, and of a deadline.
MAX_WAIT_S = 604_800.0
MAX_DEADLINE_S = 30 * 86_400.0

#: Characters of a budget's name.
MAX_BUDGET = 64

#: What a rule for a base class does not reach: groups are asked for their members.
_ONLY_BY_NAME = (*NAMED_ONLY, BaseExceptionGroup)

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Rule:
    """
    What `On` and `Never` have in common.

    Attributes:
        exceptions: Those that it is for.
    """

    __slots__ = ("exceptions", "key")

    @known_words()
    def __init__(self, *exceptions: Named) -> None:
        if not exceptions:
            raise ConfigurationError(f"{self._title}() needs at least one exception")
        for named in exceptions:
            self._check(named)
        self.exceptions = exceptions
        #: Names the rule on messages.
        self.key = hashlib.blake2b(
            "\0".join(map(_full_name, exceptions)).encode(), digest_size=4
        ).hexdigest()

    @property
    def label(self) -> str:
        """The names of its exceptions, as a person would say them."""
        return ", ".join(map(_short_name, self.exceptions))

    @property
    def _title(self) -> str:
        return type(self).__name__

    def _check(self, named: Any) -> None:
        if isinstance(named, str):
            if _DOTTED.fullmatch(named):
                return
        elif isinstance(named, type) and issubclass(named, CONTROL_FLOW):
            raise ConfigurationError(
                f"{self._title}({named.__name__}): it steers Celery, and is no failure"
            )
        elif isinstance(named, type) and issubclass(named, Exception):
            return
        raise ConfigurationError(
            f"{self._title}() takes exceptions (subclasses of Exception) and their names, "
            f"such as 'requests.ConnectionError', got {named!r}"
        )

    def __repr__(self) -> str:
        return f"{self._title}({self.label})"


class On(Rule):
    """
    Run the task again when it raises one of these exceptions, up to a limit.

    Args:
        exceptions: Classes, and names such as "requests.ConnectionError" or
            "ConnectionError", for which nothing is imported. Subclasses count, and so
            does an exception that was raised `from` one of them.
        attempts: Runs of a task that may end by this rule, the first one included; the
            last of them is its failure. None: any number, until the deadline.
        backoff_s: Seconds to wait, as (least, most): the wait is drawn at random
            between the least and twice, four times, eight times … as much, but not
            above the most. A number: that long each time. A Retry-After that the
            exception carries is waited for, whatever stands here.
        deadline_s: Seconds since the task's first failure after which it is not tried
            again. None: only `attempts` limits it.
        budget: Name of the retry budget that its retries take from, shared by the
            fleet; see `resilience_retry_budgets`. None: none.

    Raises:
        ConfigurationError: One of these is not accepted.
    """

    __slots__ = ("attempts", "backoff_s", "budget", "deadline_s")

    @known_words()
    def __init__(
        self,
        *exceptions: Named,
        attempts: int | None = 8,
        backoff_s: float | tuple[float, float] = (1.0, 300.0),
        deadline_s: float | None = None,
        budget: str | None = None,
    ) -> None:
        super().__init__(*exceptions)
        if attempts is not None and not _is_count(attempts):
            self._refuse("attempts", attempts, "a whole number from 1, or None")
        if deadline_s is not None and not _is_seconds(deadline_s, MAX_DEADLINE_S):
            self._refuse(
                "deadline_s",
                deadline_s,
                "a number of seconds above 0, at most 30 days, or None",
            )
        if attempts is None and deadline_s is None:
            raise ConfigurationError(
                f"{self!r}: attempts and deadline_s are both None: it would be tried "
                "again for ever"
            )
        if budget is not None and not is_budget_name(budget):
            self._refuse(
                "budget", budget, f"a name of 1 to {MAX_BUDGET} characters, or None"
            )
        self.attempts = attempts
        self.backoff_s = self._checked_backoff(backoff_s)
        self.deadline_s = deadline_s
        self.budget = budget

    def _checked_backoff(self, backoff_s: Any) -> tuple[float, float]:
        is_pair = isinstance(backoff_s, tuple | list) and len(backoff_s) == 2
        least, most = backoff_s if is_pair else (backoff_s, backoff_s)
        if not (
            _is_seconds(least, MAX_WAIT_S)
            and _is_seconds(most, MAX_WAIT_S)
            and least <= most
        ):
            self._refuse(
                "backoff_s",
                backoff_s,
                "a number of seconds above 0, at most a week, or a pair of such: (least, "
                "most)",
            )
        return float(least), float(most)

    def _refuse(self, option: str, value: Any, accepted: str) -> None:
        raise ConfigurationError(
            f"{self!r}: {option} must be {accepted}, got {value!r}"
        )

    def __str__(self) -> str:
        least, most = self.backoff_s
        wait = f"{least:g} s" if least == most else f"{least:g} to {most:g} s"
        limits = [] if self.attempts is None else [f"at most {self.attempts} attempts"]
        if self.deadline_s is not None:
            limits.append(f"within {self.deadline_s:g} s")
        budget = "" if self.budget is None else f", budget {self.budget}"
        return f"{self.label}: {', '.join(limits)}, {wait} apart{budget}"


class Never(Rule):
    """
    Fail the task at once when it raises one of these exceptions.

    Args:
        exceptions: As those of `On`. In an exception group, one of them is enough.

    Raises:
        ConfigurationError: One of these is not accepted.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.label}: never"


def rule_for(exc: BaseException, rules: Sequence[Rule]) -> Rule | None:
    """
    The first rule for *exc*, or else for what it was raised from, and so on.

    Of an exception group each member has its rule: one that is never tried again
    decides for all; so does one without a rule; else it is the rule that comes first.
    What was merely being handled as it was raised (`__context__`) says nothing of it.
    """
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        found = _first(type(current), rules)
        if found is not None:
            return found
        if isinstance(current, BaseExceptionGroup):
            return _rule_for_group(current, rules)
        if isinstance(current, NAMED_ONLY):
            return None
        current = current.__cause__
    return None


def members_of(exc: BaseException) -> Iterator[BaseException]:
    """An exception, what it was raised from, and the members of groups among them."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exc]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting.append(current.__cause__)
        if isinstance(current, BaseExceptionGroup):
            waiting.extend(current.exceptions)


def wrong_rules(rules: Any) -> str | None:
    """What is wrong with a task's `retry_rules`, as a sentence; or None."""
    if not isinstance(rules, list | tuple) or not all(
        isinstance(rule, On | Never) for rule in rules
    ):
        return f"retry_rules must be a tuple of On(...) and Never(...), got {rules!r}"
    for number, rule in enumerate(rules):
        for named in rule.exceptions:
            earlier = next((r for r in rules[:number] if reaches(r, named)), None)
            if earlier is not None:
                return (
                    f"retry_rules: {rule!r} is never asked for {_short_name(named)}: "
                    f"{earlier!r} comes before it"
                )
    return None


def reaches(rule: Rule, named: Named) -> bool:
    """Whether *rule* is for each exception that *named* is."""
    if isinstance(named, type):
        return _first(named, [rule]) is not None
    return named in rule.exceptions


def is_budget_name(name: Any) -> bool:
    """Whether it may name a budget."""
    return isinstance(name, str) and 1 <= len(name) <= MAX_BUDGET


def _rule_for_group(
    group: BaseExceptionGroup[Any], rules: Sequence[Rule]
) -> Rule | None:
    found = [rule_for(member, rules) for member in group.exceptions]
    for rule in found:
        if isinstance(rule, Never):
            return rule
    if None in found:
        return None
    return min(found, key=lambda rule: [*rules].index(rule) if rule else 0)


def _first(kind: type[BaseException], rules: Sequence[Rule]) -> Rule | None:
    return next(
        (rule for rule in rules if any(_is(kind, it) for it in rule.exceptions)), None
    )


def _is(kind: type[BaseException], named: Named) -> bool:
    """Whether exceptions of *kind* are meant by *named*."""
    found = _base_named(kind, named)
    if found is None or issubclass(kind, CONTROL_FLOW):
        return False
    return not issubclass(kind, _ONLY_BY_NAME) or issubclass(found, _ONLY_BY_NAME)


def _base_named(kind: type[BaseException], named: Named) -> type[Any] | None:
    """The class among *kind* and its bases that *named* is."""
    meant: Any = named
    if isinstance(named, str):
        # A package often has a class under another name than where it is defined; what
        # was raised is of a module that is imported.
        module, _, name = named.rpartition(".")
        meant = getattr(sys.modules.get(module), name, None) if module else None
        if not isinstance(meant, type):
            bases = kind.__mro__
            return next((base for base in bases if named in _names_of(base)), None)
    return meant if issubclass(kind, meant) else None


def _names_of(kind: type[Any]) -> tuple[str, str]:
    return kind.__name__, _full_name(kind)


def _full_name(named: Named | type[Any]) -> str:
    if isinstance(named, str):
        return named
    return f"{named.__module__}.{named.__qualname__}"


def _short_name(named: Named) -> str:
    return named if isinstance(named, str) else named.__name__


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seconds(value: Any, most: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and isfinite(value)
        and 0 < value <= most
    )
