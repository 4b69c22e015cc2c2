"""The verb that sends failed tasks again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_resilience.errors import BrokerUnavailable, ConfigurationError
from celery_resilience.failed.console import show
from celery_resilience.failed.console.words import (
    REFUSED,
    SOME_FAILED,
    Operator,
    Words,
    chosen,
    is_agreed,
)
from celery_resilience.failed.filters import Filter, parse_state
from celery_resilience.failed.pages import pages
from celery_resilience.failed.record import State, Summary
from celery_resilience.failed.replay import ReplayReport

#: Seconds between two looks at replays that --wait waits for.
LOOK_S = 0.5

#: Ids in one look at the store.
PAGE = 500

#: Replays that failed again and are told one by one; -o json names all.
TOLD = 50


@dataclass(slots=True)
class Waited:
    """
    What became of the replays that were waited for.

    Attributes:
        ended: How many are in which state.
        failed_again: Those that are unresolved once more, by id.
    """

    ended: dict[str, int] = field(default_factory=dict)
    failed_again: dict[str, Summary] = field(default_factory=dict)


def replay(failed: Operator, words: Words) -> int:
    """Send failed tasks again, and wait for them where that is asked for."""
    if parse_state(words["state"], State.UNRESOLVED) is not State.UNRESOLVED:
        raise ConfigurationError(
            "only unresolved failed tasks are replayed: `failed reopen` makes "
            "discarded ones unresolved again"
        )
    ids, code = chosen(failed, words, State.UNRESOLVED)
    if words["dry_run"]:
        _dry_run(failed, ids, words)
        return code
    if not is_agreed("replay", failed, ids, words):
        return REFUSED
    report = _send(failed, ids, words)
    waited = Waited()
    try:
        if words["wait"] and report.sent:
            show.say(f"waiting for {len(report.sent)} replays; Ctrl-C ends the waiting")
            _wait(failed, report.sent, waited)
    finally:
        _tell(report, waited, words)
    if report.failed or report.skipped or waited.ended.get(State.UNRESOLVED):
        return SOME_FAILED
    return code


def _send(failed: Operator, ids: Sequence[str], words: Words) -> ReplayReport:
    report = ReplayReport()
    progress = show.Progress("replaying", len(ids))
    try:
        with progress:
            return failed.tasks.replay(
                ids,
                to_queue=words["to_queue"],
                new_id=words["new_id"],
                force=words["force"],
                report=report,
                on_progress=lambda r: progress.update(
                    len(r.sent) + len(r.failed) + len(r.skipped)
                ),
            )
    except (BrokerUnavailable, KeyboardInterrupt):
        for id in report.in_doubt:
            show.say(
                f"{id[:8]} may have been sent: whoever collects a minute later sends it "
                f"again, which runs once; `failed reopen {id[:8]}` gives it up"
            )
        _tell(report, Waited(), words)
        raise


def _tell(report: ReplayReport, waited: Waited, words: Words) -> None:
    for id in report.skipped:
        show.say(f"{id[:8]} is not unresolved: skipped")
    for id, why in report.failed.items():
        show.say(f"{id[:8]} was not sent: {why}")
    again = [*waited.failed_again.values()]
    for found in again[:TOLD]:
        show.say(
            f"{found.id[:8]} failed again: {found.reason}, "
            f"{found.exception.rpartition('.')[2]}: {found.message}"
        )
    if len(again) > TOLD:
        show.say(f"and {len(again) - TOLD} more failed again")
    if report.in_chord:
        show.say(show.CHORDS.format(count=report.in_chord))
    if words["output"] == "json":
        result: dict[str, Any] = {
            "schema": 1,
            "operation_id": report.operation_id,
            "sent": report.sent,
            "failed": report.failed,
            "skipped": report.skipped,
        }
        if report.in_doubt:
            result["in_doubt"] = report.in_doubt
        if waited.ended:
            result["ended"] = waited.ended
        if waited.failed_again:
            result["failed_again"] = {
                id: found.reason for id, found in waited.failed_again.items()
            }
        show.documents([result], "json", one=True)
        return
    show.say(
        f"{len(report.sent)} sent, {len(report.failed)} refused, "
        f"{len(report.skipped)} skipped"
    )
    if waited.ended:
        show.say(", ".join(f"{n} {state}" for state, n in waited.ended.items()))


def _dry_run(failed: Operator, ids: Sequence[str], words: Words) -> None:
    app, would_send, skipped, unknown, chords = failed.app, [], [], 0, 0
    for found in failed.store.get_many(ids):
        if found.summary.state is not State.UNRESOLVED:
            skipped.append(found.id)
            show.say(f"{found.id[:8]} is {found.summary.state}: it would be skipped")
            continue
        would_send.append(found.id)
        unknown += found.summary.task not in app.tasks
        chords += bool(found.document["in_chord"])
        if words["output"] != "json":
            show.entry(found.summary, key=found.document["idempotency_key"])
    if words["output"] == "json":
        result = {"schema": 1, "would_send": would_send, "skipped": skipped}
        show.documents([result], "json", one=True)
    show.say(f"{len(would_send)} would be sent")
    if unknown:
        show.say(f"{unknown} of them are tasks that this app does not know")
    if chords:
        show.say(show.CHORDS.format(count=chords))


def _wait(failed: Operator, ids: Sequence[str], waited: Waited) -> None:
    """Wait until every replay has ended, and fill in how."""
    waiting = set(ids)
    while waiting:
        failed.tasks.collect()
        for page in pages(sorted(waiting), PAGE):
            waiting.difference_update(page)
            for found in failed.store.list(Filter(state=None, ids=tuple(page))):
                if found.state is State.REPLAYING:
                    waiting.add(found.id)
                    continue
                state = str(found.state)
                waited.ended[state] = waited.ended.get(state, 0) + 1
                if found.state is State.UNRESOLVED:
                    waited.failed_again[found.id] = found
        if waiting:
            time.sleep(LOOK_S)
