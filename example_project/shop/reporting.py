"""The shop's reporting tables, in SQLAlchemy beside Django's."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from sqlalchemy import create_engine, delete
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """Every reporting table."""


class Revenue(Base):
    """What was paid for the orders of a day, by delivery zone."""

    __tablename__ = "revenue"

    ordered_on: Mapped[date] = mapped_column(primary_key=True)
    zone: Mapped[str] = mapped_column(primary_key=True)
    orders: Mapped[int]
    cents: Mapped[int]


def replace_revenue(url: str, rows: Iterable[Revenue]) -> None:
    """Write the table anew, in one transaction."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.execute(delete(Revenue))
        session.add_all(rows)
    engine.dispose()
