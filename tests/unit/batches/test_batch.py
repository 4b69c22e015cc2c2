"""Each item is ok, skipped or failed, once, whatever cuts its batch off."""

from __future__ import annotations

import gc
import json
import pickle
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pybreaker
import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_resilience import CircuitOpen, Skip, Snooze, TooManyErrors, batch
from celery_resilience.batches.batch import Batch
from celery_resilience.batches.options import BatchOptions
from celery_resilience.batches.surroundings import Surroundings
from celery_resilience.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MemoryLimitExceeded,
)


class Shelf:
    """A place that is saved as JSON, as in a store."""

    def __init__(self) -> None:
        self.saved: str | None = None
        self.saves = 0

    def load(self) -> Any:
        """What was saved last."""
        return None if self.saved is None else json.loads(self.saved)

    def save(self, place: Any) -> None:
        """Remember it."""
        self.saves += 1
        self.saved = json.dumps(place)


def begun(shelf: Shelf, around: dict[str, Any] | None = None, **words: Any) -> Batch:
    """One run's batch."""
    words.setdefault("max_errors", None)
    surroundings = Surroundings(checkpoint=shelf, **(around or {}))
    return Batch(BatchOptions(name="rows", **words), surroundings)


def work(
    made: Batch, source: Any, wrong: Callable[[Any], BaseException | None]
) -> None:
    """A whole run, in which *wrong* says what an item raises."""
    with made:
        for item in made.items(source):
            with made.item(item):
                exc = wrong(item)
                if exc is not None:
                    raise exc


def counts(made: Batch) -> tuple[int, int, int]:
    """Of what its items came to."""
    report = made.report
    return report["ok"], report["skipped"], report["failed"]


# --- whatever cuts it off ---------------------------------------------------------------

#: What may become of one visit to an item. The later ones end the run.
FATES = ["ok", "ok", "ok", "skip", "fail"]
ENDS = ["kill", "stop", "leave", "soft", "circuit", "retry", "bug", "bug_outside"]
RAISED: dict[str, type[Exception]] = {
    "skip": ValueError,
    "fail": KeyError,
    "soft": SoftTimeLimitExceeded,
    "retry": Retry,
    "bug": PermissionError,
}


class Day:
    """
    The runs of one batch, and each visit to each of its items.

    Args:
        count: Items.
        fates: Of the visits, in order; those that follow go well.
    """

    def __init__(self, count: int, fates: list[str]) -> None:
        self.count = count
        self.fates = iter(fates)
        self.visits: list[list[str]] = [[] for _ in range(count)]
        self.starts: list[int] = []
        self.shelf = Shelf()

    def run(self, chunk: int) -> Batch:
        """One run; a fate may end it."""
        told = {"stop": False}
        made = begun(
            self.shelf,
            {"is_stopping": lambda: told["stop"]},
            chunk=chunk,
            skip=ValueError,
            stop=PermissionError,
        )
        rows = made.items(range(self.count))
        is_first = True
        try:
            with made:
                for item in rows:
                    if is_first:
                        self.starts.append(item)
                        is_first = False
                    fate = next(self.fates, "ok")
                    if fate == "kill":
                        self.visits[item].append("cut")
                        raise Killed
                    self.visit(made, item, fate)
                    told["stop"] = fate == "stop"
                    if fate == "leave":
                        break
        except (Killed, Retry, SoftTimeLimitExceeded, CircuitOpen, PermissionError):
            pass
        except BugOutside:
            pass
        return made

    def visit(self, made: Batch, item: int, fate: str) -> None:
        """Work at one item."""
        has_ended = fate in ("ok", "skip", "fail", "stop", "leave")
        outcome = fate if fate in ("skip", "fail") else "ok"
        self.visits[item].append(outcome if has_ended else "cut")
        with made.item(item):
            if fate == "circuit":
                raise CircuitOpen("open")
            if fate in RAISED:
                raise RAISED[fate]("it")
        if fate == "bug_outside":
            raise BugOutside


class BugOutside(Exception):
    """Raised where no item is worked at."""


class Killed(BaseException):
    """The process has gone: nothing is committed as the batch is left."""


@given(
    st.integers(0, 25),
    st.integers(1, 6),
    st.lists(st.sampled_from([*FATES, *ENDS]), max_size=60),
)
def test_each_item_is_in_one_place_whatever_ends_its_runs(
    count: int, chunk: int, fates: list[str]
) -> None:
    """That of its last visit; each is visited, and less than a chunk again."""
    day = Day(count, fates)
    for _ in range(70):
        made = day.run(chunk)
    last = Counter(visits[-1] for visits in day.visits)

    assert counts(made) == (last["ok"], last["skip"], last["fail"])
    assert sum(last.values()) == count
    assert "cut" not in last
    wrong = [n for n, v in enumerate(day.visits) if v[-1] in ("skip", "fail")]
    assert [int(sample["id"]) for sample in made.report["samples"]] == wrong
    assert day.starts == sorted(day.starts)
    ended = sum(fate != "cut" for visits in day.visits for fate in visits)
    lost = sum(fate in ("kill", "bug", "bug_outside") for fate in fates)
    assert ended - count <= lost * (chunk - 1)


@given(
    st.lists(st.sampled_from(["ok", "skip", "fail"]), max_size=40), st.integers(1, 9)
)
def test_threads_and_none_come_to_the_same(fates: list[str], chunk: int) -> None:
    """In the same order."""

    def fetch(item: int) -> int:
        if fates[item] != "ok":
            raise RAISED[fates[item]](item)
        return 10 * item

    seen = []
    for concurrency in (1, 3):
        words: dict[str, Any] = {"skip": ValueError, "chunk": chunk}
        with begun(Shelf(), concurrency=concurrency, **words) as made:
            pairs = list(made.map(fetch, range(len(fates))))
        seen.append((pairs, made.report))

    assert seen[0] == seen[1]
    assert seen[0][0] == [(n, 10 * n) for n, fate in enumerate(fates) if fate == "ok"]
    assert seen[0][1]["skipped"] == fates.count("skip")


def test_the_run_after_a_finished_one_does_nothing() -> None:
    """And has the same report."""
    shelf = Shelf()
    reports = []
    seen: list[int] = []
    for _ in range(2):
        with begun(shelf, chunk=5) as made:
            for item in made.items(range(10)):
                with made.item(item):
                    seen.append(item)
                    raise KeyError(item)
        reports.append(made.report)

    assert seen == list(range(10))
    assert reports[0] == reports[1]
    assert json.loads(json.dumps(reports[0])) == reports[0]


def test_one_chunk_is_in_memory() -> None:
    """However many items there are, and go wrong."""

    class Row:
        pass

    alive: weakref.WeakSet[Row] = weakref.WeakSet()

    def rows() -> Iterator[Row]:
        for _ in range(2_000):
            row = Row()
            alive.add(row)
            yield row

    most = 0
    with begun(Shelf(), chunk=20) as made:
        for number, row in enumerate(made.items(rows())):
            with made.item(row):
                if number % 100 == 0:
                    gc.collect(0)
                    most = max(most, len(alive))
                if number % 2:
                    raise KeyError("x" * 10_000)

    assert 20 <= most <= 60
    assert counts(made) == (1_000, 0, 1_000)
    assert len(json.dumps(made.report)) < 50_000


# --- what passes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised",
    [
        *(Retry("later"), Ignore(), Reject(), Skip("nothing"), Snooze(1)),
        *(MemoryError(), MemoryLimitExceeded("much")),
        *(CircuitOpen("open"), pybreaker.CircuitBreakerError("open")),
        *(BrokerUnavailable(), SystemExit(1), KeyboardInterrupt(), PermissionError()),
    ],
    ids=lambda raised: type(raised).__name__,
)
@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_says_nothing_of_an_item_passes(
    raised: BaseException, concurrency: int
) -> None:
    """Though everything is to be skipped; the item is in none of the three."""

    def fetch(item: int) -> int:
        if item == 2:
            raise raised
        return item

    words: dict[str, Any] = {"skip": Exception, "stop": PermissionError}
    made = begun(Shelf(), concurrency=concurrency, **words)
    other = begun(Shelf(), **words)
    with pytest.raises(type(raised)), made:
        list(made.map(fetch, range(5)))
    with pytest.raises(type(raised)):
        work(other, [1], lambda item: raised)

    assert counts(made) == (2, 0, 0)
    assert counts(other) == (0, 0, 0)


def test_a_soft_limit_without_any_progress_fails_the_task() -> None:
    """Else it would come again for ever."""
    made = begun(Shelf())

    with pytest.raises(SoftTimeLimitExceeded):
        work(made, range(3), SoftTimeLimitExceeded)


def test_a_soft_limit_after_progress_hands_over() -> None:
    """At once, without a retry."""
    shelf = Shelf()

    with pytest.raises(Snooze) as snoozed:
        work(
            begun(shelf),
            range(3),
            lambda item: SoftTimeLimitExceeded(1) if item == 2 else None,
        )

    assert snoozed.value.countdown_s == 0
    assert shelf.load()["place"] == 2


def test_a_soft_limit_of_a_batch_without_a_place_fails_the_task() -> None:
    """The next run would begin anew, and so for ever."""
    made = Batch(BatchOptions(name="rows", chunk=1), Surroundings())

    with pytest.raises(SoftTimeLimitExceeded):
        work(
            made,
            range(3),
            lambda item: SoftTimeLimitExceeded(1) if item == 2 else None,
        )


def test_an_item_counts_once_however_many_scopes_it_has() -> None:
    """What went wrong first is told."""
    with begun(Shelf()) as made:
        for item in made.items(range(2)):
            for kind in (KeyError, IndexError):
                with made.item(item):
                    raise kind("it")

    assert counts(made) == (0, 0, 2)
    assert made.report["errors"] == {"KeyError": 2}


def test_an_item_without_a_scope_is_ok() -> None:
    """Nothing went wrong with it."""
    with begun(Shelf()) as made:
        for _ in made.items(range(3)):
            pass

    assert counts(made) == (3, 0, 0)


# --- limits -----------------------------------------------------------------------------


def test_too_many_errors_end_it_with_the_report() -> None:
    """At the first one too many, which survives a pickle."""
    made = begun(Shelf(), max_errors=2, skip=ValueError)

    with pytest.raises(TooManyErrors) as raised:
        work(made, range(9), lambda item: (ValueError if item % 2 else KeyError)(item))

    assert counts(made) == (0, 1, 2)
    exc = pickle.loads(pickle.dumps(raised.value))
    assert exc.report == made.report
    assert str(exc) == (
        "batch rows: more than max_errors=2: 1 skipped and 2 failed, 0 ok; "
        "KeyError (2), ValueError (1)"
    )
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_replay_after_too_many_errors_has_its_limits_anew() -> None:
    """And keeps the counts."""
    shelf = Shelf()
    words: dict[str, Any] = {"chunk": 2, "max_errors": 2}
    for is_mended in (False, True):
        made = begun(shelf, **words)
        try:
            with made:
                for item in made.items(range(10)):
                    with made.item(item):
                        if (item in (0, 2, 4) and not is_mended) or item in (6, 8):
                            raise KeyError(item)
        except TooManyErrors as exc:
            made.untold(exc)

    assert counts(made) == (6, 0, 4)


def test_a_rate_is_looked_at_when_there_are_enough_items() -> None:
    """Also where the last of them went well."""
    seen = []

    def wrong(item: int) -> KeyError | None:
        seen.append(item)
        return KeyError(item) if item < 8 else None

    made = begun(Shelf(), max_error_rate=0.2, min_items=10, chunk=5)
    with pytest.raises(TooManyErrors, match=r"more than max_error_rate=0\.2"):
        work(made, range(100), wrong)

    assert seen == list(range(10))


# --- what its run hears -----------------------------------------------------------------


def test_each_committed_chunk_is_told() -> None:
    """With how many there are, where that is known without reading them."""
    told: list[Any] = []

    def progressed(report: Any, total: int | None) -> None:
        told.append((report["ok"], total))

    with begun(Shelf(), {"progressed": progressed}, chunk=2) as made:
        list(made.items([1, 2, 3]))
    with begun(Shelf(), {"progressed": progressed}, chunk=9) as made:
        list(made.items(iter([1, 2, 3])))

    assert told == [(2, 3), (3, 3), (3, None)]


@pytest.mark.parametrize("is_killed", [True, False])
def test_what_was_committed_is_told_once(is_killed: bool) -> None:
    """By the run that ends the task, for those that were killed, too."""
    shelf = Shelf()
    first = begun(shelf, chunk=2)
    rows = first.items(range(5))
    for _ in range(4):
        next(rows)
    if not is_killed:
        assert first.untold(KeyError()) == {
            "name": "rows",
            "ok": 2,
            "skipped": 0,
            "failed": 0,
        }

    with begun(shelf, chunk=2) as second:
        list(second.items(range(5)))

    told = second.untold(None)
    assert told["ok"] == (5 if is_killed else 3)
    with begun(shelf, chunk=2) as again:
        list(again.items(range(5)))
    assert again.untold(None)["ok"] == 0


def test_secrets_are_masked_and_texts_cut() -> None:
    """In what a report shows of an exception."""
    around = {"secrets": lambda item: ["hunter2"]}
    with begun(Shelf(), around) as made:
        for item in made.items([1]):
            with made.item(item):
                raise ValueError(f"hunter2 {'x' * 9_000}")

    (sample,) = made.report["samples"]
    assert sample["message"].startswith("*** xxx")
    assert len(sample["message"]) < 300


@pytest.mark.parametrize(("text", "told"), [("short", 100), ("\N{SNOWMAN}" * 500, 30)])
def test_a_report_tells_of_the_first_bad_items(text: str, told: int) -> None:
    """As many as fit into what a database takes as one value, escaped."""
    shelf = Shelf()
    with begun(shelf) as made:
        for item in made.items(range(300)):
            with made.item(item):
                raise ValueError(text)

    samples = made.report["samples"]
    assert [int(sample["id"]) for sample in samples] == list(range(told))
    assert counts(made) == (0, 0, 300)
    assert len(shelf.saved or "") < 65_535


def test_types_are_counted_up_to_a_number() -> None:
    """Whatever types a library makes on the way."""
    with begun(Shelf()) as made:
        for item in made.items(range(80)):
            with made.item(item):
                raise type(f"Error{item}", (Exception,), {})

    errors = made.report["errors"]
    assert len(errors) == 51
    assert errors["other"] == 30
    assert sum(errors.values()) == 80


class Named(NamedTuple):
    """An item with an id."""

    id: str


@pytest.mark.parametrize(
    ("key", "item", "shown"),
    [
        (None, 7, "7"),
        (None, Named("a7"), "a7"),
        (None, {"id": 7}, "7"),
        (None, "a line with a secret", "#1"),
        ("number", {"number": 7}, "7"),
        (lambda item: item["n"], {"n": 7}, "7"),
        (lambda item: item["n"], {}, "#1"),
    ],
    ids=["int", "attribute", "field", "text", "name", "callable", "raises"],
)
def test_a_bad_item_is_named(key: Any, item: Any, shown: str) -> None:
    """By its key; by its number where there is none, and never by its text."""
    with begun(Shelf(), key=key) as made:
        for each in made.items([item]):
            with made.item(each):
                raise KeyError

    assert made.report["samples"][0]["id"] == shown


@pytest.mark.parametrize("key", ["idd", lambda item: {}[item["id"]]])
def test_a_key_that_bad_items_do_not_have_is_told_once(
    caplog: pytest.LogCaptureFixture, key: Any
) -> None:
    """The items may be wrong, or the key: their numbers are shown, and no text."""
    made = begun(Shelf(), key=key)

    work(made, [{"id": "secret"}, {"id": "other"}], lambda item: ValueError())

    assert [it["id"] for it in made.report["samples"]] == ["#1", "#2"]
    (told,) = caplog.messages
    assert told.startswith("batch 'rows': key= names no item that goes wrong")
    assert "KeyError" in told
    assert "secret" not in told


# --- failed items are kept --------------------------------------------------------------


class Inbox:
    """Where failed items go, when their chunk is committed."""

    def __init__(self, shelf: Shelf) -> None:
        self.kept: list[int] = []
        self.is_away = False
        self._shelf = shelf

    def keep(self, key: int, exc: BaseException) -> Callable[[], object]:
        """Make one."""

        def store() -> None:
            if self.is_away:
                raise BrokerUnavailable
            self.kept.append(key)

        return store


def test_failed_items_are_kept_before_their_place_is_saved() -> None:
    """Skipped ones are not; and while the broker is away, nothing is committed."""
    shelf = Shelf()
    inbox = Inbox(shelf)
    words: dict[str, Any] = {
        "key": int,
        "chunk": 4,
        "skip": ValueError,
        "keep_failed": print,
    }

    def run(stop_at: int | None = None) -> Batch:
        made = begun(shelf, {"keep": inbox.keep}, **words)
        with made:
            for item in made.items(range(8)):
                inbox.is_away = item == stop_at
                with made.item(item):
                    if item % 2:
                        raise KeyError(item) if item % 4 == 1 else ValueError(item)
        return made

    with pytest.raises(Snooze):
        run(stop_at=7)
    assert inbox.kept == [1]
    assert shelf.load()["place"] == 4

    made = run()

    assert inbox.kept == [1, 5]
    assert counts(made) == (4, 2, 2)


@pytest.mark.parametrize("item", [{"id": 1}, Named("a1")], ids=["field", "attribute"])
def test_a_key_that_no_item_has_is_told(item: Any) -> None:
    """It is the batch that is wrong: a bare KeyError might be any line of the body's."""
    shelf = Shelf()
    keep = {"keep": Inbox(shelf).keep}
    made = begun(shelf, keep, key="idd", keep_failed=print)
    said = "batch 'rows': key='idd' names no attribute or field of its items"
    with pytest.raises(ConfigurationError, match=said):
        work(made, [item], lambda item: ValueError())

    assert shelf.saved is None


# --- threads ----------------------------------------------------------------------------

CARRIED: ContextVar[str] = ContextVar("CARRIED", default="")


def test_calls_in_threads_are_at_once_and_carry_the_context() -> None:
    """As many as were asked for, and no thread is left."""
    barrier = threading.Barrier(4, timeout=20)
    CARRIED.set("here")

    def fetch(item: int) -> str:
        barrier.wait()
        return CARRIED.get()

    before = threading.active_count()
    with begun(Shelf(), concurrency=4, chunk=8) as made:
        assert [answer for _, answer in made.map(fetch, range(16))] == ["here"] * 16

    assert threading.active_count() == before


def test_no_call_is_begun_after_the_batch_has_ended() -> None:
    """Those that are being made are waited for; what had ended is committed."""
    shelf = Shelf()
    calls: list[int] = []

    def fetch(item: int) -> int:
        calls.append(item)
        if item == 3:
            raise CircuitOpen("open")
        return item

    made = begun(shelf, concurrency=2, chunk=1_000)
    with pytest.raises(CircuitOpen), made:
        list(made.map(fetch, range(1_000)))

    assert len(calls) <= 3 + 2 * 4 + 2
    assert shelf.load()["place"] == 3
    assert counts(made) == (3, 0, 0)


def test_a_slow_call_leaves_the_other_threads_busy() -> None:
    """Its neighbours go on with the items after it."""
    others: list[int] = []

    def fetch(item: int) -> None:
        if item == 0:
            end = time.monotonic() + 20
            while len(others) < 7 and time.monotonic() < end:
                time.sleep(0.001)
        others.append(item)

    with begun(Shelf(), concurrency=2) as made:
        for _ in made.map(fetch, range(8)):
            pass

    assert others.index(0) == 7


# --- databases --------------------------------------------------------------------------


class Base(DeclarativeBase):
    """The tables of these tests."""


class Order(Base):
    """What is worked at."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(20), unique=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database with ten orders."""
    engine = create_engine(f"sqlite:///{tmp_path}/shop.sqlite3")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Order(id=n) for n in range(10))
        session.commit()
    yield engine
    engine.dispose()


def names(engine: Engine) -> list[str | None]:
    """What was committed."""
    with Session(engine) as session:
        return list(session.scalars(select(Order.name).order_by(Order.id)))


@pytest.mark.parametrize("is_flushed", [True, False])
def test_a_failed_flush_is_its_items_alone(engine: Engine, is_flushed: bool) -> None:
    """Whether the body asks for it, or the end of the scope does."""
    with Session(engine) as session:

        def half_of_them(order: Order) -> None:
            order.name = f"n{order.id // 2}"
            if is_flushed:
                session.flush()

        made = begun(Shelf(), chunk=10, session=session)
        work(made, select(Order), half_of_them)

    assert names(engine) == ["n0", None, "n1", None, "n2", None, "n3", None, "n4", None]
    assert counts(made) == (5, 0, 5)
    assert [s["id"] for s in made.report["samples"]] == ["1", "3", "5", "7", "9"]


def test_a_chunk_is_committed_as_one(engine: Engine) -> None:
    """Also on SQLite, whose driver begins no transaction for a savepoint."""
    shelf = Shelf()
    with Session(engine) as session:

        def until_six(order: Order) -> Exception | None:
            order.name = f"n{order.id}"
            return PermissionError() if order.id == 6 else None

        made = begun(shelf, chunk=4, session=session, stop=PermissionError)
        with pytest.raises(PermissionError):
            work(made, select(Order), until_six)

    assert names(engine) == [*(f"n{n}" for n in range(4)), *[None] * 6]
    assert shelf.load()["place"] == 3


@pytest.mark.parametrize(("has_savepoints", "done"), [(True, 6), (False, 4)])
def test_an_open_circuit_commits_what_was_not_cut_off(
    engine: Engine, has_savepoints: bool, done: int
) -> None:
    """Where the savepoint has undone the item that it has cut off."""
    shelf = Shelf()
    with Session(engine) as session:

        def until_six(order: Order) -> Exception | None:
            order.name = f"n{order.id}"
            session.flush()
            return CircuitOpen("open") if order.id == 6 else None

        made = begun(shelf, chunk=4, session=session, savepoints=has_savepoints)
        with pytest.raises(CircuitOpen):
            work(made, select(Order), until_six)

    assert names(engine) == [*(f"n{n}" for n in range(done)), *[None] * (10 - done)]
    assert shelf.load()["place"] == done - 1


def test_what_is_raised_beside_the_items_commits_nothing(engine: Engine) -> None:
    """The last item is in the session, and its place would not be saved."""
    shelf = Shelf()
    with Session(engine) as session:

        def run(made: Batch) -> None:
            with made:
                for order in made.items(select(Order)):
                    with made.item(order):
                        order.name = f"n{order.id}"
                    if order.id == 6:
                        raise CircuitOpen("open")

        with pytest.raises(CircuitOpen):
            run(begun(shelf, chunk=4, session=session))

    assert names(engine) == [*(f"n{n}" for n in range(4)), *[None] * 6]
    assert shelf.load()["place"] == 3


# --- what is refused --------------------------------------------------------------------


@Celery("shop", set_as_current=False).task(shared=False)
def enrich_one(key: int) -> None:
    """The body of a task, which no batch may run."""
    raise AssertionError(key)


AS_SIGNATURE = r"such as keep_failed=enrich_one\.s, or None, got <@task: "


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"name": ""}, "name must be a text of 1 to 57 characters, got ''"),
        ({"key": 7}, "key must be a callable"),
        ({"chunk": 0}, "chunk must be a whole number from 1, got 0"),
        ({"chunk": True}, "chunk must be a whole number from 1, got True"),
        ({"skip": "ValueError"}, "skip must be an exception's type"),
        ({"skip": (int,)}, "skip must be an exception's type"),
        ({"stop": BaseException}, "stop must be an exception's type"),
        ({"max_errors": -1}, "max_errors must be a whole number from 0"),
        ({"max_error_rate": 20}, "max_error_rate must be a number from 0 to 1"),
        ({"min_items": 0}, "min_items must be"),
        ({"concurrency": 257}, "concurrency must be a whole number from 1 to 256"),
        ({"session": "s"}, "session must be a Session of SQLAlchemy's"),
        ({"keep_failed": "t", "key": "id"}, "keep_failed must be a callable"),
        ({"keep_failed": print}, "keep_failed needs key="),
        ({"keep_failed": enrich_one.s(), "key": int}, "keep_failed must be a callable"),
        (
            {"keep_failed": enrich_one, "key": int},
            f"keep_failed must .* {AS_SIGNATURE}",
        ),
    ],
    ids=lambda words: next(iter(words)) if isinstance(words, dict) else "",
)
def test_a_wrong_option_is_refused(words: dict[str, Any], why: str) -> None:
    """By its name, with what is accepted."""
    with pytest.raises(ConfigurationError, match=rf"batch .*: {why}"):
        BatchOptions(**{"name": "rows", **words})


def test_items_are_not_read_twice_nor_by_the_wrong_method() -> None:
    """Places of two sources would be one."""
    made = begun(Shelf())
    list(made.items([1]))
    with pytest.raises(ConfigurationError, match="has read its items already"):
        made.map(print, [1])
    with pytest.raises(ConfigurationError, match=r"concurrency=2 is for batch.map"):
        begun(Shelf(), concurrency=2).items([1])


def test_a_plain_function_begins_a_batch_without_a_worker() -> None:
    """At the first item each time, with the same scopes and report."""
    for _ in range(2):
        seen = []
        with batch("rows", skip=ValueError, chunk=2) as made:
            for item in made.items(range(5)):
                with made.item(item):
                    seen.append(item)
                    if item == 3:
                        raise ValueError("three")
        assert seen == list(range(5))
        assert counts(made) == (4, 1, 0)


def test_surroundings_are_of_no_run_unless_they_are_told() -> None:
    """Each batch has a place of its own."""
    one, two = Surroundings(), replace(Surroundings(), secrets=lambda item: ["x"])

    assert one.checkpoint is not Surroundings().checkpoint
    assert not one.is_stopping()
    assert two.secrets(1) == ["x"]
