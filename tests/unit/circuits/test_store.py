"""One suite for every store of circuits: what `CircuitStore` promises."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
from polling import eventually
from unit.conftest import AWAY, SQL_KINDS, _make_url_of
from unit.specimens import fresh_name

from celery_resilience.circuits.memory_store import MemoryCircuitStore
from celery_resilience.circuits.redis_store import LIMITS, RedisCircuitStore
from celery_resilience.circuits.sql_store import SqlCircuitStore
from celery_resilience.circuits.store import CircuitStore, Stored
from celery_resilience.errors import StoreUnavailable
from celery_resilience.stores.redis import RedisServer
from celery_resilience.stores.sql import SqlDatabase

MakeStore = Callable[[str], CircuitStore]


def maker(url: str) -> tuple[MakeStore, list[Any]]:
    """Makes stores for a namespace, and what is to be closed."""
    opened: list[Any] = []

    def make(namespace: str) -> CircuitStore:
        if url.startswith("redis"):
            server = RedisServer(url, namespace, **LIMITS)
            opened.append(server)
            return RedisCircuitStore(server)
        if not opened:
            opened.append(SqlDatabase(url))
        return SqlCircuitStore(opened[0], namespace)

    return make, opened


@pytest.fixture(scope="module", params=["memory", "redis", *SQL_KINDS])
def make_store(request: Any) -> Iterator[MakeStore]:
    """Makes stores of each kind; the same namespace has the same circuits."""
    if request.param == "memory":
        stores: dict[str, MemoryCircuitStore] = {}
        yield lambda namespace: stores.setdefault(
            namespace, MemoryCircuitStore(time.time)
        )
        return
    if request.param == "redis":
        url = request.getfixturevalue("servers")("redis").url
    else:
        url = _make_url_of(request.param, request)()
    make, opened = maker(url)
    yield make
    for it in opened:
        it.close()


@pytest.fixture
def store(make_store: MakeStore) -> CircuitStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def new(text: str = "state") -> Stored:
    """A text with a version that nobody has used."""
    return Stored(secrets.token_hex(8), text)


def test_what_was_never_written_is_not_there(store: CircuitStore) -> None:
    """But the store's time is."""
    answer = store.read(["bank", "mail"])

    assert answer.found == {}
    assert abs(answer.now - time.time()) < 5
    assert store.names() == []


def test_who_has_seen_the_last_one_may_replace_it(store: CircuitStore) -> None:
    """And only they: the others are told what is stored instead."""
    first, second = new("1"), new('{"2": "ü"}')
    assert store.swap("bank", "", first, keep_s=60).found == {"bank": first}
    assert store.swap("bank", "", new(), keep_s=60).found == {"bank": first}
    assert store.swap("bank", "other", new(), keep_s=60).found == {"bank": first}
    assert store.swap("bank", first.version, second, keep_s=60).found == {
        "bank": second
    }

    assert store.swap("bank", first.version, new(), keep_s=60).found["bank"] == second
    assert store.read(["mail", "bank"]).found == {"bank": second}


def test_names_are_told(store: CircuitStore) -> None:
    """Whatever is in them, and also where they differ in case alone."""
    names = ["bank", "Bank", "a b", "*?[]\\", "x" * 64, "名" * 64]
    for name in names:
        store.swap(name, "", new(name), keep_s=60)

    assert sorted(store.names()) == sorted(names)
    assert {n: s.text for n, s in store.read(names).found.items()} == {
        name: name for name in names
    }


def test_apps_do_not_share_circuits(make_store: MakeStore) -> None:
    """They share a store."""
    one, two = make_store(fresh_name("shop")), make_store(fresh_name("shop"))
    one.swap("bank", "", new(), keep_s=60)

    assert two.read(["bank"]).found == {}
    assert two.names() == []


def test_a_circuit_that_nobody_writes_is_forgotten(store: CircuitStore) -> None:
    """And may be written anew, as if it had never been."""
    old, fresh = new("old"), new("fresh")
    store.swap("bank", "", old, keep_s=0.05)
    eventually(lambda: store.read(["bank"]).found == {}, within_s=5)

    assert store.swap("bank", old.version, new(), keep_s=60).found == {}
    assert store.names() == []
    assert store.swap("bank", "", fresh, keep_s=60).found == {"bank": fresh}


def test_one_of_many_at_once_replaces_it(make_store: MakeStore) -> None:
    """First and again; each of the others is told whose it is."""
    namespace = fresh_name("shop")
    make_store(namespace).read(["bank"])
    seen = ""
    for _ in range(5):
        barrier = Barrier(6)
        answers: list[tuple[Stored, Stored]] = []

        def swap(
            seen: str = seen,
            barrier: Barrier = barrier,
            answers: list[tuple[Stored, Stored]] = answers,
        ) -> None:
            mine, store = new(), make_store(namespace)
            barrier.wait()
            found = store.swap("bank", seen, mine, keep_s=60).found
            answers.append((mine, found["bank"]))

        threads = [Thread(target=swap) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len({found for _, found in answers}) == 1
        assert len(answers) == 6
        assert sum(mine == found for mine, found in answers) == 1
        seen = answers[0][1].version


def test_each_ticket_is_given_once(make_store: MakeStore) -> None:
    """To whoever asks at the same time; each generation begins at 0."""
    namespace = fresh_name("shop")
    store = make_store(namespace)
    assert store.tickets("bank", 5, 10, keep_s=60) == 0
    assert store.tickets("bank", 5, 1, keep_s=60) == 10
    assert store.tickets("mail", 5, 1, keep_s=60) == 0
    assert store.tickets("bank", 6, 3, keep_s=60) == 0
    assert store.tickets("bank", 6, 3, keep_s=60) == 3
    taken: list[int] = []

    def take() -> None:
        own = make_store(namespace)
        taken.extend(own.tickets("bank", 1_795_622_663, 1, keep_s=60) for _ in "abc")

    threads = [Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(taken) == list(range(18))
    assert store.names() == []


def test_slots_are_no_more_than_the_limit(make_store: MakeStore) -> None:
    """Whoever asks at the same time; one that is given back, or has lapsed, is free."""
    namespace = fresh_name("shop")
    store = make_store(namespace)
    assert store.take_slot("bank", "a", limit=2, lease_s=60)
    assert store.take_slot("bank", "b", limit=2, lease_s=0.05)
    assert store.take_slot("mail", "a", limit=1, lease_s=60)
    eventually(lambda: store.take_slot("bank", "c", limit=2, lease_s=60), within_s=5)
    assert not store.take_slot("bank", "d", limit=2, lease_s=60)
    store.give_slot("bank", "a")
    store.give_slot("bank", "never")
    assert store.take_slot("bank", "e", limit=2, lease_s=60)
    took: list[bool] = []
    barrier = Barrier(6)

    def take(number: int) -> None:
        own = make_store(namespace)
        barrier.wait()
        took.append(own.take_slot("bank", f"t{number}", limit=4, lease_s=60))

    threads = [Thread(target=take, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(took) == [False] * 4 + [True] * 2


@pytest.mark.parametrize("url", AWAY)
def test_a_store_that_is_away_says_so(url: str) -> None:
    """Nothing is made up."""
    make, opened = maker(url)
    store = make("shop")
    with pytest.raises(StoreUnavailable):
        store.read(["bank"])
    with pytest.raises(StoreUnavailable):
        store.swap("bank", "", new(), keep_s=60)
    for it in opened:
        it.close()
