"""The table of failed tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    String,
)

from celery_resilience.failed.rows import GHOST
from celery_resilience.stores.sql import OPTIONS, LongBinary, LongText, table

VERSION = 1

failed = table(
    "resilience_failed",
    Column("namespace", String(64), primary_key=True),
    Column("id", String(32), primary_key=True),
    Column("state", String(12), nullable=False),
    Column("phase", String(8)),
    Column("token", String(32)),
    Column("copy", String(32)),
    Column("claimed_at", Float(53)),
    Column("to_queue", String(255)),
    Column("wants_new_id", Boolean, nullable=False, default=False),
    Column("is_forced", Boolean, nullable=False, default=False),
    Column("number", Integer, nullable=False, default=0),
    Column("replays", Integer, nullable=False, default=0),
    Column("replayed_as", String(255)),
    Column("settled_at", Float(53)),
    Column("note", LongText),
    Column("reason", String(32), nullable=False),
    Column("task", String(255), nullable=False),
    Column("task_id", String(255), nullable=False),
    Column("queue", String(255), nullable=False),
    Column("failed_queue", String(255), nullable=False),
    Column("exception", String(255), nullable=False),
    Column("message", LongText, nullable=False),
    Column("fingerprint", String(16), nullable=False),
    Column("worker", String(255), nullable=False),
    Column("release", String(255)),
    Column("first_failed_at", Float(53), nullable=False),
    Column("last_failed_at", Float(53), nullable=False),
    Column("in_chord", Boolean, nullable=False, default=False),
    Column("arguments", LongText, nullable=False),
    Column("attempts", LongText, nullable=False),
    Column("size", Integer, nullable=False),
    # Last, so that SQLite reads the others without the pages it overflows to.
    Column("document", LongBinary),
    Index("resilience_failed_state", "namespace", "state", "last_failed_at"),
    Index("resilience_failed_time", "namespace", "last_failed_at"),
    Index("resilience_failed_group", "namespace", "fingerprint", "last_failed_at"),
    Index("resilience_failed_task_id", "namespace", "task_id"),
    # With the size, so that the sizes are added up in the index alone.
    Index("resilience_failed_size", "namespace", "failed_queue", "size"),
)
# MySQL knows no partial indexes, and finds a ghost by its reason.
Index(
    "resilience_failed_ghosts",
    failed.c.namespace,
    failed.c.reason,
    failed.c.last_failed_at,
    info={
        OPTIONS: {
            "sqlite_where": failed.c.reason == GHOST,
            "postgresql_where": failed.c.reason == GHOST,
        }
    },
)

TABLES = [failed]


def columns(names: Sequence[str]) -> list[Column[Any]]:
    """The columns of these names, to be selected."""
    return [failed.c[name] for name in names]
