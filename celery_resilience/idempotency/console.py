"""What the verbs of `celery -A shop resilience keys` do.

Data on stdout, talk on stderr; what a run returned is never shown. Exit codes: 0 done,
1 a key was not found, 2 usage or refused, 4 store unreachable, 130 interrupted.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from heapq import nlargest
from itertools import count
from typing import Any

from celery_resilience.errors import (
    ConfigurationError,
    MissingExtra,
    NotFound,
    SchemaMismatch,
    StoreUnavailable,
)
from celery_resilience.idempotency.record import WAITING, KeyRecord, KeyState
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.install import installation_of
from celery_resilience.redaction import printable

DONE, NOT_FOUND, REFUSED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 4, 130

#: Digits of a key in a table; so many name one key of a million.
SHORT = 12

#: What may be the start of a key: fewer digits are an order's number.
DIGITS = "[0-9a-fA-F]{8,64}"

COLUMNS = ("KEY", "STATE", "BEGUN (UTC)", "RUNS", "RESULT", "TASK", "NAME", "TASK ID")

Words = Mapping[str, Any]


def run(app: Any, verb: str, words: Words, *, with_traceback: bool = False) -> int:
    """
    Run one verb.

    Args:
        app: The Celery app.
        verb: "list", "show" or "forget".
        words: Its options and arguments.
        with_traceback: Say also where a refusal comes from.

    Returns:
        The exit code.
    """
    try:
        app.loader.import_default_modules()
        code = _VERBS[verb](_store_of(app), words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except (ConfigurationError, MissingExtra, SchemaMismatch) as exc:
        _say_where(exc, with_traceback)
        say(f"{exc}")
        return REFUSED
    except StoreUnavailable as exc:
        _say_where(exc, with_traceback)
        say(f"unreachable: {exc}")
        return UNREACHABLE


def say(text: str, end: str = "\n") -> None:
    """Talk to the operator, on stderr."""
    print(printable(text, keep_newlines=True), file=sys.stderr, end=end, flush=True)


def find(store: KeyStore, word: str) -> KeyRecord:
    """
    The key that an operator means.

    Args:
        word: Its readable name, or at least the first 8 of its 64 digits.

    Raises:
        ConfigurationError: Several are meant.
        NotFound: None is.
    """
    found = {record.key: record for record in store.list(name=word)} if word else {}
    if not found and re.fullmatch(DIGITS, word):
        start = word.lower()
        if len(start) == 64:
            whole = store.get(start)
            found = {} if whole is None else {start: whole}
        else:
            found = {r.key: r for r in store.list() if r.key.startswith(start)}
    if not found:
        raise NotFound(f"no key {word!r}")
    if len(found) > 1:
        shown = ", ".join(f"{r.key[:SHORT]} of {r.task}" for r in _first(found, 5))
        raise ConfigurationError(
            f"{word!r} is ambiguous, it may be {shown}"
            + (" and others" if len(found) > 5 else "")
        )
    return next(iter(found.values()))


def to_dict(record: KeyRecord) -> dict[str, Any]:
    """A key as JSON has it."""
    is_leased = record.state in (KeyState.RUNNING, *WAITING)
    return {
        "schema": 1,
        "key": record.key,
        "name": record.name,
        "task": record.task,
        "state": str(record.state),
        "task_id": record.owner,
        "holder": record.holder,
        "runs": record.epoch,
        "begun_at": _time(record.begun_at),
        "lease_until": _time(record.lease_until) if is_leased else None,
        "expires_at": _time(record.expires_at),
        "result_bytes": record.result_bytes,
    }


def _store_of(app: Any) -> KeyStore:
    installation = installation_of(app)
    store: KeyStore | None = installation.key_store()
    if store is None:
        raise ConfigurationError(f"there is no store: {installation.store_choice.why}")
    return store


def _list(store: KeyStore, words: Words) -> int:
    state = _state_of(words["state"])
    limit: int = words["limit"]
    counted = count()
    found = store.list(state=state, task=words["task"] or "*")
    shown = nlargest(
        limit,
        (record for record, _ in zip(found, counted, strict=False)),
        key=lambda record: record.begun_at,
    )
    print_all = _print_json if words["output"] == "json" else _print_table
    print_all(shown)
    if (total := next(counted)) > limit:
        say(f"the newest {limit} of {total}; --limit shows more")
    elif not shown:
        say("nothing matches")
    return DONE


def _show(store: KeyStore, words: Words) -> int:
    try:
        document = to_dict(find(store, words["key"]))
    except NotFound as exc:
        say(f"{exc}")
        return NOT_FOUND
    if words["output"] == "json":
        print(json.dumps(document, indent=2))
        return DONE
    del document["schema"]
    for name, value in document.items():
        print(f"{name:13}{'' if value is None else printable(str(value))}")
    return DONE


def _forget(store: KeyStore, words: Words) -> int:
    code = DONE
    found: dict[str, KeyRecord] = {}
    for word in words["keys"]:
        try:
            record = find(store, word)
        except (NotFound, ConfigurationError) as exc:
            say(f"{exc}")
            code = max(code, NOT_FOUND if isinstance(exc, NotFound) else REFUSED)
        else:
            found[record.key] = record
    if found and not (words["yes"] or _is_agreed([*found.values()])):
        return REFUSED
    for record in found.values():
        if store.forget(record.key, is_running_too=words["running"]):
            say(f"forgotten: {record.key[:SHORT]} {record.name}")
            continue
        now = store.get(record.key)
        if now is not None and now.state is KeyState.RUNNING:
            say(
                f"{record.key[:SHORT]} {record.name} is running: its effect may happen "
                "twice if it is forgotten now; --running does it all the same"
            )
            code = REFUSED
    return code


_VERBS = {"list": _list, "show": _show, "forget": _forget}


def _is_agreed(records: Sequence[KeyRecord]) -> bool:
    """Show what would be forgotten, and ask."""
    _print_table(records, file=sys.stderr)
    say("the effect of a forgotten key may happen again")
    if not sys.stdin.isatty():
        say("nothing done: without a terminal, forget needs --yes")
        return False
    say(f"type {len(records)} to forget them:", end=" ")
    if sys.stdin.readline().strip() == str(len(records)):
        return True
    say("nothing done")
    return False


def _print_table(records: Sequence[KeyRecord], file: Any = None) -> None:
    """Print lines with tabs between, or on a terminal in columns."""
    file = file or sys.stdout
    rows = [COLUMNS, *map(_cells, records)] if records else []
    if not file.isatty():
        for row in rows:
            print("\t".join(row), file=file)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip(), file=file)


def _cells(record: KeyRecord) -> tuple[str, ...]:
    cells = (
        record.key[:SHORT],
        str(record.state),
        _time(record.begun_at)[:19],
        str(record.epoch),
        f"{record.result_bytes} B" if record.result_bytes else "-",
        *(record.task, record.name, record.owner),
    )
    return tuple(map(printable, cells))


def _print_json(records: Sequence[KeyRecord]) -> None:
    """Print one array."""
    print(json.dumps([to_dict(record) for record in records], indent=2))


def _state_of(word: str | None) -> KeyState | None:
    """The state that is meant."""
    if word is None:
        return None
    try:
        return KeyState(word)
    except ValueError:
        raise ConfigurationError(
            f"--state {word!r}: it is one of {', '.join(map(str, KeyState))}"
        ) from None


def _first(found: Mapping[str, KeyRecord], count: int) -> list[KeyRecord]:
    return [found[key] for key in sorted(found)[:count]]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _say_where(exc: Exception, with_traceback: bool) -> None:
    if with_traceback:
        say("".join(traceback.format_exception(exc)), end="")
