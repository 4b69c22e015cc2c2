"""One suite for every store of failed tasks: what `FailedTaskStore` promises."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from polling import eventually
from sqlalchemy import event, text
from unit.conftest import Backend
from unit.specimens import (
    HOSTILE_TEXT,
    a_failed_document,
    a_failure,
    a_message,
    a_success_document,
    fresh_name,
)

from celery_resilience.errors import StoreUnavailable
from celery_resilience.failed.filters import Filter
from celery_resilience.failed.record import FailedTask, Phase, State
from celery_resilience.failed.sql_store import PAGE, SqlFailedTaskStore
from celery_resilience.failed.store import Claim, FailedTaskStore
from celery_resilience.stores.sql import SqlDatabase

Result = TypeVar("Result")
MakeStore = Callable[[str], FailedTaskStore]

ALL = Filter(state=None)

#: Wall time some minutes ago: the store compares with its own clock.
NOW = time.time() - 600

fork = multiprocessing.get_context("fork")


@pytest.fixture
def make_store(backend: Backend) -> MakeStore:
    """Makes stores for a namespace; two of one namespace share their records."""
    return backend.failed


@pytest.fixture
def store(make_store: MakeStore) -> FailedTaskStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def failed(task_id: str = "task-1", *, at: float = NOW, **facts: Any) -> dict[str, Any]:
    """An envelope."""
    return a_failed_document(task_id=task_id, at=at, **facts)


def keep(store: FailedTaskStore, *task_ids: str) -> list[str]:
    """Keep one failure for each task; returns their records' ids."""
    documents = [failed(task_id) for task_id in task_ids]
    store.keep(documents)
    return [document["id"] for document in documents]


def get(store: FailedTaskStore, id: str) -> FailedTask:
    """A record that must be there."""
    found = store.get(id)
    assert found is not None
    return found


def state_of(store: FailedTaskStore, id: str) -> tuple[str, str | None]:
    """State and phase of a record."""
    summary = get(store, id).summary
    return summary.state, summary.phase


def claim_one(store: FailedTaskStore, id: str, **words: Any) -> Claim:
    """A claim that must succeed."""
    (claim,) = store.claim([id], **words)
    return claim


def replay_failed(claim: Claim, **facts: Any) -> dict[str, Any]:
    """The envelope of a replay that failed."""
    return failed(
        claim.task_id,
        at=facts.pop("at", NOW + 60),
        record=claim.id,
        number=claim.number,
        token=claim.token,
        **facts,
    )


def replay_succeeded(claim: Claim, *, at: float = NOW + 60) -> dict[str, Any]:
    """The report of a replay that succeeded."""
    return a_success_document(
        at=at,
        task_id=claim.task_id,
        record=claim.id,
        number=claim.number,
        token=claim.token,
    )


def snapshot(store: FailedTaskStore) -> Any:
    """All that can be seen of a store."""
    return [
        (summary, get(store, summary.id).document, get(store, summary.id).attempts)
        for summary in store.list(ALL)
    ]


def at_once(*works: Callable[[], Result]) -> list[Result]:
    """Every work's result, each run in a thread of its own at the same moment."""
    start = Barrier(len(works))
    results: dict[int, Any] = {}

    def run(number: int, work: Callable[[], Result]) -> None:
        start.wait()
        try:
            results[number] = work()
        except BaseException as exc:
            results[number] = exc

    threads = [Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[number] for number in range(len(works))]


def in_processes(count: int, work: Callable[[], Any]) -> list[Any]:
    """What *work* returned in each of several forked processes."""
    start, answers = fork.Barrier(count), fork.SimpleQueue()

    def run() -> None:
        start.wait()
        try:
            answers.put(work())
        except BaseException as exc:
            answers.put(repr(exc))
        os._exit(0)

    processes = [fork.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


# --- keep -----------------------------------------------------------------------------


def test_a_kept_document_comes_back_whole(store: FailedTaskStore) -> None:
    """Summary, document, message and attempts."""
    document = failed(
        args="('***',)",
        arguments={"card": "'***'"},
        release="v1",
        in_chord=True,
        message=a_message(body=b"\x00\xff", headers={"x": b"\x01"}),
    )
    store.keep([document])

    found = get(store, document["id"])

    assert found.document == document
    assert found.original.body == b"\x00\xff"
    assert found.attempts == [document["attempt"]]
    assert found.replayed_as is None
    summary = found.summary
    assert summary.id == document["id"]
    assert summary.state is State.UNRESOLVED
    assert (summary.task, summary.task_id) == ("shop.ship", "task-1")
    assert (summary.queue, summary.failed_queue) == ("shop", "shop.failed")
    assert (summary.exception, summary.message) == ("shop.errors.NoStock", "none left")
    assert (summary.reason, summary.worker) == ("exception", "celery@one")
    assert summary.fingerprint == document["fingerprint"]
    assert summary.release == "v1"
    assert summary.first_failed_at == summary.last_failed_at == NOW
    assert (summary.replays, summary.phase, summary.note) == (0, None, None)


def test_the_same_documents_again_change_nothing(store: FailedTaskStore) -> None:
    """A collector died between commit and ack."""
    documents = [failed("a"), failed("b"), failed("a", at=NOW + 1, attempt=2)]
    store.keep(documents)
    before = snapshot(store)

    store.keep(documents)
    store.keep(documents[::-1])

    assert snapshot(store) == before
    assert len(before) == 2


def test_the_same_documents_again_change_nothing_while_they_are_replayed(
    store: FailedTaskStore,
) -> None:
    """Nor after the replay has ended."""
    document = failed()
    store.keep([document])
    claim = claim_one(store, document["id"])
    store.keep([document])
    assert state_of(store, claim.id) == (State.REPLAYING, Phase.CLAIMED)
    store.keep([replay_succeeded(claim)])

    store.keep([document, replay_succeeded(claim)])

    assert state_of(store, claim.id) == (State.RESOLVED, None)


STORY = [
    failed("a"),
    failed("a", at=NOW + 10, redelivered=True, attempt=2),
    a_success_document(task_id="b", at=NOW + 20),
    failed("b"),
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_documents_may_come_in_any_order(
    store: FailedTaskStore, order: Sequence[int]
) -> None:
    """In one batch or one by one: the same records, states and attempts."""
    if order.index(0) > order.index(1):
        order = order[::-1]  # a first capture that comes late: test_merge.py
    for number in order:
        store.keep([STORY[number]])

    states = {s.task_id: s.state for s in store.list(ALL)}
    assert states == {"a": State.UNRESOLVED, "b": State.RESOLVED}
    assert len(get(store, STORY[0]["id"]).attempts) == 2
    assert len(get(store, STORY[3]["id"]).attempts) == 1


def test_a_batch_is_as_good_as_one_by_one(make_store: MakeStore) -> None:
    """Several documents of one record in one transaction are merged in order."""
    together, apart = (make_store(fresh_name("shop")) for _ in range(2))

    together.keep(STORY)
    for document in STORY:
        apart.keep([document])

    assert snapshot(together) == snapshot(apart)


def test_more_documents_than_a_page_are_kept(store: FailedTaskStore) -> None:
    """A batch may be of any size."""
    documents = [failed(f"t{i}", at=NOW + i) for i in range(PAGE + 20)]

    store.keep(documents)
    store.keep([])

    assert store.count(ALL) == PAGE + 20
    listed = [summary.task_id for summary in store.list(ALL)]
    assert listed == [f"t{i}" for i in range(PAGE + 20)][::-1]


def test_a_batch_may_hold_what_is_new_and_what_is_known(store: FailedTaskStore) -> None:
    """Each is kept as if it had come alone."""
    again, replayed, succeeded = keep(store, "again", "replayed", "succeeded")
    claims = {claim.id: claim for claim in store.claim([replayed, succeeded])}

    store.keep(
        [
            failed("again", at=NOW + 60, attempt=2),
            failed("new"),
            replay_failed(claims[replayed]),
            replay_succeeded(claims[succeeded]),
            a_success_document(at=NOW, task_id="succeeded first"),
            failed("also new"),
        ]
    )

    assert len(get(store, again).attempts) == 2
    assert len(get(store, replayed).attempts) == 2
    assert state_of(store, replayed) == ("unresolved", None)
    assert state_of(store, succeeded) == ("resolved", None)
    assert {summary.task_id for summary in store.list(ALL)} == {
        *("again", "new", "replayed", "succeeded", "also new")
    }


def test_a_batch_of_outcomes_alone_is_kept(store: FailedTaskStore) -> None:
    """With nothing that is new beside them."""
    failing, succeeding = keep(store, "a", "b")
    claims = store.claim([failing, succeeding])

    store.keep([replay_failed(claims[0]), replay_succeeded(claims[1])])

    assert len(get(store, failing).attempts) == 2
    assert state_of(store, succeeding) == ("resolved", None)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mariadb"])
def test_what_is_new_is_not_looked_for(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """PostgreSQL reads whole tables for it until it has analysed them."""
    url = (
        f"sqlite:///{tmp_path}/new.sqlite3"
        if kind == "sqlite"
        else request.getfixturevalue(f"{kind}_url")()
    )
    database = SqlDatabase(url)
    store = SqlFailedTaskStore(database, fresh_name("shop"))
    (id,) = keep(store, "first")
    claim = claim_one(store, id)
    sent: list[str] = []
    event.listen(
        database._open(),
        "before_cursor_execute",
        lambda *args: sent.append(args[2].split()[0]),
    )

    keep(store, *(f"t{i}" for i in range(20)))
    assert [word for word in sent if word != "BEGIN"] == ["INSERT", "DELETE"]

    sent.clear()
    store.keep([replay_failed(claim)])
    assert [word for word in sent if word != "BEGIN"] == ["SELECT", "UPDATE", "DELETE"]
    database.close()


def test_collectors_may_keep_the_same_at_once(make_store: MakeStore) -> None:
    """None fails, and each failure is one record with one attempt."""
    namespace = fresh_name("shop")
    documents = [failed(f"t{i}") for i in range(30)]

    def work(order: int) -> Callable[[], None]:
        return lambda: make_store(namespace).keep(documents[::order])

    at_once(work(1), work(1), work(1), work(1))

    store = make_store(namespace)
    assert store.count(ALL) == 30
    assert all(len(get(store, d["id"]).attempts) == 1 for d in documents)


def test_collectors_may_keep_different_failures_of_one_record_at_once(
    make_store: MakeStore,
) -> None:
    """Whoever makes the record, and whoever comes second: no attempt is lost."""
    namespace = fresh_name("shop")

    def work(number: int) -> Callable[[], None]:
        documents = [
            [
                failed(f"t{i}", at=NOW + number, attempt=10 * number + n)
                for i in range(10)
            ]
            for n in range(3)
        ]
        store = make_store(namespace)
        return lambda: [store.keep(batch) for batch in documents] and None

    at_once(*(work(number) for number in range(4)))

    store = make_store(namespace)
    attempts = [len(get(store, s.id).attempts) for s in store.list(ALL)]
    assert attempts == [12] * 10


def test_a_further_failure_moves_its_record_to_the_top(store: FailedTaskStore) -> None:
    """The last failure's facts are listed, the first time is kept."""
    (a, _) = keep(store, "a", "b")
    again = failed("a", at=NOW + 50, attempt=2, reason="worker_lost")

    store.keep([again])

    first, _ = store.list(ALL)
    assert (first.id, first.reason) == (a, "worker_lost")
    assert (first.first_failed_at, first.last_failed_at) == (NOW, NOW + 50)
    assert get(store, a).document == again
    assert [x["reason"] for x in get(store, a).attempts] == ["exception", "worker_lost"]


def test_a_success_before_its_failure_is_not_seen(store: FailedTaskStore) -> None:
    """It waits for the failure that it makes void, and then resolves it."""
    success = a_success_document(at=NOW)
    store.keep([success])

    assert list(store.list(ALL)) == []
    assert store.count(ALL) == 0
    assert store.get(success["id"]) is None
    assert store.resolve(success["id"]) == []
    assert store.claim([success["id"]]) == []
    assert (store.discard([success["id"]]), store.reopen([success["id"]])) == (0, 0)
    assert sum(store.stats()[str(state)] for state in State) == 0

    store.keep([failed(at=NOW - 5)])
    assert state_of(store, success["id"]) == (State.RESOLVED, None)


def test_a_success_does_not_wait_for_ever(store: FailedTaskStore) -> None:
    """A failure that comes days later was not made void by it."""
    store.keep([a_success_document(at=NOW - 100_000)])

    store.keep([failed(at=NOW - 100_010)])

    assert state_of(store, failed()["id"]) == (State.UNRESOLVED, None)


def test_long_names_are_kept(store: FailedTaskStore) -> None:
    """A table's columns have limits, a message's headers have none."""
    long = "x" * 5_000
    document = failed(
        long,
        task=long,
        worker=long,
        failure=a_failure(exception=long, message=long, traceback=long),
        message=a_message(queue=long),
    )

    store.keep([document])

    found = get(store, document["id"])
    assert found.document == document
    assert len(found.summary.message) < 600


def test_hostile_texts_are_kept(store: FailedTaskStore) -> None:
    """Where they may be: in redacted texts, headers and properties."""
    document = failed(
        args=HOSTILE_TEXT,
        kwargs=HOSTILE_TEXT,
        arguments={HOSTILE_TEXT: HOSTILE_TEXT},
        root_id=HOSTILE_TEXT,
        message=a_message(headers={"x": HOSTILE_TEXT}, properties={"y": HOSTILE_TEXT}),
    )

    store.keep([document])

    assert get(store, document["id"]).document == document


def test_a_large_document_is_kept(store: FailedTaskStore) -> None:
    """MySQL's TEXT and BLOB end at 64 KiB."""
    document = failed(
        arguments={"rows": "é" * 200_000},
        message=a_message(body=random.Random(1).randbytes(1_000_000)),
    )

    store.keep([document])

    assert get(store, document["id"]).document == document
    wanted = Filter(args=(("rows", "é" * 200_000),))
    assert [s.id for s in store.list(wanted)] == [document["id"]]


def test_a_batch_may_be_larger_than_a_servers_packet(store: FailedTaskStore) -> None:
    """Only a single document must fit into one."""
    noise = random.Random(1)
    documents = [
        failed(f"t{i}", message=a_message(body=noise.randbytes(500_000)))
        for i in range(12)
    ]

    store.keep(documents)

    assert store.count(ALL) == 12


def test_a_document_that_mariadb_does_not_let_in(mariadb_url: Any) -> None:
    """It is told what to raise; nothing of the batch is kept, so nothing is acked."""
    database = SqlDatabase(mariadb_url())
    store = SqlFailedTaskStore(database, "shop")
    huge = a_message(task_id="huge", body=random.Random(1).randbytes(5_000_000))

    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"max_allowed_packet of 4\.0 MiB"):
            store.keep([failed("small"), failed("huge", message=huge)])
        assert store.count(ALL) == 0
    store.keep([failed("small")])

    assert store.count(ALL) == 1
    database.close()


@pytest.mark.parametrize(
    ("one", "other"),
    [("shop", "SHOP"), ("shop", "shóp"), ("shop", "shop "), ("strasse", "straße")],
)
def test_names_that_look_alike_are_different(
    store: FailedTaskStore, one: str, other: str
) -> None:
    """By every filter, count and id: byte for byte on every database."""
    documents = [
        failed(
            name,
            task=name,
            release=name,
            worker=name,
            failed_queue=name,
            failure=a_failure(exception=name),
            message=a_message(task_id=name, queue=name),
        )
        for name in (one, other)
    ]
    store.keep(documents)

    for name, document in zip((one, other), documents, strict=True):
        for word in ("task", "release", "worker", "failed_queue", "exception", "queue"):
            wanted = Filter(**{word: name})
            assert [s.id for s in store.list(wanted)] == [document["id"]]
            assert store.count(wanted) == 1
        assert store.resolve(name) == [document["id"]]
    stats = store.stats()
    for by in ("by_task", "by_exception", "by_failed_queue"):
        assert stats[by] == {one: 1, other: 1}


# --- looking --------------------------------------------------------------------------


def filled(store: FailedTaskStore) -> dict[str, str]:
    """Six failed tasks that differ in all that FILTERS know; ids by name."""
    documents = {
        "one": failed("t1", at=NOW + 1, release="v1"),
        "two": failed(
            "t2",
            at=NOW + 2,
            task="shop.bill",
            failure=a_failure(exception="KeyError", message="'100%_sure\\'"),
            release="v2",
            worker="celery@two",
        ),
        "three": failed(
            "t3",
            at=NOW + 3,
            reason="worker_lost",
            message=a_message(task_id="t3", queue="slow"),
            failed_queue="slow.failed",
        ),
        "four": failed(
            "t4",
            at=NOW + 4,
            task="Shop.ship",
            failure=a_failure(fingerprint="00aabb" + "0" * 10, message="NONE left"),
            arguments={"order": "7", "name": "'Ann'"},
        ),
        "five": failed("t5", at=NOW + 5, arguments={"order": "77"}),
        "six": failed("t6", at=NOW + 6, task="shop_ship"),
    }
    store.keep(list(documents.values()))
    ids = {name: document["id"] for name, document in documents.items()}
    store.discard([ids["five"]])
    claim_one(store, ids["six"])
    return ids


FILTERS: list[tuple[Filter, str]] = [
    (ALL, "six five four three two one"),
    (Filter(), "four three two one"),
    (Filter(state=State.UNRESOLVED), "four three two one"),
    (Filter(state=State.DISCARDED), "five"),
    (Filter(state=State.REPLAYING), "six"),
    (Filter(state=State.RESOLVED), ""),
    (Filter(state=None, task="shop.*"), "five three two one"),
    (Filter(state=None, task="shop.ship"), "five three one"),
    (Filter(state=None, task="shop_ship"), "six"),
    (Filter(state=None, task="shop?ship"), "six five three one"),
    (Filter(state=None, task="*.[!s]*"), "two"),
    (Filter(state=None, task="[sS]hop.ship"), "five four three one"),
    (Filter(state=None, task="%"), ""),
    (Filter(state=None, task="shop.shi\\"), ""),
    (Filter(state=None, task="*"), "six five four three two one"),
    (Filter(state=None, queue="slow"), "three"),
    (Filter(state=None, queue="slo"), ""),
    (Filter(state=None, failed_queue="slow.failed"), "three"),
    (Filter(state=None, exception="KeyError"), "two"),
    (Filter(state=None, exception="NoStock"), "six five four three one"),
    (Filter(state=None, exception="shop.errors.*"), "six five four three one"),
    (Filter(state=None, exception="*Error"), "two"),
    (Filter(state=None, exception="errors.NoStock"), ""),
    (Filter(state=None, exception="keyerror"), ""),
    (Filter(state=None, message="NONE LEFT"), "six five four three one"),
    (Filter(state=None, message="100%_"), "two"),
    (Filter(state=None, message="100%%"), ""),
    (Filter(state=None, message="1__"), ""),
    (Filter(state=None, message="sure\\"), "two"),
    (Filter(state=None, reason="worker_lost"), "three"),
    (Filter(state=None, group="00aa"), "four"),
    (Filter(state=None, group="00AABB0000000000"), "four"),
    (Filter(state=None, group="00aabb00000000000"), ""),
    (Filter(state=None, group="%"), ""),
    (Filter(state=None, since=NOW + 5), "six five"),
    (Filter(state=None, until=NOW + 2), "two one"),
    (Filter(state=None, since=NOW + 3, until=NOW + 4), "four three"),
    (Filter(state=None, since=NOW + 7), ""),
    (Filter(state=None, release="v1"), "one"),
    (Filter(state=None, release="v"), ""),
    (Filter(state=None, worker="celery@t*"), "two"),
    (Filter(state=None, worker="celery@two"), "two"),
    (Filter(state=None, args=(("order", "7"),)), "four"),
    (Filter(state=None, args=(("order", "7"), ("name", "Ann"))), "four"),
    (Filter(state=None, args=(("order", "77"),)), "five"),
    (Filter(state=None, args=(("order", "7"), ("name", "Bob"))), ""),
    (Filter(args=(("order", "77"),)), ""),
    (Filter(state=None, task="shop.*", reason="worker_lost"), "three"),
    (Filter(state=None, ids=()), ""),
]


def in_short(value: Any) -> str:
    """A filter's words; times from now, so that every process has the same ids."""
    if isinstance(value, str):
        return value.replace(" ", ",") or "none"
    plain = Filter(state=None)
    words = {
        name: getattr(value, name)
        for name in Filter.__slots__
        if getattr(value, name) != getattr(plain, name)
    }
    return " ".join(
        f"{name}={word - NOW:+.0f}" if isinstance(word, float) else f"{name}={word}"
        for name, word in words.items()
    )


@pytest.fixture(scope="module")
def listed(backend: Backend) -> tuple[FailedTaskStore, dict[str, str]]:
    """A store with six failed tasks, which nobody changes."""
    store = backend.failed(fresh_name("shop"))
    return store, filled(store)


@pytest.mark.parametrize(("wanted", "names"), FILTERS, ids=in_short)
def test_a_filter_finds_what_it_says(
    listed: tuple[FailedTaskStore, dict[str, str]], wanted: Filter, names: str
) -> None:
    """In list and in count; last failed first."""
    store, ids = listed
    expected = [ids[name] for name in names.split()]

    assert [summary.id for summary in store.list(wanted)] == expected
    assert [summary.id for summary in store.list(wanted, limit=50)] == expected
    assert store.count(wanted) == len(expected)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # see the end of this file
@pytest.mark.parametrize(
    "wanted",
    [ALL, Filter(state=None, task="shop*"), Filter(state=None, exception="No*")],
    ids=in_short,
)
def test_a_limit_takes_the_newest(
    listed: tuple[FailedTaskStore, dict[str, str]], wanted: Filter
) -> None:
    """Of those that match, whether SQL or Python finds them."""
    store, _ = listed
    everything = list(store.list(wanted))

    assert len(everything) > 4
    for limit in (1, 2, 4, 50):
        assert list(store.list(wanted, limit=limit)) == everything[:limit]
    gc.collect()


def test_ids_are_a_filter_too(listed: tuple[FailedTaskStore, dict[str, str]]) -> None:
    """Only these, in the order of a list."""
    store, ids = listed
    wanted = Filter(state=None, ids=(ids["one"], ids["four"], "0" * 32))

    assert [s.id for s in store.list(wanted)] == [ids["four"], ids["one"]]


def test_every_word_of_a_filter_is_tried_here() -> None:
    """A new word needs a line in the table."""
    plain = Filter()
    tried = {
        name
        for wanted, _ in FILTERS
        for name in Filter.__slots__
        if getattr(wanted, name) != getattr(plain, name)
    }

    assert tried == set(Filter.__slots__)


def test_the_newest_come_first_and_equals_by_id(store: FailedTaskStore) -> None:
    """Two pages never show one record twice."""
    ids = keep(store, *(f"t{i}" for i in range(10)))

    assert [summary.id for summary in store.list(ALL)] == sorted(ids)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # see the end of this file
def test_a_list_that_is_not_read_to_its_end_holds_nothing_up(
    store: FailedTaskStore,
) -> None:
    """`list | head` leaves no lock behind."""
    keep(store, *(f"t{i}" for i in range(10)))
    listing = store.list(ALL)
    next(iter(listing))

    keep(store, "another")

    assert store.count(ALL) == 11
    listing.close()  # type: ignore[attr-defined]
    del listing
    gc.collect()


def test_what_is_missing_is_none(store: FailedTaskStore) -> None:
    """By its whole id only."""
    (id,) = keep(store, "a")

    assert store.get("0" * 32) is None
    assert store.get(id[:8]) is None
    assert store.get("") is None


def test_many_come_in_the_order_asked_for(store: FailedTaskStore) -> None:
    """With their messages, from more than one page; what is missing is left out."""
    ids = keep(store, *(f"t{i}" for i in range(120)))
    store.keep([a_success_document(task_id="ghost", at=NOW)])
    wanted = [*ids[::-1], "0" * 32, a_success_document(task_id="ghost")["id"]]

    found = list(store.get_many(iter(wanted)))

    assert [task.id for task in found] == ids[::-1]
    assert found[0] == get(store, ids[-1])
    assert list(store.get_many([])) == []


def test_whole_ids_are_known(store: FailedTaskStore) -> None:
    """Neither the start of one, nor a success that waits for its failure."""
    ids = keep(store, *(f"t{i}" for i in range(PAGE + 5)))
    ghost = a_success_document(task_id="ghost", at=NOW)
    store.keep([ghost])

    assert store.known([*ids, ids[0][:8], ghost["id"], "0" * 32, "t1"]) == set(ids)
    assert store.known([]) == set()


def test_the_start_of_an_id_finds_it(store: FailedTaskStore) -> None:
    """In any case, and a task id too."""
    ids = keep(store, *(f"task-{i}" for i in range(40)))

    for number, id in enumerate(ids):
        assert store.resolve(id) == [id]
        assert store.resolve(id.upper()[:12]) == [id]
        assert store.resolve(f"task-{number}") == [id]


def test_the_start_of_two_ids_finds_both(store: FailedTaskStore) -> None:
    """At most as many as are asked for, so that the caller can refuse."""
    ids = keep(store, *(f"task-{i}" for i in range(40)))
    start = next(
        a for a in "0123456789abcdef" if sum(id.startswith(a) for id in ids) > 2
    )

    assert len(store.resolve(start)) == 2
    assert set(store.resolve(start, limit=40)) == {i for i in ids if i[0] == start}


@pytest.mark.parametrize("start", ["%", "_", "zz", "tas", "ask-1", "task-1%", " ", "g"])
def test_what_is_no_start_finds_nothing(store: FailedTaskStore, start: str) -> None:
    """No wildcard, no middle of a task id, and no start that is too short."""
    keep(store, "task-1", "task-2")

    assert store.resolve(start) == []


def test_a_task_id_that_looks_like_the_start_of_an_id_is_found(
    store: FailedTaskStore,
) -> None:
    """Both are then meant."""
    (first,) = keep(store, "a")
    (second,) = keep(store, first[:6])

    assert set(store.resolve(first[:6])) == {first, second}


def test_the_start_of_a_task_id_finds_it(store: FailedTaskStore) -> None:
    """Where it is no id's and no whole task id; logs show task ids."""
    one, two, three = keep(store, "order-17", "order-18", "order_%9")

    assert store.resolve("order-17") == [one]
    assert sorted(store.resolve("order-")) == sorted([one, two])
    assert store.resolve("order_%") == [three]
    assert store.resolve("order%") == []
    assert store.resolve("ord") == []


def test_stats_count_by_state_and_the_unresolved_by_what_they_are(
    listed: tuple[FailedTaskStore, dict[str, str]],
) -> None:
    """And the age of the oldest, by its first failure."""
    store, _ = listed

    stats = store.stats()

    assert (stats["unresolved"], stats["replaying"]) == (4, 1)
    assert (stats["discarded"], stats["resolved"]) == (1, 0)
    assert stats["by_reason"] == {"exception": 3, "worker_lost": 1}
    assert stats["by_task"] == {"shop.ship": 2, "Shop.ship": 1, "shop.bill": 1}
    assert stats["by_exception"] == {"shop.errors.NoStock": 3, "KeyError": 1}
    assert stats["by_failed_queue"] == {"shop.failed": 3, "slow.failed": 1}
    first_failed_at = min(s.first_failed_at for s in store.list(Filter()))
    assert abs(time.time() - first_failed_at - stats["oldest_s"]) < 60
    assert stats["oldest_s"] > 598


def test_stats_of_an_empty_store(store: FailedTaskStore) -> None:
    """All zero, and nothing is old."""
    stats = store.stats()

    assert {state: stats[str(state)] for state in State} == dict.fromkeys(State, 0)
    assert stats["oldest_s"] is None
    assert stats["by_task"] == {}


# --- claim ----------------------------------------------------------------------------


def test_a_claim_takes_what_is_unresolved(store: FailedTaskStore) -> None:
    """With a token of its own and all that the message needs."""
    document = failed(in_chord=True, message=a_message(body=b"\x00"))
    store.keep([document])

    claim = claim_one(store, document["id"])

    assert claim.id == document["id"]
    assert len(claim.token) == 32
    assert claim.number == 1
    assert (claim.task, claim.task_id) == ("shop.ship", "task-1")
    assert claim.reason == "exception"
    assert claim.original.body == b"\x00"
    assert (claim.to_queue, claim.wants_new_id, claim.in_chord) == (None, False, True)
    assert state_of(store, claim.id) == (State.REPLAYING, Phase.CLAIMED)


def test_a_claim_has_the_name_of_its_key(store: FailedTaskStore) -> None:
    """As the worker said it: a message that was sent by name carries none."""
    documents = [
        failed("named", facts={"idempotency_key": "charge:1"}),
        failed("marked", marks={"key": ["charge:2", ""]}),
        failed("keyless"),
    ]
    store.keep(documents)

    claims = store.claim([document["id"] for document in documents])
    stale = store.take_stale_claims(older_than_s=-1, limit=10)

    assert [claim.key for claim in claims] == ["charge:1", "charge:2", None]
    assert {claim.key for claim in stale} == {"charge:1", "charge:2", None}


def test_a_claim_gives_what_it_took_in_the_order_asked_for(
    store: FailedTaskStore,
) -> None:
    """What is missing or not unresolved is left out."""
    a, b, c = keep(store, "a", "b", "c")
    store.discard([b])

    claims = store.claim([c, "0" * 32, b, a])

    assert [claim.id for claim in claims] == [c, a]
    assert store.claim([]) == []


def test_what_is_claimed_is_not_claimed_again(store: FailedTaskStore) -> None:
    """Until it is unresolved once more; then with another token and number."""
    (id,) = keep(store, "a")
    first = claim_one(store, id)
    assert store.claim([id]) == []
    store.keep([replay_failed(first)])

    second = claim_one(store, id)

    assert second.token != first.token
    assert second.number == 2


def test_a_claim_is_exclusive_among_threads(make_store: MakeStore) -> None:
    """Each record goes to one of them."""
    namespace = fresh_name("shop")
    ids = keep(make_store(namespace), *(f"t{i}" for i in range(20)))

    def work(step: int) -> Callable[[], Sequence[Claim]]:
        return lambda: make_store(namespace).claim(ids[::step])

    taken = [claim for claims in at_once(*[work(1)] * 4) for claim in claims]

    assert sorted(claim.id for claim in taken) == sorted(ids)
    assert len({claim.token for claim in taken}) == 20


def test_a_claim_is_exclusive_among_processes(make_store: MakeStore) -> None:
    """Two operators press the button at once."""
    namespace = fresh_name("shop")
    ids = keep(make_store(namespace), *(f"t{i}" for i in range(20)))

    def work() -> list[str]:
        taken = []
        for id in ids:
            taken += [claim.id for claim in make_store(namespace).claim([id])]
        return taken

    answers = in_processes(4, work)

    assert sorted(itertools.chain.from_iterable(answers)) == sorted(ids)


def test_a_claim_remembers_how_it_was_meant(store: FailedTaskStore) -> None:
    """Whoever sends it later sends it so; the next claim forgets it."""
    (id,) = keep(store, "a")
    claim = claim_one(store, id, to_queue="other", wants_new_id=True, is_forced=True)
    assert (claim.to_queue, claim.wants_new_id) == ("other", True)
    assert claim.is_forced

    (stale,) = store.take_stale_claims(older_than_s=-1, limit=10)
    store.release(claim, "refused")
    again = claim_one(store, id)

    assert stale == claim
    assert (again.to_queue, again.wants_new_id) == (None, False)
    assert not again.is_forced


def test_only_old_claims_that_were_not_sent_are_stale(store: FailedTaskStore) -> None:
    """Not a young one, a sent one, a running one or a released one."""
    ids = keep(store, "old", "sent", "running", "released", "discarded")
    old, sent, running, released, _ = (claim_one(store, id) for id in ids)
    assert store.take_stale_claims(older_than_s=60, limit=10) == []
    store.mark_sent([(sent, None)])
    store.start(running.id, token=running.token, copy="c")
    store.release(released, "refused")
    store.reopen(ids[4:])

    assert store.take_stale_claims(older_than_s=-1, limit=10) == [old]


def test_a_stale_claim_is_taken_by_one(make_store: MakeStore) -> None:
    """Its age starts anew, so that the next collector leaves it alone."""
    namespace = fresh_name("shop")
    store = make_store(namespace)
    claims = store.claim(keep(store, *(f"t{i}" for i in range(12))))

    def take() -> Sequence[Claim]:
        return make_store(namespace).take_stale_claims(older_than_s=-1, limit=3)

    first = store.take_stale_claims(older_than_s=-1, limit=5)
    everywhere = at_once(take, take, take, take)

    assert len(first) == 5
    assert all(len(found) <= 3 for found in everywhere)
    assert {claim.id for claim in first} <= {claim.id for claim in claims}
    assert store.take_stale_claims(older_than_s=60, limit=50) == []


def test_a_stale_claim_that_was_taken_is_young_again(store: FailedTaskStore) -> None:
    """The next collector would send it a second time."""
    (claim,) = store.claim(keep(store, "a"))

    taken = eventually(
        lambda: store.take_stale_claims(older_than_s=1.0, limit=5), within_s=10
    )

    assert taken == [claim]
    assert store.take_stale_claims(older_than_s=1.0, limit=5) == []


# --- sent, released, finished ---------------------------------------------------------


def test_a_sent_claim_is_counted(store: FailedTaskStore) -> None:
    """With the task id that it got, where that is new."""
    a, b = keep(store, "a", "b")
    claims = [claim_one(store, a), claim_one(store, b)]

    store.mark_sent([(claims[0], None), (claims[1], "new-id")])
    store.mark_sent([])

    assert state_of(store, a) == (State.REPLAYING, Phase.SENT)
    assert [get(store, id).summary.replays for id in (a, b)] == [1, 1]
    assert [get(store, id).replayed_as for id in (a, b)] == [None, "new-id"]


def test_a_run_may_be_faster_than_its_mark(store: FailedTaskStore) -> None:
    """The worker has started, or answered, before the sender could write it down."""
    a, b, c = keep(store, "a", "b", "c")
    running, resolved, failed_again = (claim_one(store, id) for id in (a, b, c))
    store.start(a, token=running.token, copy="c")
    store.keep([replay_succeeded(resolved), replay_failed(failed_again)])

    store.mark_sent([(running, None), (resolved, None), (failed_again, None)])

    assert state_of(store, a) == (State.REPLAYING, Phase.RUNNING)
    assert state_of(store, b) == (State.RESOLVED, None)
    assert state_of(store, c) == (State.UNRESOLVED, None)
    assert [get(store, id).summary.replays for id in (a, b, c)] == [1, 1, 1]


def test_an_older_claims_mark_is_not_counted(store: FailedTaskStore) -> None:
    """The record has been claimed anew meanwhile."""
    (id,) = keep(store, "a")
    old = claim_one(store, id)
    store.release(old, "refused")
    claim_one(store, id)

    store.mark_sent([(old, "old-id")])

    assert state_of(store, id) == (State.REPLAYING, Phase.CLAIMED)
    assert get(store, id).summary.replays == 0
    assert get(store, id).replayed_as is None


def test_a_released_claim_is_unresolved_with_a_note(store: FailedTaskStore) -> None:
    """Its message does not run, should it be there all the same."""
    (id,) = keep(store, "a")
    claim = claim_one(store, id)

    store.release(claim, "the queue is full")

    assert state_of(store, id) == (State.UNRESOLVED, None)
    assert get(store, id).summary.note == "the queue is full"
    assert store.start(id, token=claim.token, copy="c") is False


@pytest.mark.parametrize("progress", ["sent", "running", "resolved", "claimed anew"])
def test_only_a_claim_that_went_nowhere_is_released(
    store: FailedTaskStore, progress: str
) -> None:
    """A message that is on its way keeps its token."""
    (id,) = keep(store, "a")
    claim = claim_one(store, id)
    if progress == "sent":
        store.mark_sent([(claim, None)])
    elif progress == "running":
        store.start(id, token=claim.token, copy="c")
    elif progress == "resolved":
        store.keep([replay_succeeded(claim)])
    else:
        store.release(claim, "first")
        claim_one(store, id)
    before = state_of(store, id)

    store.release(claim, "too late")

    assert state_of(store, id) == before


def test_a_replay_that_nobody_reports_is_finished(store: FailedTaskStore) -> None:
    """Only one that is under way."""
    a, b, c = keep(store, "a", "b", "c")
    claim_one(store, a)
    store.discard([c])

    store.finish([a, b, c], "sent; its task is not resilient")

    assert state_of(store, a) == (State.RESOLVED, None)
    assert get(store, a).summary.note == "sent; its task is not resilient"
    assert state_of(store, b) == (State.UNRESOLVED, None)
    assert state_of(store, c) == (State.DISCARDED, None)


# --- the fence ------------------------------------------------------------------------


@pytest.mark.parametrize("is_sent", [False, True])
def test_the_first_copy_runs(store: FailedTaskStore, is_sent: bool) -> None:
    """Also where it is faster than the mark of its sender."""
    claim = claim_one(store, *keep(store, "a"))
    if is_sent:
        store.mark_sent([(claim, None)])

    assert store.start(claim.id, token=claim.token, copy="c1") is True
    assert state_of(store, claim.id) == (State.REPLAYING, Phase.RUNNING)


def test_the_same_copy_runs_each_time_it_is_delivered(store: FailedTaskStore) -> None:
    """Its worker died: it is redelivered and runs again, as any task does."""
    claim = claim_one(store, *keep(store, "a"))

    answers = [store.start(claim.id, token=claim.token, copy="c1") for _ in range(3)]

    assert answers == [True, True, True]


def test_another_copy_does_not_run(store: FailedTaskStore) -> None:
    """Two were sent after a crash; the first one to start is the one that runs."""
    claim = claim_one(store, *keep(store, "a"))
    store.start(claim.id, token=claim.token, copy="c1")

    assert store.start(claim.id, token=claim.token, copy="c2") is False
    assert store.start(claim.id, token=claim.token, copy="c1") is True


def test_copies_that_start_at_once_are_told_apart(make_store: MakeStore) -> None:
    """Exactly one of them runs."""
    namespace = fresh_name("shop")
    store = make_store(namespace)
    for round_number in range(5):
        claim = claim_one(store, *keep(store, f"t{round_number}"))

        def start(copy: str, claim: Claim = claim) -> Callable[[], bool]:
            return lambda: make_store(namespace).start(
                claim.id, token=claim.token, copy=copy
            )

        assert sorted(at_once(*(start(f"c{i}") for i in range(4)))) == [
            *(False, False, False),
            True,
        ]


def test_a_wrong_token_does_not_run(store: FailedTaskStore) -> None:
    """Neither an older replay's nor an invented one."""
    (id,) = keep(store, "a")
    old = claim_one(store, id)
    store.release(old, "refused")
    new = claim_one(store, id)

    assert store.start(id, token=old.token, copy="c") is False
    assert store.start(id, token="0" * 32, copy="c") is False
    assert store.start(id, token="", copy="c") is False
    assert state_of(store, id) == (State.REPLAYING, Phase.CLAIMED)
    assert store.start(id, token=new.token, copy="c") is True


@pytest.mark.parametrize("ending", ["resolved", "failed", "finished", "reopened"])
def test_a_replay_that_has_ended_does_not_run(
    store: FailedTaskStore, ending: str
) -> None:
    """Its message may come late, or again."""
    (id,) = keep(store, "a")
    claim = claim_one(store, id)
    store.start(id, token=claim.token, copy="c")
    if ending == "resolved":
        store.keep([replay_succeeded(claim)])
    elif ending == "failed":
        store.keep([replay_failed(claim)])
    elif ending == "finished":
        store.finish([id], "done")
    else:
        store.reopen([id])

    assert store.start(id, token=claim.token, copy="c") is False
    assert store.start(id, token=claim.token, copy="c2") is False


@pytest.mark.parametrize("state", ["unresolved", "discarded"])
def test_what_is_not_being_replayed_does_not_run(
    store: FailedTaskStore, state: str
) -> None:
    """A message with a mark that nobody gave it."""
    (id,) = keep(store, "a")
    if state == "discarded":
        store.discard([id])

    assert store.start(id, token="0" * 32, copy="c") is False


def test_a_message_whose_record_is_gone_runs(store: FailedTaskStore) -> None:
    """Pruned: losing the task would be worse."""
    assert store.start("0" * 32, token="t", copy="c") is True
    assert list(store.list(ALL)) == []


# --- discard and reopen ---------------------------------------------------------------


def test_only_the_unresolved_are_discarded(store: FailedTaskStore) -> None:
    """And counted."""
    a, b, c = keep(store, "a", "b", "c")
    claim = claim_one(store, b)
    store.keep([replay_succeeded(claim_one(store, c))])

    assert store.discard([a, b, c, "0" * 32]) == 1
    assert store.discard([a]) == 0
    assert state_of(store, a) == (State.DISCARDED, None)
    assert state_of(store, b) == (State.REPLAYING, Phase.CLAIMED)
    assert state_of(store, c) == (State.RESOLVED, None)
    assert store.start(b, token=claim.token, copy="c") is True


def test_a_discard_is_undone(store: FailedTaskStore) -> None:
    """And can be claimed again; a resolved one is not reopened."""
    a, b = keep(store, "a", "b")
    store.discard([a])
    store.keep([replay_succeeded(claim_one(store, b))])

    assert store.reopen([a, b, "0" * 32]) == 1
    assert state_of(store, a) == (State.UNRESOLVED, None)
    assert state_of(store, b) == (State.RESOLVED, None)
    assert claim_one(store, a).number == 1


def test_a_replay_that_never_came_back_is_reopened(store: FailedTaskStore) -> None:
    """Its message, should it still come, is not run; one that ran has succeeded."""
    (id,) = keep(store, "a")
    lost = claim_one(store, id)
    store.mark_sent([(lost, None)])

    assert store.reopen([id]) == 1
    assert state_of(store, id) == (State.UNRESOLVED, None)
    assert store.start(id, token=lost.token, copy="c") is False

    store.keep([replay_succeeded(lost)])
    assert state_of(store, id) == (State.RESOLVED, None)


def test_many_are_discarded_at_once(store: FailedTaskStore) -> None:
    """More than a statement holds."""
    ids = keep(store, *(f"t{i}" for i in range(PAGE + 10)))

    assert store.discard(ids) == PAGE + 10
    assert store.count(Filter(state=State.DISCARDED)) == PAGE + 10
    assert store.reopen(ids) == PAGE + 10


# --- namespaces -----------------------------------------------------------------------


def test_two_namespaces_do_not_see_each_other(make_store: MakeStore) -> None:
    """Two apps share a database, with the very same document."""
    mine, other = (make_store(fresh_name("shop")) for _ in range(2))
    document = failed()
    for store in (mine, other):
        store.keep([document])
    id = document["id"]
    claim = claim_one(mine, id)
    mine.mark_sent([(claim, "new")])
    mine.start(id, token=claim.token, copy="c")

    assert state_of(other, id) == (State.UNRESOLVED, None)
    assert other.take_stale_claims(older_than_s=-1, limit=10) == []
    other_claim = claim_one(other, id)
    assert other.start(id, token=claim.token, copy="c") is False
    other.release(replace(claim, number=9), "x")
    other.mark_sent([(replace(other_claim, number=9), "x")])
    mine.keep([replay_succeeded(claim)])

    assert state_of(other, id) == (State.REPLAYING, Phase.CLAIMED)
    assert get(other, id).replayed_as is None
    assert other.reopen([id]) == 1
    assert other.discard([id]) == 1
    assert state_of(mine, id) == (State.RESOLVED, None)
    assert mine.count(ALL) == other.count(ALL) == 1
    assert mine.stats()["resolved"] == other.stats()["discarded"] == 1
    other.keep([failed("b")])
    assert mine.resolve("b") == []
    assert mine.get(failed("b")["id"]) is None
    assert mine.known([failed("b")["id"]]) == set()
    assert list(mine.get_many([failed("b")["id"]])) == []
    assert mine.count(ALL) == 1


# --- every order of everything --------------------------------------------------------


class Replays(RuleBasedStateMachine):
    """
    Claims, starts, outcomes and second thoughts in any order, against a model.

    The model: a record's state, its number, and the one token that is live.
    """

    def __init__(self, store: FailedTaskStore) -> None:
        super().__init__()
        self.store = store

    @initialize()
    def begin(self) -> None:
        (self.id,) = keep(self.store, fresh_name("task"))
        self.state = State.UNRESOLVED
        self.token: str | None = None
        self.phase: Phase | None = None
        self.copy: str | None = None
        self.claims: list[Claim] = []
        self.now = NOW
        self.attempts = itertools.count(2)

    def later(self) -> float:
        self.now += 10
        return self.now

    def any_claim(self, data: st.DataObject) -> Claim | None:
        return data.draw(st.sampled_from(self.claims)) if self.claims else None

    def set(self, state: State, token: str | None, phase: Phase | None = None) -> None:
        self.state, self.token, self.phase = state, token, phase

    @property
    def live(self) -> str | None:
        return self.token if self.state is State.REPLAYING else None

    @rule()
    def claim(self) -> None:
        claims = self.store.claim([self.id])
        assert len(claims) == (self.state is State.UNRESOLVED)
        for claim in claims:
            assert claim.token not in {known.token for known in self.claims}
            assert claim.number == len(self.claims) + 1
            self.claims.append(claim)
            self.set(State.REPLAYING, claim.token, Phase.CLAIMED)
            self.copy = None

    @rule(data=st.data())
    def mark_sent(self, data: st.DataObject) -> None:
        if claim := self.any_claim(data):
            self.store.mark_sent([(claim, None)])
            if claim.number == len(self.claims) and self.phase is Phase.CLAIMED:
                self.phase = Phase.SENT

    @rule(data=st.data(), copy=st.sampled_from(["c1", "c2"]))
    def start(self, data: st.DataObject, copy: str) -> None:
        if claim := self.any_claim(data):
            may_run = self.store.start(self.id, token=claim.token, copy=copy)
            assert may_run == (
                claim.token == self.live
                and (self.phase is not Phase.RUNNING or copy == self.copy)
            )
            if may_run:
                self.phase, self.copy = Phase.RUNNING, copy

    @rule(data=st.data())
    def success(self, data: st.DataObject) -> None:
        if claim := self.any_claim(data):
            self.store.keep([replay_succeeded(claim, at=self.later())])
            is_latest = claim.number == len(self.claims)
            if claim.token == self.live or (
                is_latest and self.state is State.UNRESOLVED
            ):
                self.set(State.RESOLVED, claim.token)

    @rule(data=st.data(), redelivered=st.booleans())
    def failure(self, data: st.DataObject, redelivered: bool) -> None:
        if claim := self.any_claim(data):
            self.store.keep(
                [
                    replay_failed(
                        claim,
                        redelivered=redelivered,
                        at=self.later(),
                        attempt=next(self.attempts),
                    )
                ]
            )
            is_late = redelivered and self.state is State.RESOLVED
            if claim.token == self.token and not is_late:
                self.set(State.UNRESOLVED, None)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if claim := self.any_claim(data):
            self.store.release(claim, "refused")
            if claim.token == self.live and self.phase is Phase.CLAIMED:
                self.set(State.UNRESOLVED, None)

    @rule()
    def stale(self) -> None:
        taken = self.store.take_stale_claims(older_than_s=-1, limit=10)
        is_stale = self.phase is Phase.CLAIMED
        assert [claim.token for claim in taken] == [self.token] * is_stale

    @rule()
    def finish(self) -> None:
        self.store.finish([self.id], "done")
        if self.state is State.REPLAYING:
            self.set(State.RESOLVED, self.token)

    @rule()
    def reopen(self) -> None:
        changed = self.store.reopen([self.id])
        assert changed == (self.state in (State.REPLAYING, State.DISCARDED))
        if changed:
            self.set(State.UNRESOLVED, None)

    @rule()
    def discard(self) -> None:
        changed = self.store.discard([self.id])
        assert changed == (self.state is State.UNRESOLVED)
        if changed:
            self.set(State.DISCARDED, None)

    @invariant()
    def the_record_is_as_the_model_says(self) -> None:
        assert state_of(self.store, self.id) == (self.state, self.phase)

    @invariant()
    def no_superseded_token_starts(self) -> None:
        superseded = [c for c in self.claims if c.token != self.live]
        for claim in superseded[-2:]:
            assert not self.store.start(self.id, token=claim.token, copy="c1")


def test_one_token_at_most_is_live_in_any_order(make_store: MakeStore) -> None:
    """A superseded token never starts, and neither does a resolved record."""
    run_state_machine_as_test(
        lambda: Replays(make_store(fresh_name("shop"))),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- moving elsewhere -----------------------------------------------------------------


def with_every_state(store: FailedTaskStore) -> dict[str, str]:
    """One record of each state and phase; their ids by name."""
    names = ("unresolved", "claimed", "sent", "running", "resolved", "discarded")
    ids = dict(zip(names, keep(store, *names), strict=True))
    for name in ("claimed", "sent", "running", "resolved"):
        claim = claim_one(store, ids[name], to_queue="other", wants_new_id=True)
        if name != "claimed":
            store.mark_sent([(claim, "new-id")])
        if name == "running":
            assert store.start(claim.id, token=claim.token, copy="copy")
        if name == "resolved":
            store.keep([replay_succeeded(claim)])
    store.discard([ids["discarded"]])
    return ids


def test_what_is_kept_is_the_same_in_another_store(make_store: MakeStore) -> None:
    """Of every state, with its attempts, its replay and its note."""
    one, other = make_store(fresh_name("shop")), make_store(fresh_name("shop"))
    ids = list(with_every_state(one).values())
    whole = list(one.kept(ids))

    assert [kept.record.id for kept in whole] == ids
    assert other.insert(whole) == set(ids)

    assert list(other.kept(ids)) == whole
    assert snapshot(other) == snapshot(one)
    assert {n: c for n, c in other.stats().items() if n != "oldest_s"} == {
        n: c for n, c in one.stats().items() if n != "oldest_s"
    }
    assert other.usage() == one.usage()


def test_what_is_there_is_not_inserted_again(make_store: MakeStore) -> None:
    """It may have gone on since it was exported."""
    store = make_store(fresh_name("shop"))
    (id,) = keep(store, "a")
    before = list(store.kept([id]))
    store.discard([id])

    assert store.insert(before) == set()

    assert state_of(store, id) == ("discarded", None)


def test_what_is_new_is_inserted_beside_what_is_there(make_store: MakeStore) -> None:
    """And only what is new is told of."""
    one, other = make_store(fresh_name("shop")), make_store(fresh_name("shop"))
    names = ["a", "b", "c", "d"]
    ids = keep(one, *names)
    keep(other, "b", "d")

    assert other.insert(list(one.kept(ids))) == {ids[0], ids[2]}

    assert other.known(ids) == set(ids)


def test_a_moved_replay_goes_on_in_the_other_store(make_store: MakeStore) -> None:
    """The same token and the same copy; a stale claim is sent from there."""
    one, other = make_store(fresh_name("shop")), make_store(fresh_name("shop"))
    ids = with_every_state(one)
    other.insert(list(one.kept(ids.values())))

    running = one.take_stale_claims(older_than_s=-1, limit=9)
    assert [c.id for c in other.take_stale_claims(older_than_s=-1, limit=9)] == [
        ids["claimed"]
    ]
    (claim,) = running
    assert other.start(ids["claimed"], token=claim.token, copy="x")
    assert not other.start(ids["running"], token="t", copy="another")


def test_what_was_not_changed_is_removed(make_store: MakeStore) -> None:
    """With its place in every list and count."""
    store = make_store(fresh_name("shop"))
    ids = list(with_every_state(store).values())

    assert store.remove(list(store.kept(ids))) == set(ids)

    assert list(store.list(ALL)) == []
    assert store.usage() == {}
    assert store.known(ids) == set()
    assert store.resolve("running") == []
    assert store.take_stale_claims(older_than_s=-1, limit=9) == []
    stats = store.stats()
    assert not any(stats[state] for state in State)
    assert stats["by_task"] == stats["by_reason"] == {}
    assert stats["oldest_s"] is None


@pytest.mark.parametrize("how", ["claim", "discard", "failure", "gone"])
def test_what_was_changed_is_not_removed(store: FailedTaskStore, how: str) -> None:
    """Somebody wants it."""
    (id,) = keep(store, "a")
    before = list(store.kept([id]))
    if how == "claim":
        claim_one(store, id)
    elif how == "discard":
        store.discard([id])
    elif how == "failure":
        store.keep([failed("a", at=NOW - 50, attempt=2)])
    else:
        assert store.remove(before) == {id}

    assert store.remove(before) == set()

    assert store.known([id]) == (set() if how == "gone" else {id})


def test_usage_counts_by_failed_queue(store: FailedTaskStore) -> None:
    """Number and bytes of every state; a success that waits does not count."""
    store.keep(
        [
            failed("a", failed_queue="one"),
            failed("b", failed_queue="one", message=a_message(body=os.urandom(90_000))),
            failed("c", failed_queue="two"),
            a_success_document(at=NOW, task_id="d"),
        ]
    )

    usage = store.usage()

    assert {queue: used.count for queue, used in usage.items()} == {"one": 2, "two": 1}
    assert 90_000 < usage["one"].size < 130_000
    assert 1_000 < usage["two"].size < 10_000
    assert sum(
        kept.size for kept in store.kept([s.id for s in store.list(ALL)])
    ) == sum(used.size for used in usage.values())


def test_a_further_failure_changes_the_size(store: FailedTaskStore) -> None:
    """Not only adds to it."""
    store.keep([failed("a", message=a_message(body=os.urandom(90_000)))])
    store.keep([failed("a", at=NOW + 50, attempt=2)])

    (used,) = store.usage().values()
    assert used.count == 1
    assert used.size < 10_000


@pytest.mark.parametrize("wanted", [ALL, Filter(), Filter(task="*")])
def test_the_oldest_come_first_where_that_is_asked_for(
    store: FailedTaskStore, wanted: Filter
) -> None:
    """Through every page, also with a limit."""
    count = PAGE + 100
    store.keep([failed(f"t{n}", at=NOW + n) for n in range(count)])

    times = [s.last_failed_at for s in store.list(wanted, oldest_first=True)]
    first = store.list(wanted, limit=3, oldest_first=True)

    assert times == [NOW + n for n in range(count)]
    assert [s.task_id for s in first] == ["t0", "t1", "t2"]


def test_many_that_failed_at_one_moment_are_all_listed(store: FailedTaskStore) -> None:
    """More than a page of them, among others."""
    store.keep([failed(f"t{n}", at=NOW + n // 700) for n in range(1_400)])

    for oldest_first in (False, True):
        found = [s.id for s in store.list(ALL, oldest_first=oldest_first)]
        assert len(found) == len(set(found)) == 1_400


# --- errors ---------------------------------------------------------------------------


def test_a_store_that_is_away_says_so(backend_that_is_away: Backend) -> None:
    """Every method that asks it: nothing is known then."""
    store = backend_that_is_away.failed("shop")
    claim = Claim("r", "t", 1, "t", "i", "exception", a_message())
    calls: list[Callable[[], Any]] = [
        lambda: store.keep([failed()]),
        lambda: list(store.list(ALL)),
        lambda: store.count(ALL),
        lambda: store.get("r"),
        lambda: list(store.get_many(["r"])),
        lambda: store.known(["r"]),
        lambda: store.resolve("r"),
        lambda: store.claim(["r"]),
        lambda: store.mark_sent([(claim, None)]),
        lambda: store.release(claim, "x"),
        lambda: store.finish(["r"], "x"),
        lambda: store.take_stale_claims(older_than_s=1, limit=1),
        lambda: store.start("r", token="t", copy="c"),
        lambda: store.discard(["r"]),
        lambda: store.reopen(["r"]),
        lambda: store.stats(),
    ]

    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()


def test_a_long_release_is_kept(store: FailedTaskStore) -> None:
    """An image's digest has 71 characters; the collector would never get past it."""
    document = failed(release="sha256:" + "a" * 64)

    store.keep([document])

    assert store.get(document["id"]) is not None


@pytest.mark.parametrize("where", ["task", "task_id", "queue", "exception"])
@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"], ids=["NUL", "surrogate"])
def test_a_hostile_name_is_kept(store: FailedTaskStore, where: str, text: str) -> None:
    """A Redis message names its task so; no later failure would be collected."""
    facts: dict[str, Any] = {
        "task": {"task": text},
        "task_id": {"task_id": text},
        "queue": {"message": a_message(queue=text)},
        "exception": {"failure": a_failure(exception=text)},
    }[where]
    document = failed(**facts)

    store.keep([document])

    assert store.get(document["id"]) is not None


@pytest.mark.parametrize("where", ["task", "task_id"])
def test_a_name_with_a_lone_surrogate_is_kept(
    store: FailedTaskStore, where: str
) -> None:
    """On every store; "\\ud800" is valid JSON."""
    store.keep([failed(**{where: "a\ud800b"})])

    assert store.count(ALL) == 1


def test_an_id_that_is_given_twice_is_claimed_once(store: FailedTaskStore) -> None:
    """Else Replayer.replay(["a", "a"]) sends two copies."""
    (id,) = keep(store, "a")

    assert len(store.claim([id, id])) == 1


def test_a_part_of_a_message_is_found_in_any_case(store: FailedTaskStore) -> None:
    """As Filter.message says, in every language."""
    store.keep([failed(failure=a_failure(message="KEIN LAGER FÜR ÄPFEL"))])

    assert store.count(Filter(message="für äpfel")) == 1


def test_first_failed_at_is_that_of_the_oldest_failure(store: FailedTaskStore) -> None:
    """Whatever came first; a spool delivers late."""
    store.keep([failed(at=NOW + 50, attempt=2), failed(at=NOW)])

    (summary,) = store.list(ALL)
    assert summary.first_failed_at == NOW


def test_a_list_with_a_limit_closes_its_cursor(
    postgresql_url: Callable[[], str],
) -> None:
    """psycopg warns of a server cursor that is deleted while it is open."""
    database = SqlDatabase(postgresql_url())
    store = SqlFailedTaskStore(database, "shop")
    keep(store, "a", "b", "c")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = list(store.list(Filter(task="*"), limit=1))
        gc.collect()
    database.close()

    assert len(found) == 1
    assert [str(warning.message) for warning in told] == []


# --- before dead letters are taken ----------------------------------------------------


def test_a_store_that_keeps_passes_its_check(store: FailedTaskStore) -> None:
    """And nothing in it changes."""
    (id,) = keep(store, "a")
    store.release(claim_one(store, id), "the queue is missing")
    before = snapshot(store)

    store.check()

    assert snapshot(store) == before


def test_a_store_that_only_reads_fails_its_check(
    database: SqlDatabase, tmp_path: Path
) -> None:
    """As `keep` would: a copy that is not to be written to, or a standby."""
    if database.is_sqlite:
        path = tmp_path / "read_only.sqlite3"
        writable = SqlDatabase(f"sqlite:///{path}")
        SqlFailedTaskStore(writable, "n").check()
        writable.close()
        read_only = SqlDatabase(f"sqlite:///file:{path}?mode=ro&uri=true")
    else:
        SqlFailedTaskStore(database, "n").check()
        url = database._url
        if url.get_backend_name() == "postgresql":
            option = {"options": "-c default_transaction_read_only=on"}
            url = url.update_query_dict(option)
        else:
            with database.writing() as connection:
                connection.execute(text("CREATE USER IF NOT EXISTS reader"))
                connection.execute(text(f"GRANT SELECT ON {url.database}.* TO reader"))
            url = url.set(username="reader")
        read_only = SqlDatabase(url.render_as_string(hide_password=False))
    store = SqlFailedTaskStore(read_only, "n")

    with pytest.raises(StoreUnavailable):
        store.keep([failed("a")])
    with pytest.raises(StoreUnavailable):
        store.check()
    read_only.close()
