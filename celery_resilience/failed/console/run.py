"""What the verbs of `celery -A shop failed` do.

Data on stdout, talk on stderr. Exit codes: 0 done, 1 some records failed, 2
usage or refused, 4 store or broker unreachable, 5 a --check tripped, 130
interrupted.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery_resilience.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MissingExtra,
    NotFound,
    SchemaMismatch,
    StoreUnavailable,
)
from celery_resilience.failed.bootstep import collect_forever
from celery_resilience.failed.console import moving, replaying, show
from celery_resilience.failed.console.words import (
    DONE,
    INTERRUPTED,
    REFUSED,
    SOME_FAILED,
    TRIPPED,
    UNREACHABLE,
    Operator,
    Words,
    chosen,
    filter_of,
    is_agreed,
    rule_of,
)
from celery_resilience.failed.record import State
from celery_resilience.install import installation_of


def run(app: Any, verb: str, words: Words, *, with_traceback: bool = False) -> int:
    """
    Run one verb.

    Args:
        app: The Celery app.
        verb: Such as "list".
        words: Its options and arguments.
        with_traceback: Say also where a refusal comes from.

    Returns:
        The exit code.
    """
    try:
        app.loader.import_default_modules()
        if verb == "schema":
            return _schema(app)
        code = _VERBS[verb](Operator(app), words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        show.say("interrupted")
        return INTERRUPTED
    except (ConfigurationError, MissingExtra, SchemaMismatch, NotFound) as exc:
        _say_where(exc, with_traceback)
        show.say(f"{exc}")
        return REFUSED
    except (StoreUnavailable, BrokerUnavailable) as exc:
        _say_where(exc, with_traceback)
        show.say(f"unreachable: {exc}")
        return UNREACHABLE
    except OSError as exc:
        if exc.errno == errno.EPIPE:
            raise  # click ends quietly
        show.say(f"{exc}")
        return SOME_FAILED


def _say_where(exc: Exception, with_traceback: bool) -> None:
    if with_traceback:
        show.say("".join(traceback.format_exception(exc)), end="")


def _list(failed: Operator, words: Words) -> int:
    wanted = filter_of(words, default=State.UNRESOLVED)
    failed.collect_first()
    found = failed.store.list(wanted, limit=words["limit"])
    output = words["output"]
    if output == "ids":
        for summary in found:
            print(summary.id)
    elif output == "table":
        shown = show.table(found)
        if shown == words["limit"]:
            show.say(f"the last {shown}; --limit shows more")
        elif not shown:
            show.say("nothing matches")
    else:
        whole = failed.store.get_many(summary.id for summary in found)
        show.documents((found.to_dict() for found in whole), output)
    return failed.code


def _show(failed: Operator, words: Words) -> int:
    failed.collect_first()
    code, shown = failed.code, []
    for start in words["ids"]:
        try:
            found = failed.store.get(failed.tasks.resolve(start))
        except NotFound as exc:
            show.say(str(exc))
            code = SOME_FAILED
            continue
        if found is not None:
            shown.append(found)
    if words["raw"]:
        lines = failed.tasks.export([found.id for found in shown], raw=True)
        show.lines(lines)
    elif words["output"] == "json":
        is_one = len(words["ids"]) == 1
        if shown or not is_one:
            show.documents([found.to_dict() for found in shown], "json", one=is_one)
    else:
        for found in shown:
            show.detail(found, verbose=words["verbose"])
    return code


def _stats(failed: Operator, words: Words) -> int:
    rules = [rule_of(text) for text in words["checks"]]
    failed.collect_first()
    stats = dict(failed.store.stats())
    if words["output"] == "json":
        show.documents([{"schema": 1, **stats}], "json", one=True)
    else:
        show.stats(stats)
    tripped = [text for text, holds in rules if holds(stats)]
    for text in tripped:
        show.say(f"check tripped: {text}")
    return TRIPPED if tripped else failed.code


def _discard(failed: Operator, words: Words) -> int:
    return _set_state(failed, words, "discard", State.UNRESOLVED, "discarded")


def _reopen(failed: Operator, words: Words) -> int:
    return _set_state(failed, words, "reopen", State.DISCARDED, "reopened")


def _set_state(
    failed: Operator, words: Words, verb: str, state: State, done: str
) -> int:
    ids, code = chosen(failed, words, state)
    if not is_agreed(verb, failed, ids, words):
        return REFUSED
    change: Callable[[Sequence[str]], int] = getattr(failed.store, verb)
    changed = change(ids)
    show.say(f"{changed} {done}")
    if changed < len(ids):
        show.say(f"{len(ids) - changed} could not be {done}")
        return SOME_FAILED
    return code


def _collect(failed: Operator, words: Words) -> int:
    if words["once"]:
        show.say(f"{failed.collect_first()} collected")
        return failed.code
    show.say("collecting; Ctrl-C ends it")
    collect_forever(failed.app, lambda: False)
    return DONE


def _schema(app: Any) -> int:
    print(installation_of(app).schema_sql(), end="")
    return DONE


_VERBS: Mapping[str, Callable[[Operator, Words], int]] = {
    "list": _list,
    "show": _show,
    "stats": _stats,
    "replay": replaying.replay,
    "discard": _discard,
    "reopen": _reopen,
    "prune": moving.prune,
    "export": moving.export,
    "import": moving.import_file,
    "collect": _collect,
}
