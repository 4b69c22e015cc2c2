"""What the words of an operator mean: which failed tasks, and whether to go on."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery_resilience.errors import (
    BrokerUnavailable,
    ConfigurationError,
    NotFound,
    PublishRefused,
)
from celery_resilience.failed.api import FailedTasks
from celery_resilience.failed.console import show
from celery_resilience.failed.filters import (
    Filter,
    parse_age_s,
    parse_argument,
    parse_reason,
    parse_state,
    parse_time,
)
from celery_resilience.failed.record import State

DONE, SOME_FAILED, REFUSED, UNREACHABLE, TRIPPED, INTERRUPTED = 0, 1, 2, 4, 5, 130


Words = Mapping[str, Any]


class Operator:
    """The failed tasks, collected first; a broker that is away does not hide them."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.tasks = FailedTasks(app, collects=False)
        self.store = self.tasks.store
        self.is_complete = True

    def collect_first(self) -> int:
        """
        Collect; what hinders it is said, and what is in the store is used.

        Returns:
            How many documents were collected.
        """
        try:
            return self.tasks.collect().documents
        except BrokerUnavailable as exc:
            self.is_complete = False
            show.say(
                f"the broker is unreachable ({exc}): what waits in the failed queues "
                "is not shown"
            )
        except PublishRefused as exc:
            show.say(f"not everything could be collected: {exc}")
        return 0

    @property
    def code(self) -> int:
        """The exit code, if nothing else goes wrong."""
        return DONE if self.is_complete else UNREACHABLE


def filter_of(words: Words, default: State | None) -> Filter:
    """
    FILTERS as a filter.

    Args:
        default: The state that is meant without `--state`.

    Raises:
        ConfigurationError: A word is not known.
    """
    now = time.time()
    return Filter(
        task=words["task"],
        queue=words["queue"],
        failed_queue=words["failed_queue"],
        exception=words["exception"],
        message=words["message"],
        reason=parse_reason(words["reason"]),
        group=words["group"],
        since=parse_time(words["since"], now),
        until=parse_time(words["until"], now),
        state=parse_state(words["state"], default),
        release=words["release"],
        worker=words["worker"],
        args=tuple(parse_argument(text) for text in words["arg"]),
    )


def chosen(failed: Operator, words: Words, state: State) -> tuple[list[str], int]:
    """
    What a bulk verb means, collected and frozen now.

    Args:
        state: The one that is meant without `--state`.

    Returns:
        Whole ids, and the exit code so far.

    Raises:
        ConfigurationError: The words do not say what is meant.
    """
    wanted = filter_of(words, default=state)
    is_filtered = wanted != Filter(state=wanted.state) or words["state"] is not None
    if not words["ids"] and not is_filtered and not words["everything"]:
        raise ConfigurationError("say which: ids, FILTERS, or --all")
    failed.collect_first()
    if words["ids"] and (is_filtered or words["everything"]):
        raise ConfigurationError("give ids, or FILTERS, not both")
    if not words["ids"]:
        return failed.tasks.matching(wanted, limit=words["limit"]), failed.code
    missing: list[NotFound] = []
    ids = failed.tasks.resolve_all(words["ids"], missing=missing)
    for exc in missing:
        show.say(str(exc))
    return ids[: words["limit"]], SOME_FAILED if missing else failed.code


def is_agreed(verb: str, failed: Operator, ids: Sequence[str], words: Words) -> bool:
    """Show what a bulk verb means, and ask; ids that were typed are not asked for."""
    if words["yes"] or words["ids"] or not ids:
        return True
    shown = failed.store.list(Filter(state=None, ids=tuple(ids[:500])), limit=10)
    show.table(shown, file=sys.stderr)
    show.say(f"{len(ids)} match")
    if not sys.stdin.isatty():
        show.say(f"nothing done: without a terminal, {verb} of many needs --yes")
        return False
    show.say(f"type {len(ids)} to {verb} them:", end=" ")
    if sys.stdin.readline().strip() == str(len(ids)):
        return True
    show.say("nothing done")
    return False


def rule_of(text: str) -> tuple[str, Callable[[Mapping[str, Any]], bool]]:
    """A --check: a state's count, or the age of the oldest unresolved one."""
    match = re.fullmatch(r"\s*(\w+)\s*>\s*(\w+(?:\.\w+)?)\s*", text)
    names = [*map(str, State), "oldest"]
    if match is None or match[1] not in names:
        raise ConfigurationError(
            f"--check {text!r} must be like 'unresolved>100' or 'oldest>1h'; "
            f"it knows {', '.join(names)}"
        )
    name, limit = match[1], match[2]
    if name == "oldest":
        age_s = parse_age_s(limit)
        return text, lambda stats: (stats["oldest_s"] or 0.0) > age_s
    if not limit.isdigit():
        raise ConfigurationError(f"--check {text!r}: {limit!r} is not a number")
    return text, lambda stats: stats[name] > int(limit)
