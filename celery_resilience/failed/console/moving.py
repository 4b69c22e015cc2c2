"""The verbs that move failed tasks out of the store and into it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from celery_resilience.errors import ConfigurationError
from celery_resilience.failed.archive import read_lines, write_lines
from celery_resilience.failed.console import show
from celery_resilience.failed.console.words import (
    DONE,
    REFUSED,
    Operator,
    Words,
    filter_of,
    is_agreed,
)
from celery_resilience.failed.filters import Filter, parse_age_s, parse_state
from celery_resilience.failed.record import State


def prune(failed: Operator, words: Words) -> int:
    """Forget what is done with, or what is said."""
    wanted = filter_of(words, default=None)
    state = parse_state(words["state"], None)
    if state is State.REPLAYING:
        raise ConfigurationError("a replay is under way there: reopen what to prune")
    if (
        words["older_than"] is None
        and words["keep"] is None
        and wanted == Filter(state=wanted.state)
    ):
        raise ConfigurationError("say which: --older-than, --keep, or FILTERS")
    if words["older_than"] is not None:
        oldest = time.time() - parse_age_s(words["older_than"])
        until = oldest if wanted.until is None else min(oldest, wanted.until)
        wanted = replace(wanted, until=until)
    if state is not None:
        states = [state]
    else:
        states = [State.RESOLVED, State.DISCARDED]
        if words["state"] == "all":
            states.append(State.UNRESOLVED)
    failed.collect_first()
    found = sorted(
        (-summary.last_failed_at, summary.id)
        for state in states
        for summary in failed.store.list(replace(wanted, state=state))
    )
    ids = [id for _, id in found[words["keep"] or 0 :]]
    if not is_agreed("prune", failed, ids, {**words, "ids": ()}):
        return REFUSED
    archive = None if words["archive"] is None else Path(words["archive"])
    try:
        pruned = failed.tasks.prune(ids, archive=archive)
    except OSError as exc:
        raise ConfigurationError(f"nothing was pruned: {archive}: {exc}") from exc
    show.say(f"{pruned} pruned")
    return failed.code


def export(failed: Operator, words: Words) -> int:
    """Write failed tasks as lines."""
    wanted = filter_of(words, default=None)
    failed.collect_first()
    ids = (summary.id for summary in failed.store.list(wanted))
    lines = failed.tasks.export(ids, raw=words["raw"])
    if words["file"] is None:
        show.lines(lines)
        return failed.code
    try:
        count = write_lines(Path(words["file"]), lines)
    except OSError as exc:
        raise ConfigurationError(f"{words['file']}: {exc}") from exc
    show.say(f"{count} exported to {words['file']}")
    return failed.code


def import_file(failed: Operator, words: Words) -> int:
    """Take lines in, all of them or none."""
    with contextlib.ExitStack() as stack:
        file: BinaryIO = words["file"]
        if not file.seekable():
            copied = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copied)
            file = copied
        try:
            # All of it is looked at before any of it is taken in.
            report = failed.tasks.import_lines(read_lines(file), dry_run=True)
            if not words["dry_run"]:
                report = failed.tasks.import_lines(read_lines(file))
        except (OSError, EOFError, zlib.error) as exc:
            raise ConfigurationError(f"{file.name}: {exc}") from exc
    done = "would be imported" if words["dry_run"] else "imported"
    show.say(f"{report.imported} {done}, {report.known} are there already")
    return DONE
