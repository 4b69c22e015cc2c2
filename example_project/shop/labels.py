"""The labels of the parcels, in tables of the reports; written as it often is.

One session for the whole process, and an error that is logged and forgotten.
"""

from __future__ import annotations

import logging

from django.conf import settings
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column, scoped_session, sessionmaker

from example_project.shop.reporting import Base

logger = logging.getLogger(__name__)


class Label(Base):
    """The one label of a parcel."""

    __tablename__ = "label"

    line_no: Mapped[int] = mapped_column(primary_key=True)


engine = create_engine(settings.SHOP_REPORTS_URL, **settings.SHOP_REPORTS_OPTIONS)
session = scoped_session(sessionmaker(engine))


def open_book() -> None:
    """Make the table; a worker does so before it forks, and keeps the connection."""
    Base.metadata.create_all(engine)


def write(line_no: int, *, copies: int = 1) -> None:
    """
    Write the label of a parcel, unless it has one.

    Args:
        copies: With 2 the printer stutters, and the table refuses the second one.
    """
    if session.get(Label, line_no) is not None:
        return
    for _ in range(copies):
        try:
            session.add(Label(line_no=line_no))
            session.commit()
        except IntegrityError:
            # The error of this line is that there is no rollback.
            logger.warning("line %s has a label already", line_no)
