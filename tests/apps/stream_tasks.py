"""Tasks of the test app that read many rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyed_tasks import die_at, once_here
from retrying import SOON_S


def register(app: Any, base: Any, note: Callable[..., None]) -> None:
    """Add the tasks to *app*; with a plain *base* they read all rows at once."""

    def enrich(
        self: Any, url: str, how: str = "", at: int = 0, gate: str = "", size: int = 10
    ) -> int:
        from sqlalchemy import MetaData, create_engine, select
        from sqlalchemy.orm import Session

        note(self.name, self.request.id, self.request.retries)
        engine = create_engine(url)
        schema = MetaData()
        schema.reflect(engine, only=["orders"])
        orders = schema.tables["orders"]
        count = 0
        try:
            with Session(engine) as session:
                query = select(orders.c.id)
                rows: Any = (
                    self.resilience.stream(query, session=session, size=size)
                    if hasattr(self, "resilience")
                    else session.execute(query).all()
                )
                for row in rows:
                    session.execute(
                        orders.update()
                        .where(orders.c.id == row.id)
                        .values(done=orders.c.done + 1)
                    )
                    note("row", row.id, self.request.id)
                    if row.id == at:
                        die_at(how, "kill", at)
                        if how == "raise" and once_here("raised"):
                            raise ValueError("once")
                        if how == "retry" and self.request.retries == 0:
                            raise self.retry(countdown=SOON_S)
                        if gate:
                            _wait_for(gate)
                    count += 1
                session.commit()
        finally:
            engine.dispose()
        return count

    def stream_numbers(self: Any, count: int) -> int:
        return sum(1 for _ in self.resilience.stream(range(count), size=10))

    app.task(base=base, bind=True, shared=False, name="stream_numbers")(stream_numbers)
    app.task(
        base=base,
        bind=True,
        shared=False,
        name="enrich",
        acks_late=True,
        reject_on_worker_lost=True,
    )(enrich)


def _wait_for(gate: str) -> None:
    """Until a file is there."""
    import time

    while not Path(gate).exists():
        time.sleep(0.05)
