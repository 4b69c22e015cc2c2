"""An effect in a database of the user's own, for tasks that are killed around it."""

from __future__ import annotations

import functools
import time
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from celery_resilience import once

#: Long enough to be hit by a kill, on either side of the commit.
BEFORE_S, AFTER_S = 0.01, 0.02


class Base(DeclarativeBase):
    """Of the user's."""


class Effect(Base):
    """One effect of the message with that number."""

    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


@functools.cache
def engine_for(url: str) -> Engine:
    """The engine of this process, which is a child that forks no more."""
    patience: dict[str, Any] = {"timeout": 60} if url.startswith("sqlite") else {}
    return create_engine(url, connect_args=patience, poolclass=NullPool)


def have_effect(url: str, number: int, *, is_keyed: bool) -> Any:
    """
    Insert a row, and commit.

    Returns:
        The row's id; of a duplicate, that of the first.
    """
    with Session(engine_for(url)) as session, session.begin():
        first = once(session, f"effect:{number}", namespace="f") if is_keyed else None
        if first is not None and not first:
            return first.result
        session.add(effect := Effect(number=number))
        session.flush()
        row = effect.id
        if first is not None:
            first.save(row)
        time.sleep(BEFORE_S)
    time.sleep(AFTER_S)
    return row
