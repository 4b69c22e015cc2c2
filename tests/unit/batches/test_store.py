"""One suite for every store of places: what `CheckpointStore` promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from unit.conftest import Backend
from unit.specimens import fresh_name

from celery_resilience.batches import redis_store, sql_store
from celery_resilience.batches.store import CheckpointStore
from celery_resilience.errors import StoreUnavailable


@pytest.fixture
def make_store(backend: Backend) -> Callable[[str], CheckpointStore]:
    """Makes stores for a namespace."""
    return backend.checkpoints


@pytest.fixture
def store(make_store: Callable[[str], CheckpointStore]) -> CheckpointStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def test_the_last_place_is_remembered(store: CheckpointStore) -> None:
    """Of each task and each of its streams."""
    for place in (b"1", b"\x00\xff", b"3"):
        store.save("t", "rows", place)
    store.save("t", "more", b"4")

    assert store.load("t", "rows") == b"3"
    assert store.load("t", "more") == b"4"
    assert store.load("t", "other") is None
    assert store.load("u", "rows") is None


def test_a_task_of_another_app_is_another(
    make_store: Callable[[str], CheckpointStore],
) -> None:
    """Apps share a store."""
    one, two = make_store(fresh_name("shop")), make_store(fresh_name("shop"))
    one.save("t", "rows", b"1")

    assert two.load("t", "rows") is None


def test_a_finished_task_keeps_its_place_for_a_redelivery(
    store: CheckpointStore,
) -> None:
    """Its message may come again; and a task without any place may end too."""
    store.save("t", "rows", b"1")

    store.finished("t")
    store.finished("never")

    assert store.load("t", "rows") == b"1"


def test_places_past_their_time_are_forgotten(
    make_store: Callable[[str], CheckpointStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is time by the store's clock."""
    for module in (redis_store, sql_store):
        monkeypatch.setattr(module, "KEEP_FINISHED_S", 0)
    store = make_store(fresh_name("shop"))
    store.save("t", "rows", b"1")
    store.save("u", "rows", b"2")

    store.finished("t")
    store.finished("u")

    assert store.load("t", "rows") is None
    store.save("t", "rows", b"3")
    assert store.load("t", "rows") == b"3"


def test_a_store_that_is_away_says_so(backend_that_is_away: Backend) -> None:
    """Nothing is made up."""
    store = backend_that_is_away.checkpoints(fresh_name("shop"))
    with pytest.raises(StoreUnavailable):
        store.load("t", "rows")
    with pytest.raises(StoreUnavailable):
        store.save("t", "rows", b"1")
