"""Each row once, from where an earlier run stopped, in bounded memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Column, Engine, Integer, String, create_engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_resilience.batches.sources import IterableSource, source_of
from celery_resilience.batches.stream import (
    LOOK_AGAIN_S,
    NoCheckpoint,
    StoredCheckpoint,
    stream,
)
from celery_resilience.errors import Snooze, StoreUnavailable


class Base(DeclarativeBase):
    """The tables of these tests."""


class Order(Base):
    """What is streamed."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    group: Mapped[int | None] = mapped_column(Integer)


class Shelf:
    """A store of places in memory, that is away when told."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, str], bytes] = {}
        self.is_away = False

    def load(self, task_id: str, name: str) -> bytes | None:
        """The place."""
        self._ask()
        return self.places.get((task_id, name))

    def save(self, task_id: str, name: str, place: bytes) -> None:
        """Remember it."""
        self._ask()
        self.places[task_id, name] = place

    def finished(self, task_id: str) -> None:
        """Nothing is forgotten."""

    def _ask(self) -> None:
        if self.is_away:
            raise StoreUnavailable


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database with ten orders, whose ids have gaps."""
    engine = create_engine(f"sqlite:///{tmp_path}/shop.sqlite3")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(
            Order(id=3 * n, name=f"n{9 - n}", group=n // 2) for n in range(10)
        )
        session.commit()
    yield engine
    engine.dispose()


def run(
    source: Any, shelf: Any, *, size: int = 3, stop_after: int | None = None
) -> list[Any]:
    """The rows of one run, which is cut off in the row after so many."""
    rows: list[Any] = []
    checkpoint = StoredCheckpoint(shelf, "t", "1")
    for row in stream(source, checkpoint, size=size, is_stopping=lambda: False):
        if len(rows) == stop_after:
            break
        rows.append(row)
    return rows


@given(st.integers(0, 30), st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6))
def test_runs_that_are_cut_off_miss_nothing(
    count: int, size: int, cuts: list[int]
) -> None:
    """And do again less than a page each."""
    shelf = Shelf()
    done: list[int] = []
    for cut in cuts:
        rows = run(IterableSource(range(count)), shelf, size=size, stop_after=cut)
        done += rows
    done += run(IterableSource(range(count)), shelf, size=size)

    assert sorted(set(done)) == list(range(count))
    assert len(done) <= count + len(cuts) * size


def test_a_finished_stream_has_nothing_more() -> None:
    """A redelivery of its message does nothing twice."""
    shelf = Shelf()

    assert run(IterableSource("abcd"), shelf) == list("abcd")
    assert run(IterableSource("abcd"), shelf) == []


def test_a_worker_that_stops_hands_the_rest_over() -> None:
    """After a page whose place is saved; not after the last."""
    shelf = Shelf()
    source = IterableSource(range(5))
    rows: list[int] = []
    stopping = StoredCheckpoint(shelf, "t", "1")

    with pytest.raises(Snooze) as raised:
        rows.extend(stream(source, stopping, size=3, is_stopping=lambda: True))

    assert raised.value.countdown_s == 0
    assert rows == [0, 1, 2]
    rest = stream(IterableSource(range(5)), stopping, size=3, is_stopping=lambda: True)
    assert list(rest) == [3, 4]


def test_a_store_that_is_away_at_the_start_is_waited_for() -> None:
    """Nobody knows where the stream stands."""
    shelf = Shelf()
    shelf.is_away = True

    with pytest.raises(Snooze) as raised:
        run(IterableSource("ab"), shelf)
    assert raised.value.countdown_s == LOOK_AGAIN_S


def test_a_store_that_goes_away_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it was not told is done again, if the run is cut off."""
    shelf = Shelf()
    rows = []
    for row in stream(
        IterableSource(range(7)),
        StoredCheckpoint(shelf, "t", "1"),
        size=3,
        is_stopping=lambda: False,
    ):
        shelf.is_away = row >= 3
        rows.append(row)

    assert rows == list(range(7))
    assert "could not be saved" in caplog.text


@pytest.mark.parametrize(
    "place",
    [7, "seven", UUID(int=7), datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)],
    ids=["int", "str", "UUID", "datetime"],
)
def test_a_place_comes_back_as_it_is(place: Any) -> None:
    """A key may be of many types."""
    checkpoint = StoredCheckpoint(Shelf(), "t", "1")

    checkpoint.save(place)

    assert checkpoint.load() == place


def test_two_pages_are_in_memory_at_most() -> None:
    """However many there are."""

    class Row:
        pass

    alive: weakref.WeakSet[Row] = weakref.WeakSet()

    def rows() -> Iterator[Row]:
        for _ in range(100):
            row = Row()
            alive.add(row)
            yield row

    most = 0
    for _ in stream(
        IterableSource(rows()), NoCheckpoint(), size=10, is_stopping=lambda: False
    ):
        gc.collect(0)
        most = max(most, len(alive))

    assert 10 <= most <= 20


# --- queries --------------------------------------------------------------------------


def queries(session: Session) -> dict[str, Any]:
    """The same rows, asked for in each way."""
    return {
        "entity": select(Order),
        "legacy query": session.query(Order),
        "own order": select(Order).order_by(Order.name),
        "columns": select(Order.name, Order.id),
        "table": select(*Order.__table__.columns),
        "entity and column": select(Order, Order.name),
    }


@pytest.mark.parametrize(
    "way",
    ["entity", "legacy query", "own order", "columns", "table", "entity and column"],
)
def test_a_query_is_read_by_its_key(engine: Engine, way: str) -> None:
    """Each row once, whatever its own order, over several runs."""
    shelf = Shelf()
    ids = []
    for stop_after in (4, 2, None):
        with Session(engine) as session:
            source = source_of(queries(session)[way], key="id", session=session)
            for row in run(source, shelf, stop_after=stop_after):
                first = row[0] if way == "entity and column" else row
                ids.append(first.id)

    assert ids == [0, 3, 6, 9, 9, 12, *range(9, 28, 3)]


def test_a_page_is_committed_before_its_place_is_saved(engine: Engine) -> None:
    """What is saved as done is done."""
    shelf = Shelf()
    with Session(engine) as session:
        source = source_of(select(Order), key="id", session=session)
        for n, order in enumerate(
            stream(
                source,
                StoredCheckpoint(shelf, "t", "1"),
                size=4,
                is_stopping=lambda: False,
            )
        ):
            if n == 6:
                break
            order.name = "done"

    assert shelf.places["t", "1"] == b"9"
    with Session(engine) as session:
        done = session.scalars(select(Order.id).where(Order.name == "done")).all()
    assert done == [0, 3, 6, 9]


def test_a_key_that_is_not_unique_is_refused(engine: Engine) -> None:
    """At the edge of a page too, where rows would be lost in silence."""
    with Session(engine) as session:
        source = source_of(select(Order), key="group", session=session)
        with pytest.raises(ValueError, match=r"two rows have the same group, 0"):
            run(source, Shelf(), size=1)


def test_a_key_with_null_is_refused(engine: Engine) -> None:
    """NULL is after nothing."""
    with Session(engine) as session:
        session.execute(text('UPDATE orders SET "group" = NULL WHERE id = 0'))
        query = select(Order).where(Order.id == 0)
        with pytest.raises(ValueError, match="a row has no group"):
            run(source_of(query, key="group", session=session), Shelf())


def test_a_savepoint_around_the_end_of_a_page_is_refused(engine: Engine) -> None:
    """Nothing would be committed."""
    with Session(engine) as session, session.begin_nested():
        source = source_of(select(Order), key="id", session=session)
        with pytest.raises(ValueError, match="begin_nested"):
            run(source, Shelf())


class AsyncSession:
    """What it is known by."""

    sync_session = None


@pytest.mark.parametrize(
    ("source", "key", "session", "error", "why"),
    [
        (select(Order), "id", None, TypeError, "needs session="),
        (select(Order).limit(3), "id", "s", ValueError, "limit"),
        (select(Order).offset(3), "id", "s", ValueError, "offset"),
        (select(Order.name), "id", "s", ValueError, "has no column 'id'"),
        (select(Order), "number", "s", ValueError, "has no column 'number'"),
        (select(Column("x")), "id", "s", ValueError, "has no column 'id'"),
        (7, "id", None, TypeError, "got int"),
        (select(Order), "id", AsyncSession(), TypeError, "AsyncSession"),
    ],
    ids=["session", "limit", "offset", "column", "key", "core", "int", "async"],
)
def test_a_source_without_pages_is_refused(
    source: Any, key: str, session: Any, error: type[Exception], why: str
) -> None:
    """Before anything is read, with what is taken instead."""
    with pytest.raises(error, match=why):
        source_of(source, key=key, session=session)
