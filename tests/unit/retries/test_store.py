"""One suite for every store of budgets: what `BudgetStore` promises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.conftest import AWAY, SQL_KINDS, _make_url_of
from unit.specimens import fresh_name

from celery_resilience.errors import StoreUnavailable
from celery_resilience.retries.memory_store import MemoryBudgetStore
from celery_resilience.retries.options import BudgetOptions
from celery_resilience.retries.redis_store import RedisBudgetStore
from celery_resilience.retries.sql_store import SqlBudgetStore
from celery_resilience.retries.store import Bucket, BudgetStore, Withdrawal, withdrawn
from celery_resilience.stores.redis import RedisServer
from celery_resilience.stores.sql import SqlDatabase

MakeStore = Callable[[str], BudgetStore]

#: Gains next to nothing by itself.
SLOW = BudgetOptions(share=0.1, per_s=0.001, most=3)


def maker(url: str) -> tuple[MakeStore, list[Any]]:
    """Makes stores for a namespace, and what is to be closed."""
    opened: list[Any] = []

    def make(namespace: str) -> BudgetStore:
        if url.startswith("redis"):
            server = RedisServer(url, namespace)
            opened.append(server)
            return RedisBudgetStore(server)
        if not opened:
            opened.append(SqlDatabase(url))
        return SqlBudgetStore(opened[0], namespace)

    return make, opened


@pytest.fixture(scope="module", params=["memory", "redis", *SQL_KINDS])
def make_store(request: Any) -> Iterator[MakeStore]:
    """Makes stores of each kind; the same namespace has the same budgets."""
    if request.param == "memory":
        stores: dict[str, MemoryBudgetStore] = {}
        yield lambda namespace: stores.setdefault(
            namespace, MemoryBudgetStore(time.time)
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
def store(make_store: MakeStore) -> BudgetStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def grants(
    store: BudgetStore, times: int, options: BudgetOptions = SLOW, **more: Any
) -> list[bool]:
    """Whether each of several withdrawals was granted at once."""
    words = {"added": 0.0, "max_wait_s": 0.0, **more}
    found = [store.withdraw("bank", options, **words) for _ in range(times)]
    return [it.is_granted for it in found]


def test_a_new_budget_has_what_can_be_saved(store: BudgetStore) -> None:
    """Then there is nothing, and it says when to ask again."""
    assert grants(store, 4) == [True, True, True, False]

    assert store.withdraw("bank", SLOW, added=0, max_wait_s=0) == Withdrawal(False, 0)
    assert store.withdraw("mail", SLOW, added=0, max_wait_s=0).is_granted


def test_first_attempts_add_to_it_up_to_what_can_be_saved(store: BudgetStore) -> None:
    """Not without end, where nothing fails for a month."""
    assert grants(store, 3) == [True] * 3

    assert grants(store, 2, added=1.0) == [True, True]
    assert grants(store, 1, added=0.5) == [False]
    assert grants(store, 1, added=0.5) == [True]
    assert grants(store, 1, added=1_000_000.0) == [True]
    assert grants(store, 3) == [True, True, False]


def test_a_retry_is_promised_for_when_there_will_be_one(store: BudgetStore) -> None:
    """One behind the other, up to the longest wait."""
    options = BudgetOptions(per_s=0.5, most=1)
    found = [store.withdraw("bank", options, added=0, max_wait_s=5.0) for _ in range(4)]

    assert [it.is_granted for it in found] == [True, True, True, False]
    assert [it.wait_s for it in found] == pytest.approx([0, 2, 4, 5], abs=0.5)


def test_it_gains_as_time_passes(store: BudgetStore) -> None:
    """By the store's clock."""
    options = BudgetOptions(per_s=50, most=1)
    assert grants(store, 1, options) == [True]

    end = time.monotonic() + 10
    while not store.withdraw("bank", options, added=0, max_wait_s=0).is_granted:
        assert time.monotonic() < end


def test_apps_do_not_share_budgets(make_store: MakeStore) -> None:
    """They share a store."""
    one, two = make_store(fresh_name("shop")), make_store(fresh_name("shop"))

    assert grants(one, 4)[-1] is False
    assert grants(two, 1) == [True]


def test_no_retry_is_given_twice(make_store: MakeStore) -> None:
    """However many ask at once, the first time too."""
    store = make_store(fresh_name("shop"))
    options = BudgetOptions(per_s=0.001, most=10)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: grants(store, 1, options), range(24)))

    assert sum(it == [True] for it in found) == 10


@pytest.mark.parametrize("url", AWAY)
def test_a_store_that_is_away_says_so(url: str) -> None:
    """Nothing is known of what was done."""
    make, opened = maker(url)
    with pytest.raises(StoreUnavailable):
        grants(make("shop"), 1)
    for it in opened:
        it.close()


# --- the model -------------------------------------------------------------------------

OPTIONS = st.builds(
    BudgetOptions,
    share=st.floats(0, 1),
    per_s=st.floats(0.01, 100),
    most=st.floats(1, 1_000),
)
STEPS = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), max_size=60)


@given(OPTIONS, STEPS, st.floats(0, 900))
def test_a_budget_gives_no_more_than_it_has(
    options: BudgetOptions, steps: list[tuple[float, float]], max_wait_s: float
) -> None:
    """What it began with, what was added, and what time brings until each is due."""
    bucket, now, added, due = None, 0.0, 0.0, []
    for passed_s, more in steps:
        now += passed_s
        added += more
        bucket, said = withdrawn(
            bucket, options, added=more, now=now, max_wait_s=max_wait_s
        )
        assert 0 <= said.wait_s <= max_wait_s * 1.000001 + 1e-6
        if said.is_granted:
            due.append(now + said.wait_s)
        assert bucket.tokens <= options.most
    for count, at in enumerate(due, 1):
        assert count <= (options.most + added + at * options.per_s) * 1.000001 + 1e-6


@given(OPTIONS, st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_clock_that_goes_back_takes_nothing(
    options: BudgetOptions, at: float, now: float
) -> None:
    """And gives nothing."""
    bucket = Bucket(1.0, max(at, now))

    after, said = withdrawn(bucket, options, added=0, now=min(at, now), max_wait_s=0)

    assert said == Withdrawal(True, 0)
    assert after == Bucket(0.0, max(at, now))
