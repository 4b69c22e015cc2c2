"""What the verbs of `celery -A shop failed` do.

Data on stdout, talk on stderr. Exit codes: 0 done, 1 some records failed, 2
usage or refused, 4 store or broker unreachable, 5 a --check tripped, 130
interrupted.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery_resilience.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MissingExtra,
    NotFound,
    PublishRefused,
    SchemaMismatch,
    StoreUnavailable,
)
from celery_resilience.failed import show
from celery_resilience.failed.api import FailedTasks
from celery_resilience.failed.bootstep import collect_forever
from celery_resilience.failed.filters import (
    Filter,
    parse_age_s,
    parse_argument,
    parse_reason,
    parse_state,
    parse_time,
)
from celery_resilience.failed.record import State
from celery_resilience.failed.replay import ReplayReport
from celery_resilience.install import installation_of

DONE, SOME_FAILED, REFUSED, UNREACHABLE, TRIPPED, INTERRUPTED = 0, 1, 2, 4, 5, 130

#: Seconds between two looks at replays that --wait waits for.
LOOK_S = 0.5

Words = Mapping[str, Any]


def run(app: Any, verb: str, words: Words) -> int:
    """
    Run one verb.

    Args:
        app: The Celery app.
        verb: Such as "list".
        words: Its options and arguments.

    Returns:
        The exit code.
    """
    try:
        app.loader.import_default_modules()
        if verb == "schema":
            return _schema(app)
        return _VERBS[verb](_Failed(app), words)
    except KeyboardInterrupt:
        show.say("interrupted")
        return INTERRUPTED
    except (ConfigurationError, MissingExtra, SchemaMismatch, NotFound) as exc:
        show.say(f"{exc}")
        return REFUSED
    except (StoreUnavailable, BrokerUnavailable) as exc:
        show.say(f"unreachable: {exc}")
        return UNREACHABLE


class _Failed:
    """The failed tasks, collected first; a broker that is away does not hide them."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.tasks = FailedTasks(app, collects=False)
        self.store = self.tasks.store
        self.is_complete = True

    def collect_first(self) -> None:
        with self.app.connection_for_read() as connection:
            away = (*connection.connection_errors, OSError)
        try:
            self.tasks.collect()
        except away as exc:
            self.is_complete = False
            show.say(
                f"the broker is unreachable ({type(exc).__name__}: {exc}): what waits "
                "in the failed queues is not shown"
            )
        except PublishRefused as exc:
            show.say(f"not everything could be collected: {exc}")

    @property
    def code(self) -> int:
        return DONE if self.is_complete else UNREACHABLE


def _list(failed: _Failed, words: Words) -> int:
    wanted = _filter(words, default=State.UNRESOLVED)
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
        whole = (failed.store.get(summary.id) for summary in found)
        show.documents((f.to_dict() for f in whole if f is not None), output)
    return failed.code


def _show(failed: _Failed, words: Words) -> int:
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
        show.documents([dict(found.document) for found in shown], "jsonl")
    elif words["output"] == "json":
        show.documents([found.to_dict() for found in shown], "json", one=True)
    else:
        for found in shown:
            show.detail(found, verbose=words["verbose"])
    return code


def _stats(failed: _Failed, words: Words) -> int:
    rules = [_rule(text) for text in words["checks"]]
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


def _replay(failed: _Failed, words: Words) -> int:
    failed.collect_first()
    ids, code = _chosen(failed, words, State.UNRESOLVED)
    if words["dry_run"]:
        return _dry_run(failed, ids, words, code)
    if not _is_agreed("replay", failed, ids, words):
        return REFUSED
    report = ReplayReport()
    progress = show.Progress("replaying", len(ids))
    try:
        with progress:
            report = failed.tasks.replay(
                ids,
                to_queue=words["to_queue"],
                new_id=words["new_id"],
                on_progress=lambda r: progress.update(
                    len(r.sent) + len(r.failed) + len(r.skipped)
                ),
            )
    finally:
        failed.tasks.close()
    for id in report.skipped:
        show.say(f"{id[:8]} is not unresolved: skipped")
    for id, why in report.failed.items():
        show.say(f"{id[:8]} was not sent: {why}")
    waited = _wait(failed, report.sent) if words["wait"] else {}
    if words["output"] == "json":
        result = {
            "schema": 1,
            "operation_id": report.operation_id,
            "sent": report.sent,
            "failed": report.failed,
            "skipped": report.skipped,
        }
        show.documents(
            [{**result, "ended": waited} if waited else result], "json", one=True
        )
    else:
        show.say(
            f"{len(report.sent)} sent, {len(report.failed)} refused, "
            f"{len(report.skipped)} skipped"
        )
        if waited:
            show.say(", ".join(f"{n} {state}" for state, n in waited.items()))
    if report.failed or report.skipped or waited.get(State.UNRESOLVED):
        return SOME_FAILED
    return code


def _dry_run(failed: _Failed, ids: Sequence[str], words: Words, code: int) -> int:
    app, known, unknown, chords = failed.app, 0, 0, 0
    for id in ids:
        found = failed.store.get(id)
        if found is None:
            continue
        known += found.summary.task in app.tasks
        unknown += found.summary.task not in app.tasks
        chords += bool(found.document["in_chord"])
        print(f"{id} {show.line(found.summary)}")
    show.say(f"{known + unknown} would be sent")
    if unknown:
        show.say(f"{unknown} of them are tasks that this app does not know")
    if chords:
        show.say(show.CHORDS.format(count=chords))
    return code


def _wait(failed: _Failed, ids: Sequence[str]) -> dict[str, int]:
    """Wait until every replay has ended, and count how."""
    waiting, ended = set(ids), dict.fromkeys(map(str, State), 0)
    while waiting:
        failed.tasks.collect()
        still = {
            s.id
            for s in failed.store.list(
                Filter(state=State.REPLAYING, ids=tuple(sorted(waiting)))
            )
        }
        for id in waiting - still:
            found = failed.store.get(id)
            if found is not None:
                ended[found.summary.state] += 1
        waiting = still
        if waiting:
            time.sleep(LOOK_S)
    return {state: count for state, count in ended.items() if count}


def _discard(failed: _Failed, words: Words) -> int:
    return _set_state(failed, words, "discard", State.UNRESOLVED, "discarded")


def _reopen(failed: _Failed, words: Words) -> int:
    return _set_state(failed, words, "reopen", State.DISCARDED, "reopened")


def _set_state(
    failed: _Failed, words: Words, verb: str, state: State, done: str
) -> int:
    failed.collect_first()
    ids, code = _chosen(failed, words, state)
    if not _is_agreed(verb, failed, ids, words):
        return REFUSED
    change: Callable[[Sequence[str]], int] = getattr(failed.store, verb)
    changed = change(ids)
    show.say(f"{changed} {done}")
    if changed < len(ids):
        show.say(f"{len(ids) - changed} were not {state} any more")
        return SOME_FAILED
    return code


def _collect(failed: _Failed, words: Words) -> int:
    if words["once"]:
        failed.collect_first()
        return failed.code
    show.say("collecting; Ctrl-C ends it")
    collect_forever(failed.app, lambda: False)
    return DONE


def _schema(app: Any) -> int:
    print(installation_of(app).schema_sql(), end="")
    return DONE


_VERBS: Mapping[str, Callable[[_Failed, Words], int]] = {
    "list": _list,
    "show": _show,
    "stats": _stats,
    "replay": _replay,
    "discard": _discard,
    "reopen": _reopen,
    "collect": _collect,
}


def _filter(words: Words, default: State | None) -> Filter:
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


def _chosen(failed: _Failed, words: Words, state: State) -> tuple[list[str], int]:
    """The ids that a bulk verb means, frozen now; and the exit code so far."""
    wanted = _filter(words, default=state)
    is_filtered = wanted != Filter(state=wanted.state)
    if not words["ids"] and not is_filtered and not words.get("everything"):
        raise ConfigurationError("say which: ids, FILTERS, or --all")
    if words["ids"] and (is_filtered or words.get("everything")):
        raise ConfigurationError("give ids, or FILTERS, not both")
    if not words["ids"]:
        return failed.tasks.matching(wanted, limit=words["limit"]), failed.code
    ids, code = [], failed.code
    for start in words["ids"]:
        try:
            ids.append(failed.tasks.resolve(start))
        except NotFound as exc:
            show.say(str(exc))
            code = SOME_FAILED
    return list(dict.fromkeys(ids))[: words["limit"]], code


def _is_agreed(verb: str, failed: _Failed, ids: Sequence[str], words: Words) -> bool:
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


def _rule(text: str) -> tuple[str, Callable[[Mapping[str, Any]], bool]]:
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
