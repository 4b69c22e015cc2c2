"""FILTERS as SQL: it narrows down, and Python decides what SQL cannot."""

from __future__ import annotations

import re

from sqlalchemy import or_
from sqlalchemy.sql import ColumnElement

from celery_resilience.failed.filters import Filter
from celery_resilience.failed.rows import GHOST
from celery_resilience.failed.sql_table import failed
from celery_resilience.redaction import storable


def conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    """What every row that matches has, and perhaps a few more."""
    found = [failed.c.reason != GHOST]
    equal = {
        failed.c.state: wanted.state,
        failed.c.queue: wanted.queue,
        failed.c.failed_queue: wanted.failed_queue,
        failed.c.reason: wanted.reason,
        failed.c.release: wanted.release,
    }
    found += [
        column == storable(value)
        for column, value in equal.items()
        if value is not None
    ]
    if wanted.ids is not None:
        found.append(failed.c.id.in_(wanted.ids))
    if wanted.since is not None:
        found.append(failed.c.last_failed_at >= wanted.since)
    if wanted.until is not None:
        found.append(failed.c.last_failed_at <= wanted.until)
    if wanted.group is not None:
        low = wanted.group.lower()
        found.append(failed.c.fingerprint.between(low, low + "g"))
    if wanted.message is not None and wanted.message.isascii():
        message = storable(wanted.message)
        found.append(failed.c.message.icontains(message, autoescape=True))
    for column, glob in (
        (failed.c.task, wanted.task),
        (failed.c.worker, wanted.worker),
    ):
        if glob is not None:
            found.append(column.like(_like(glob), escape="\\"))
    if wanted.exception is not None:
        like = _like(wanted.exception)
        found.append(
            or_(
                failed.c.exception.like(like, escape="\\"),
                failed.c.exception.like("%." + like, escape="\\"),
            )
        )
    return found


def needs_python(wanted: Filter) -> bool:
    """SQL only narrows these down: LIKE knows no [classes], SQLite ASCII's case."""
    return bool(
        wanted.task
        or wanted.worker
        or wanted.exception
        or wanted.args
        or not (wanted.message or "").isascii()
    )


def _like(glob: str) -> str:
    """A pattern that matches at least what *glob* does."""
    if "[" in glob:
        return "%"
    escaped = re.sub(r"([\\%_])", r"\\\1", glob)
    return escaped.replace("*", "%").replace("?", "_")
