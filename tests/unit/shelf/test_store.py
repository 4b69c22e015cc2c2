"""One suite for every store of messages that wait: what `ShelfStore` promises."""

from __future__ import annotations

from collections.abc import Callable
from threading import Barrier, Thread

import pytest
from polling import eventually
from unit.conftest import Backend
from unit.specimens import fresh_name

from celery_resilience.errors import StoreUnavailable
from celery_resilience.shelf.store import ShelfStore, Shelved


@pytest.fixture
def make_store(backend: Backend) -> Callable[[str], ShelfStore]:
    """Makes stores for a namespace."""
    return backend.shelf


@pytest.fixture
def store(make_store: Callable[[str], ShelfStore]) -> ShelfStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def put(store: ShelfStore, *names: str, delay_s: float = 0.0) -> None:
    """Messages of these names."""
    store.put([(Shelved(name, f"<{name}>\u20ac"), delay_s) for name in names])


def names(store: ShelfStore, limit: int = 100, lease_s: float = 600.0) -> list[str]:
    """What is claimed."""
    return sorted(it.id for it in store.claim(limit, lease_s).messages)


def test_what_is_due_is_claimed_once(store: ShelfStore) -> None:
    """With its text; what is not due is not, and it is told when it will be."""
    put(store, "a", "b")
    put(store, "c", delay_s=600)

    claimed = store.claim(100, 700.0)
    assert sorted(claimed.messages) == [
        Shelved("a", "<a>\u20ac"),
        Shelved("b", "<b>\u20ac"),
    ]
    assert claimed.next_due_s == pytest.approx(600, abs=5)
    assert claimed.others == 1
    assert names(store) == []


def test_an_empty_shelf_says_so(store: ShelfStore) -> None:
    """Nobody needs to look again soon."""
    claimed = store.claim(100, 60.0)

    assert claimed == ([], None, 0)
    put(store, "a")
    assert names(store) == ["a"]
    store.remove(["a", "never"])
    store.remove([])
    assert store.claim(100, 60.0) == ([], None, 0)


def test_no_more_are_claimed_than_asked_for(store: ShelfStore) -> None:
    """The longest due first; and it is said that there are more."""
    put(store, "c", delay_s=0.0)
    for number, name in enumerate("ba"):
        put(store, name, delay_s=-10.0 - number)

    claimed = store.claim(2, 60.0)
    assert sorted(it.id for it in claimed.messages) == ["a", "b"]
    assert claimed.others == 1
    assert claimed.next_due_s is not None
    assert claimed.next_due_s <= 0


def test_a_claim_lapses_and_what_was_removed_does_not_come_back(
    store: ShelfStore,
) -> None:
    """Who has claimed it may be dead."""
    put(store, "a", "b")
    assert names(store, lease_s=0.5) == ["a", "b"]
    store.remove(["a"])

    assert names(store) == []
    assert eventually(lambda: names(store), within_s=5) == ["b"]


def test_two_processes_are_not_given_the_same(
    make_store: Callable[[str], ShelfStore],
) -> None:
    """However many ask at once."""
    namespace = fresh_name("shop")
    put(make_store(namespace), *(f"m{n}" for n in range(60)))
    barrier, claimed = Barrier(6), list[str]()

    def work() -> None:
        store = make_store(namespace)
        barrier.wait()
        while found := names(store, 7):
            claimed.extend(found)

    threads = [Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # Who was quicker leaves some to nobody for a moment.
    claimed.extend(names(make_store(namespace)))
    assert sorted(claimed) == sorted(f"m{n}" for n in range(60))


def test_another_app_has_another_shelf(
    make_store: Callable[[str], ShelfStore],
) -> None:
    """Apps share a store."""
    one, two = make_store(fresh_name("shop")), make_store(fresh_name("shop"))
    put(one, "a")

    assert names(two) == []
    two.remove(["a"])
    assert names(one) == ["a"]


def test_many_large_messages_are_put_at_once(store: ShelfStore) -> None:
    """As many as a worker has in hand."""
    store.put([(Shelved(f"m{n}", "x" * 10_000), 0.0) for n in range(200)])

    claimed = store.claim(300, 60.0)
    assert len(claimed.messages) == 200
    assert {len(it.text) for it in claimed.messages} == {10_000}
    store.remove([it.id for it in claimed.messages])
    assert store.claim(100, 60.0).others == 0


def test_a_store_that_is_away_says_so(backend_that_is_away: Backend) -> None:
    """Nothing is made up."""
    store = backend_that_is_away.shelf(fresh_name("shop"))
    with pytest.raises(StoreUnavailable):
        put(store, "a")
    with pytest.raises(StoreUnavailable):
        store.claim(10, 60.0)
    with pytest.raises(StoreUnavailable):
        store.remove(["a"])
