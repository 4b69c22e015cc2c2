"""One suite for every store of starts: what `StartStore` promises."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import pytest
from unit.conftest import Backend
from unit.specimens import fresh_name

from celery_resilience.crashes.store import StartStore
from celery_resilience.errors import StoreUnavailable

HOUR = 3_600.0


@pytest.fixture
def make_store(backend: Backend) -> Callable[[str], StartStore]:
    """Makes stores for a namespace."""
    return backend.starts


@pytest.fixture
def store(make_store: Callable[[str], StartStore]) -> StartStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def test_a_start_that_has_not_ended_is_remembered(store: StartStore) -> None:
    """Oldest first, each with whether it ran alone."""
    for is_alone in (False, True, False):
        store.record("k", is_alone=is_alone, worker="w")

    assert store.unfinished("k", window_s=HOUR) == [False, True, False]
    assert store.unfinished("other", window_s=HOUR) == []


def test_an_ended_run_is_forgotten(store: StartStore) -> None:
    """With all earlier starts of its message, and no other's."""
    for key in ("a", "a", "b"):
        store.record(key, is_alone=False, worker="w")

    store.clear("a")
    store.clear("never")

    assert store.unfinished("a", window_s=HOUR) == []
    assert store.unfinished("b", window_s=HOUR) == [False]


def test_the_window_forgets(store: StartStore) -> None:
    """A start counts for so many seconds, by the store's clock."""
    store.record("k", is_alone=True, worker="w")

    assert store.unfinished("k", window_s=60) == [True]
    assert store.unfinished("k", window_s=0) == []


def test_a_worker_that_was_asked_to_stop_is_forgotten(store: StartStore) -> None:
    """Only its own starts: what it cuts off is no crash."""
    store.record("a", is_alone=False, worker="celery@one:1")
    store.record("a", is_alone=True, worker="celery@two:2")
    store.record("b", is_alone=False, worker="celery@one:1")

    store.clear_worker("celery@one:1")

    assert store.unfinished("a", window_s=HOUR) == [True]
    assert store.unfinished("b", window_s=HOUR) == []


def test_a_worker_with_a_long_name_is_forgotten_too(store: StartStore) -> None:
    """A column has a limit, a host's name may not."""
    name = "celery@" + "x" * 400
    store.record("k", is_alone=False, worker=name)
    assert store.unfinished("k", window_s=HOUR) == [False]

    store.clear_worker(name)

    assert store.unfinished("k", window_s=HOUR) == []


def test_two_namespaces_do_not_see_each_other(
    make_store: Callable[[str], StartStore],
) -> None:
    """Two apps share a database and a task id."""
    mine, other = (make_store(fresh_name("shop")) for _ in range(2))
    for store in (mine, other):
        store.record("k", is_alone=False, worker="w")

    mine.clear("k")
    mine.clear_worker("w")

    assert mine.unfinished("k", window_s=HOUR) == []
    assert other.unfinished("k", window_s=HOUR) == [False]


def test_children_record_at_once(make_store: Callable[[str], StartStore]) -> None:
    """Every start is there."""
    namespace = fresh_name("shop")

    def record() -> None:
        for _ in range(5):
            make_store(namespace).record("k", is_alone=False, worker="w")

    threads = [Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert make_store(namespace).unfinished("k", window_s=HOUR) == [False] * 20


def test_a_store_that_is_away_says_so(backend_that_is_away: Backend) -> None:
    """Every method: nothing is known then."""
    store = backend_that_is_away.starts("shop")

    for call in (
        lambda: store.unfinished("k", window_s=1),
        lambda: store.record("k", is_alone=True, worker="w"),
        lambda: store.clear("k"),
        lambda: store.clear_worker("w"),
    ):
        with pytest.raises(StoreUnavailable):
            call()
