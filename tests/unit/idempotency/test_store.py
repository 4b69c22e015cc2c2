"""One suite for every store of keys: what `KeyStore` promises."""

from __future__ import annotations

import ast
import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from polling import eventually
from services import Service
from sqlalchemy import Text, cast, func, select
from sqlalchemy import case as sql_case
from tcp_proxy import Proxy, proxy_to, url_through
from unit.conftest import Backend
from unit.specimens import HOSTILE_TEXT, fresh_name

from celery_resilience import idempotency
from celery_resilience.errors import StoreUnavailable
from celery_resilience.idempotency.record import Begun, Claim, KeyState, Verdict
from celery_resilience.idempotency.sql_store import SqlKeyStore
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.stores.sql import SqlDatabase

HOUR = 3_600.0

#: Long enough to be seen, and over in a moment.
MOMENT = 0.03

MakeStore = Callable[[str], KeyStore]

fork = multiprocessing.get_context("fork")


@pytest.fixture
def make_store(backend: Backend) -> MakeStore:
    """Makes stores for a namespace; two of one namespace share their keys."""
    return backend.keys


@pytest.fixture
def store(make_store: MakeStore) -> KeyStore:
    """An empty store."""
    return make_store(fresh_name("shop"))


def a_claim(key: str = "a", **facts: Any) -> Claim:
    """A claim of a run, or of a send, that nobody else has made."""
    return Claim(
        **{
            "key": (key * 64)[:64],
            "name": f"charge:{key}",
            "task": "shop.charge",
            "owner": "task-1",
            "token": uuid4().hex,
            "holder": "host:boot:1",
            "fingerprint": "f" * 32,
            "lease_s": HOUR,
            "keep_s": HOUR,
            **facts,
        }
    )


def begin(store: KeyStore, **facts: Any) -> Claim:
    """A claim that has the key."""
    claim = a_claim(**facts)
    assert store.begin(claim).verdict is Verdict.RUN
    return claim


def begin_when_free(store: KeyStore, claim: Claim) -> Begun:
    """The answer that gives *claim* the key, which is busy for a moment."""

    def begun() -> Begun | None:
        answer = store.begin(claim)
        if answer.verdict is Verdict.RUN:
            return answer
        assert answer.verdict is Verdict.BUSY
        return None

    return eventually(begun, every_s=0.01)


def state_of(store: KeyStore, claim: Claim) -> KeyState | None:
    """What became of a claim's key."""
    record = store.get(claim.key)
    return None if record is None else record.state


# --- begin ----------------------------------------------------------------------------


def test_an_unknown_key_is_free(store: KeyStore) -> None:
    """The first epoch is 1."""
    assert store.begin(a_claim()) == Begun(Verdict.RUN, epoch=1)


def test_a_live_lease_is_busy_for_everybody(store: KeyStore) -> None:
    """Its own owner included: that is a redelivery. It says whose it is, how long."""
    begin(store, lease_s=60.0)

    for owner in ("task-1", "task-2"):
        for is_forced in (False, True):
            begun = store.begin(a_claim(owner=owner, is_forced=is_forced))

            assert (begun.verdict, begun.found) == (Verdict.BUSY, KeyState.RUNNING)
            assert begun.owner == "task-1"
            assert 0 < begun.remaining_s <= 60
            assert (begun.epoch, begun.result) == (0, None)


def test_a_lapsed_lease_is_free(store: KeyStore) -> None:
    """With a larger epoch, and it says that a run was cut off."""
    begin(store, lease_s=MOMENT)

    begun = begin_when_free(store, a_claim(owner="task-2"))

    assert begun == Begun(Verdict.RUN, epoch=2, found=KeyState.RUNNING)


def test_a_dead_holder_is_followed_by_its_own_task_only(store: KeyStore) -> None:
    """And only where it is that process which has the lease."""
    begin(store)

    for facts in (
        {"owner": "task-2", "dead_holder": "host:boot:1"},
        {"owner": "task-1", "dead_holder": "host:boot:2"},
        {"owner": "task-1", "dead_holder": ""},
        {"owner": "task-1", "dead_holder": None},
    ):
        assert store.begin(a_claim(**facts)).verdict is Verdict.BUSY
    begun = store.begin(a_claim(dead_holder="host:boot:1"))

    assert begun == Begun(Verdict.RUN, epoch=2, found=KeyState.RUNNING)


def test_nobody_is_dead_who_has_no_name(store: KeyStore) -> None:
    """A run whose holder is unknown keeps its lease."""
    begin(store, holder="")

    assert store.begin(a_claim(holder="", dead_holder="")).verdict is Verdict.BUSY


@pytest.mark.parametrize(
    "state", [KeyState.FAILED, KeyState.INTERRUPTED], ids=["failed", "interrupted"]
)
def test_a_run_that_failed_or_was_interrupted_leaves_its_key(
    store: KeyStore, state: KeyState
) -> None:
    """And the next one hears of it."""
    assert store.finish(begin(store), state) is None
    assert state_of(store, a_claim()) is state

    begun = store.begin(a_claim(owner="task-2"))

    assert begun == Begun(Verdict.RUN, epoch=2, found=state)


def test_a_retry_waits_for_its_own_task(store: KeyStore) -> None:
    """The owner runs at once; others not before the wait has lapsed."""
    store.finish(begin(store), KeyState.RETRYING, until_s=60)

    for is_forced in (False, True):
        busy = store.begin(a_claim(owner="task-2", is_forced=is_forced))
        assert (busy.verdict, busy.found) == (Verdict.BUSY, KeyState.RETRYING)
        assert busy.owner == "task-1"
        assert 0 < busy.remaining_s <= 60
    begun = store.begin(a_claim(owner="task-1"))

    assert begun == Begun(Verdict.RUN, epoch=2, found=KeyState.RETRYING)


def test_a_retry_that_never_came_leaves_its_key(store: KeyStore) -> None:
    """To anybody."""
    store.finish(begin(store), KeyState.RETRYING, until_s=MOMENT)

    begun = begin_when_free(store, a_claim(owner="task-2"))

    assert begun == Begun(Verdict.RUN, epoch=2, found=KeyState.RETRYING)


@pytest.mark.parametrize("result", [None, b"", b"0", b"\x00\xff" * 20_000])
def test_a_done_key_gives_what_was_remembered(
    store: KeyStore, result: bytes | None
) -> None:
    """As it was, also where that is nothing; to its own task too."""
    store.finish(begin(store), KeyState.DONE, result=result)

    for owner in ("task-1", "task-2"):
        assert store.begin(a_claim(owner=owner)) == Begun(
            Verdict.DONE, found=KeyState.DONE, owner="task-1", result=result
        )


def test_a_done_key_runs_again_only_by_force(store: KeyStore) -> None:
    """What was remembered is gone then."""
    store.finish(begin(store), KeyState.DONE, result=b"first")

    forced = a_claim(owner="task-2", is_forced=True)
    assert store.begin(forced) == Begun(Verdict.RUN, epoch=2, found=KeyState.DONE)

    assert store.begin(a_claim()).verdict is Verdict.BUSY
    store.finish(forced, KeyState.DONE)
    assert store.begin(a_claim()).result is None


def test_the_same_claim_again_gets_the_same_answer(store: KeyStore) -> None:
    """Its first answer was lost on the way; a run that has ended is no answer."""
    first = begin(store, lease_s=MOMENT)
    claim = a_claim(owner="task-2")
    answer = begin_when_free(store, claim)

    assert (
        store.begin(claim)
        == answer
        == Begun(Verdict.RUN, epoch=2, found=KeyState.RUNNING)
    )

    assert store.begin(first).verdict is Verdict.BUSY
    store.finish(claim, KeyState.DONE)
    assert store.begin(claim).verdict is Verdict.DONE


def test_an_expired_key_is_unknown(store: KeyStore) -> None:
    """A finished one is remembered for so long; who comes later hears of nothing."""
    claim = begin(store, keep_s=MOMENT)
    store.finish(claim, KeyState.DONE, result=b"old")

    eventually(lambda: store.get(claim.key) is None, every_s=0.01)
    begun = store.begin(a_claim(owner="task-2", fingerprint="e" * 32))

    assert (begun.verdict, begun.found) == (Verdict.RUN, None)


def test_a_run_is_remembered_for_longer_than_its_lease(store: KeyStore) -> None:
    """Else nobody could tell that it was cut off."""
    claim = begin(store, lease_s=60.0, keep_s=600.0)

    record = store.get(claim.key)

    assert record is not None
    assert record.lease_until - record.begun_at == pytest.approx(60, abs=0.01)
    assert record.expires_at - record.begun_at == pytest.approx(660, abs=0.01)


# --- arguments ------------------------------------------------------------------------

OTHER = {"owner": "task-2", "fingerprint": "e" * 32}


@pytest.mark.parametrize(
    "state",
    [KeyState.DONE, KeyState.FAILED, KeyState.INTERRUPTED, KeyState.RETRYING],
    ids=str,
)
def test_other_arguments_are_a_mismatch(store: KeyStore, state: KeyState) -> None:
    """In every state; nothing changes."""
    claim = begin(store)
    store.finish(claim, state)

    begun = store.begin(a_claim(**OTHER))

    assert (begun.verdict, begun.found) == (Verdict.MISMATCH, state)
    assert state_of(store, claim) is state


@pytest.mark.parametrize("lease_s", [HOUR, 0.0], ids=["live", "lapsed"])
def test_other_arguments_than_those_of_a_run_are_a_mismatch(
    store: KeyStore, lease_s: float
) -> None:
    """A lapsed lease does not free its key for another effect."""
    begin(store, lease_s=lease_s)

    assert store.begin(a_claim(**OTHER)).verdict is Verdict.MISMATCH
    mine = a_claim(fingerprint="e" * 32, dead_holder="host:boot:1")
    assert store.begin(mine).verdict is Verdict.MISMATCH


def test_force_compares_no_arguments(store: KeyStore) -> None:
    """A live run is busy all the same."""
    claim = begin(store)
    assert store.begin(a_claim(**OTHER, is_forced=True)).verdict is Verdict.BUSY

    store.finish(claim, KeyState.DONE)

    assert store.begin(a_claim(**OTHER, is_forced=True)).verdict is Verdict.RUN


@pytest.mark.parametrize("until_s", [HOUR, 0.0], ids=["live", "lapsed"])
def test_a_retry_may_have_other_arguments(store: KeyStore, until_s: float) -> None:
    """`self.retry(args=...)`: it is the owner's own."""
    store.finish(begin(store), KeyState.RETRYING, until_s=until_s)

    assert store.begin(a_claim(fingerprint="e" * 32)).verdict is Verdict.RUN


@pytest.mark.parametrize(
    ("first", "second"), [("", "e" * 32), ("e" * 32, ""), ("", "")]
)
def test_no_fingerprint_is_like_any(store: KeyStore, first: str, second: str) -> None:
    """On either side."""
    store.finish(begin(store, fingerprint=first), KeyState.DONE)

    begun = store.begin(a_claim(owner="task-2", fingerprint=second))

    assert begun.verdict is Verdict.DONE


# --- finish ---------------------------------------------------------------------------


def test_a_stale_finish_is_refused(store: KeyStore) -> None:
    """In every state; it hears who has the key, and nothing changes."""
    stale = begin(store, lease_s=0.0)
    newer = begin(store, owner="task-2")

    for state in (
        *(KeyState.DONE, KeyState.FAILED),
        *(KeyState.INTERRUPTED, KeyState.RETRYING),
    ):
        assert store.finish(stale, state, result=b"stale", until_s=9) == "task-2"
    assert state_of(store, newer) is KeyState.RUNNING
    assert store.finish(newer, KeyState.DONE, result=b"newer") is None

    assert store.finish(stale, KeyState.DONE, result=b"stale") == "task-2"
    assert store.begin(a_claim()).result == b"newer"


def test_a_lapsed_lease_that_nobody_took_may_finish(store: KeyStore) -> None:
    """No other run has begun."""
    assert store.finish(begin(store, lease_s=0.0), KeyState.DONE, result=b"r") is None
    assert store.begin(a_claim()).result == b"r"


def test_a_key_that_is_gone_is_written_anew(store: KeyStore) -> None:
    """Its effect happened, and nobody else has it."""
    claim = begin(store)
    store.forget(claim.key, is_running_too=True)

    assert store.finish(claim, KeyState.DONE, result=b"r") is None

    assert store.begin(a_claim(owner="task-2")) == Begun(
        Verdict.DONE, found=KeyState.DONE, owner="task-1", result=b"r"
    )
    record = store.get(claim.key)
    assert record is not None
    assert (record.name, record.task, record.holder, record.epoch) == (
        *("charge:a", "shop.charge"),
        *("host:boot:1", 1),
    )
    assert abs(record.begun_at - record.expires_at + HOUR) < 60


def test_an_expired_key_is_written_anew_too(store: KeyStore) -> None:
    """Whoever had it has not any more."""
    first = begin(store, lease_s=0.0)
    store.finish(begin(store, owner="task-2", keep_s=0.0), KeyState.DONE)

    assert store.finish(first, KeyState.DONE, result=b"r") is None

    assert store.begin(a_claim()).result == b"r"


def test_it_may_be_said_again_and_otherwise(store: KeyStore) -> None:
    """A retry whose message could not be published is a failure after all."""
    claim = begin(store)

    for state in (KeyState.RETRYING, KeyState.FAILED, KeyState.DONE, KeyState.DONE):
        assert store.finish(claim, state, result=b"r", until_s=60) is None
        assert state_of(store, claim) is state


def test_a_reservation_does_not_refuse_a_finish(store: KeyStore) -> None:
    """It is no run."""
    claim = begin(store)
    store.finish(claim, KeyState.FAILED)
    store.reserve(a_claim(owner="task-2", fingerprint=""))

    assert store.finish(claim, KeyState.DONE, result=b"r") is None

    begun = store.begin(a_claim(owner="task-2"))
    assert (begun.owner, begun.result) == ("task-1", b"r")
    assert store.begin(a_claim(**OTHER)).verdict is Verdict.MISMATCH


def test_a_finish_that_is_said_again_is_its_owners(store: KeyStore) -> None:
    """A sender has reserved the key in between."""
    claim = begin(store)
    store.finish(claim, KeyState.FAILED)
    store.reserve(a_claim(owner="task-2"))

    store.finish(claim, KeyState.RETRYING, until_s=60.0)

    record = store.get(claim.key)
    assert record is not None
    assert (record.state, record.owner) == (KeyState.RETRYING, claim.owner)


def test_a_reservation_does_not_hide_who_has_begun(store: KeyStore) -> None:
    """A run whose key another has had since is refused, whatever was sent after."""
    stale = begin(store, lease_s=0.0)
    store.finish(begin(store, owner="task-2"), KeyState.FAILED)
    store.reserve(a_claim(owner="task-3"))

    assert store.finish(stale, KeyState.DONE) == "task-3"
    assert state_of(store, stale) is KeyState.QUEUED


def test_a_finish_after_somebody_elses_first_reservation(store: KeyStore) -> None:
    """The key was forgotten meanwhile: no other run has begun."""
    claim = begin(store)
    store.forget(claim.key, is_running_too=True)
    store.reserve(a_claim(owner="task-2"))

    assert store.finish(claim, KeyState.DONE, result=b"r") is None

    assert store.begin(a_claim(owner="task-2")).result == b"r"
    record = store.get(claim.key)
    assert record is not None
    assert (record.owner, record.epoch) == ("task-1", 1)


# --- renew ----------------------------------------------------------------------------


def test_a_lease_begins_anew(store: KeyStore) -> None:
    """Also one that has lapsed, where nobody took it."""
    lapsed = begin(store, key="a", lease_s=0.0)
    live = begin(store, key="b", lease_s=60.0)
    before = store.get(live.key)

    renewed = [a_claim("a", token=lapsed.token, lease_s=500.0), live]
    assert store.renew(renewed) == set()

    busy = store.begin(a_claim("a"))
    assert busy.verdict is Verdict.BUSY
    assert 400 < busy.remaining_s <= 500
    after = store.get(live.key)
    assert before is not None
    assert after is not None
    assert before.lease_until < after.lease_until < before.lease_until + 60
    assert after.expires_at - after.lease_until == pytest.approx(HOUR, abs=0.01)


def test_leases_that_are_lost_are_told(store: KeyStore) -> None:
    """Taken by another run, finished, forgotten, or only reserved; none changes."""
    taken = begin(store, key="a", lease_s=0.0)
    newer = begin(store, key="a", owner="task-2", lease_s=60.0)
    done, gone, kept = (begin(store, key=key) for key in "bcd")
    store.finish(done, KeyState.DONE)
    store.forget(gone.key, is_running_too=True)
    reserved = a_claim("e")
    store.reserve(reserved)
    claims = [taken, done, gone, kept, reserved]

    assert store.renew(claims) == {c.key for c in claims} - {kept.key}

    assert store.begin(a_claim("a")).remaining_s <= newer.lease_s
    assert state_of(store, done) is KeyState.DONE
    assert state_of(store, gone) is None


def test_nothing_and_much_may_be_renewed(store: KeyStore) -> None:
    """A process may run a thousand greenlets."""
    claims = [a_claim(key=uuid4().hex) for _ in range(1_200)]
    for claim in claims[:3]:
        store.begin(claim)

    assert store.renew([]) == set()
    assert store.renew(claims) == {claim.key for claim in claims[3:]}


# --- reserve and release --------------------------------------------------------------


def test_a_second_send_hears_of_the_first(store: KeyStore) -> None:
    """While that waits."""
    assert store.reserve(a_claim(owner="task-1")) is None

    assert store.reserve(a_claim(owner="task-2")) == "task-1"
    assert store.reserve(a_claim(owner="task-3", is_forced=True)) == "task-1"


def test_the_same_message_may_be_sent_again(store: KeyStore) -> None:
    """It does not stand in its own way, and its reservation begins anew."""
    store.reserve(a_claim(lease_s=0.0))
    store.reserve(a_claim(owner="task-1", lease_s=60.0))

    assert store.reserve(a_claim(owner="task-1", lease_s=HOUR)) is None

    record = store.get(a_claim().key)
    assert record is not None
    assert record.lease_until - record.begun_at == pytest.approx(HOUR, abs=1)


def test_a_reservation_has_its_own_short_life(store: KeyStore) -> None:
    """Then the next message is sent."""
    store.reserve(a_claim(lease_s=MOMENT))

    def reserved() -> bool:
        return store.reserve(a_claim(owner="task-2")) is None

    eventually(reserved, every_s=0.01)
    assert store.reserve(a_claim(owner="task-3")) == "task-2"


def test_a_reservation_blocks_no_run(store: KeyStore) -> None:
    """Whoever comes first; its arguments may be others."""
    store.reserve(a_claim(owner="task-1"))

    begun = store.begin(a_claim(**OTHER))

    assert begun == Begun(Verdict.RUN, epoch=1, found=KeyState.QUEUED)


def test_a_reservation_with_other_arguments_does_not_stand_in_the_way(
    store: KeyStore,
) -> None:
    """The first keeps it: its second send still hears of it."""
    store.reserve(a_claim(owner="task-1"))

    assert store.reserve(a_claim(**OTHER)) is None

    assert store.reserve(a_claim(owner="task-3")) == "task-1"


def test_a_retry_that_waits_stands_in_the_way(store: KeyStore) -> None:
    """Of others with its arguments; its own message may be sent, and stays a retry."""
    claim = begin(store)
    store.finish(claim, KeyState.RETRYING, until_s=60)

    assert store.reserve(a_claim(owner="task-2")) == "task-1"
    assert store.reserve(a_claim(**OTHER)) is None
    assert store.reserve(a_claim(owner="task-1")) is None

    assert state_of(store, claim) is KeyState.RETRYING


@pytest.mark.parametrize("lease_s", [HOUR, 0.0], ids=["live", "lapsed"])
def test_a_run_does_not_stand_in_the_way_of_a_send(
    store: KeyStore, lease_s: float
) -> None:
    """Its record stays: it must be seen that it was cut off."""
    claim = begin(store, lease_s=lease_s)

    assert store.reserve(a_claim(owner="task-2")) is None

    assert state_of(store, claim) is KeyState.RUNNING


@pytest.mark.parametrize("state", [KeyState.DONE, KeyState.INTERRUPTED], ids=str)
def test_what_must_be_known_is_not_overwritten_by_a_send(
    store: KeyStore, state: KeyState
) -> None:
    """The message is sent, and its run hears of it."""
    claim = begin(store)
    store.finish(claim, state, result=b"r")

    assert store.reserve(a_claim(owner="task-2")) is None
    assert store.reserve(a_claim(owner="task-3")) is None

    assert store.begin(a_claim(owner="task-2")).found is state


@pytest.mark.parametrize("state", [KeyState.FAILED, KeyState.RETRYING], ids=str)
def test_a_key_that_may_run_again_may_be_reserved(
    store: KeyStore, state: KeyState
) -> None:
    """Its epoch goes on, also where the reservation is undone or lapses."""
    store.finish(begin(store), state)
    assert store.reserve(a_claim(owner="task-2")) is None
    assert store.reserve(a_claim(owner="task-3")) == "task-2"

    store.release(a_claim().key, "task-2")
    assert state_of(store, a_claim()) is KeyState.FAILED
    assert store.reserve(a_claim(owner="task-4", lease_s=0.0)) is None

    assert store.begin(a_claim(owner="task-5")) == Begun(
        Verdict.RUN, epoch=2, found=KeyState.QUEUED
    )


def test_a_send_with_other_arguments_does_not_hide_a_failure(store: KeyStore) -> None:
    """Its run is told of the mismatch."""
    store.finish(begin(store), KeyState.FAILED)

    assert store.reserve(a_claim(**OTHER)) is None

    assert store.begin(a_claim(**OTHER)).verdict is Verdict.MISMATCH


def test_a_released_reservation_is_gone(store: KeyStore) -> None:
    """Only by its own message."""
    store.reserve(a_claim(owner="task-1"))

    store.release(a_claim().key, "task-2")
    assert store.reserve(a_claim(owner="task-2")) == "task-1"
    store.release(a_claim().key, "task-1")

    assert store.get(a_claim().key) is None
    assert store.reserve(a_claim(owner="task-2")) is None


def test_a_retry_that_will_not_come_leaves_its_key_at_once(store: KeyStore) -> None:
    """Its message was revoked, or has expired; another's leaves it alone."""
    claim = begin(store)
    store.finish(claim, KeyState.RETRYING, until_s=60.0)

    store.release(claim.key, "task-2")
    assert state_of(store, claim) is KeyState.RETRYING
    store.release(claim.key, claim.owner)

    assert state_of(store, claim) is KeyState.FAILED
    assert store.begin(a_claim(owner="task-2", token="b")).verdict is Verdict.RUN


def test_a_run_keeps_its_key(store: KeyStore) -> None:
    """Its message was revoked too late."""
    claim = begin(store)

    store.release(claim.key, claim.owner)
    store.release("0" * 64, claim.owner)

    assert state_of(store, claim) is KeyState.RUNNING


# --- for those who look after keys ----------------------------------------------------


def test_a_record_is_as_its_last_claim(store: KeyStore) -> None:
    """With the size of what is remembered, and not that."""
    begin(store, lease_s=0.0)
    claim = begin(store, owner="task-2", holder="host:boot:2", name="charge:7")
    started = store.get(claim.key)
    store.finish(claim, KeyState.DONE, result=b"12345")

    record = store.get(claim.key)

    assert started is not None
    assert record is not None
    assert started.result_bytes == 0
    assert (record.key, record.name, record.task) == (
        *(claim.key, "charge:7", "shop.charge"),
    )
    assert (record.state, record.owner, record.holder) == (
        *(KeyState.DONE, "task-2", "host:boot:2"),
    )
    assert (record.epoch, record.result_bytes) == (2, 5)
    assert record.begun_at == started.begun_at
    assert abs(record.begun_at - time.time()) < 60
    assert store.get("0" * 64) is None


def test_keys_are_listed(store: KeyStore) -> None:
    """By state, by the task's name and by their own; expired ones are not."""
    done = begin(store, key="a", task="shop.charge", name="one")
    store.finish(done, KeyState.DONE)
    begin(store, key="b", task="shop.mail", name="two")
    begin(store, key="c", task="SHOP.mail", name="two")
    store.finish(begin(store, key="d", keep_s=0.0), KeyState.DONE)

    def listed(**wanted: Any) -> str:
        return "".join(sorted(record.key[0] for record in store.list(**wanted)))

    assert listed() == "abc"
    assert listed(state=KeyState.RUNNING) == "bc"
    assert listed(task="shop.*") == "ab"
    assert listed(task="shop.m?il") == "b"
    assert listed(task="SHOP.[mn]ail") == "c"
    assert listed(name="two") == "bc"
    assert listed(name="two", task="shop.*", state=KeyState.RUNNING) == "b"
    assert listed(state=KeyState.FAILED) == listed(name="t") == ""


def test_many_keys_are_listed_each_once(store: KeyStore) -> None:
    """In pieces that one answer can hold."""
    claims = [a_claim(key=f"{number:064x}") for number in range(1_203)]
    for claim in claims:
        store.begin(claim)

    found = [record.key for record in store.list()]

    assert sorted(found) == sorted(claim.key for claim in claims)


def test_a_key_is_forgotten(store: KeyStore) -> None:
    """So that its effect may happen again."""
    claim = begin(store)
    store.finish(claim, KeyState.DONE)

    assert store.forget(claim.key)

    assert not store.forget(claim.key)
    assert store.begin(a_claim()).found is None


def test_a_running_key_is_forgotten_only_if_that_is_meant(store: KeyStore) -> None:
    """One whose lease has lapsed is not running."""
    live, lapsed = begin(store, key="a"), begin(store, key="b", lease_s=0.0)

    assert not store.forget(live.key)
    assert state_of(store, live) is KeyState.RUNNING
    assert store.forget(lapsed.key)
    assert store.forget(live.key, is_running_too=True)
    assert store.get(live.key) is None


def test_expired_keys_are_purged_and_no_others(store: KeyStore) -> None:
    """At most so many; Redis has none. One that has expired was not there anyway."""
    for number in range(7):
        claim = begin(store, key=f"{number:064x}", keep_s=0.0)
        store.finish(claim, KeyState.DONE)
    kept = begin(store)
    store.finish(kept, KeyState.DONE)

    purged = [store.purge(3) for _ in range(4)]

    assert purged in ([3, 3, 1, 0], [0, 0, 0, 0])
    assert state_of(store, kept) is KeyState.DONE
    assert not store.forget(f"{0:064x}")


def test_two_namespaces_do_not_see_each_other(make_store: MakeStore) -> None:
    """Two apps share a server, and a namespace may look like a pattern."""
    stem = fresh_name("shop")
    mine, other = make_store(f"{stem}[*]?"), make_store(f"{stem}*")
    claims = [begin(store, owner=owner) for store, owner in ((mine, "m"), (other, "o"))]

    assert [r.owner for r in mine.list()] == ["m"]
    assert [r.owner for r in other.list()] == ["o"]
    assert mine.finish(claims[0], KeyState.DONE) is None
    assert mine.renew([claims[1]]) == {claims[1].key}
    mine.release(claims[1].key, "o")
    assert mine.forget(claims[0].key)
    assert mine.purge(10) == 0

    assert state_of(other, claims[1]) is KeyState.RUNNING


def test_any_text_is_taken(store: KeyStore) -> None:
    """A key is made of arguments, and a column has a limit."""
    text = HOSTILE_TEXT + "x" * 400
    claim = begin(store, name=text, task=text, owner=text, holder=text)

    assert store.begin(a_claim(owner=text, name=text)).verdict is Verdict.BUSY
    (record,) = store.list(name=text)
    assert len(record.name) == len(record.task) == 255
    assert store.finish(claim, KeyState.RETRYING, until_s=60) is None
    assert store.begin(a_claim(owner=text)).verdict is Verdict.RUN
    assert store.reserve(a_claim("b", owner=text)) is None
    assert store.reserve(a_claim("b", owner=text)) is None
    store.release(a_claim("b").key, text)
    assert store.get(a_claim("b").key) is None


# --- races ----------------------------------------------------------------------------

RACERS = 16
ROUNDS = 100


def race(make_store: MakeStore, namespace: str) -> Iterator[list[tuple[str, int]]]:
    """What each of the racers heard, for each round's key."""
    start = fork.Barrier(RACERS)

    def run(number: int, answers: Any) -> None:
        store = make_store(namespace)
        heard = []
        for turn in range(ROUNDS):
            claim = a_claim(key=f"{turn:064x}", owner=f"task-{number}")
            start.wait()
            begun = store.begin(claim)
            heard.append((str(begun.verdict), begun.epoch))
        answers.send(heard)

    pipes = [fork.Pipe(duplex=False) for _ in range(RACERS)]
    racers = [
        fork.Process(target=run, args=(number, writer))
        for number, (_, writer) in enumerate(pipes)
    ]
    for racer in racers:
        racer.start()
    for _, writer in pipes:
        writer.close()
    heard = [reader.recv() for reader, _ in pipes]
    for racer in racers:
        racer.join()
    for reader, _ in pipes:
        reader.close()
    yield from map(list, zip(*heard, strict=True))


@pytest.mark.parametrize("epoch", [1, 2], ids=["unknown", "lapsed"])
def test_of_many_racers_one_has_the_key(make_store: MakeStore, epoch: int) -> None:
    """In every round, and every other one hears that it is busy."""
    namespace = fresh_name("shop")
    store = make_store(namespace)
    if epoch == 2:
        for turn in range(ROUNDS):
            begin(store, key=f"{turn:064x}", lease_s=0.0)

    for answers in race(make_store, namespace):
        assert sorted(answers) == [("busy", 0)] * (RACERS - 1) + [("run", epoch)]


WRONG_CLOCKS = [
    pytest.param(off_s, id=name)
    for name, off_s in (("fast", HOUR), ("slow", -HOUR), ("years", 1e9))
]


@pytest.mark.parametrize("off_s", WRONG_CLOCKS)
@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_worker_whose_clock_is_wrong_does_no_harm(
    request: Any, kind: str, off_s: float
) -> None:
    """Neither does it take what another has, nor hold or forget what it has itself."""
    database = SqlDatabase(request.getfixturevalue(f"{kind}_url")())
    right = SqlKeyStore(database, "shop")
    wrong = SqlKeyStore(database, "shop", clock=lambda: time.time() + off_s)

    for one, other in ((right, wrong), (wrong, right)):
        key = fresh_name()
        held = begin(one, key=key, lease_s=60.0, keep_s=60.0)
        assert other.begin(a_claim(key, owner="task-2")).verdict is Verdict.BUSY
        assert one.renew([held]) == set()
        assert other.begin(a_claim(key, owner="task-2")).verdict is Verdict.BUSY
        assert one.finish(held, KeyState.DONE, result=b"r") is None
        assert other.begin(a_claim(key, owner="task-2")).verdict is Verdict.DONE
        assert one.begin(a_claim(key, owner="task-3")).verdict is Verdict.DONE
        short = begin(one, key=fresh_name(), lease_s=MOMENT)
        begin_when_free(other, short._replace(owner="task-2", token="other"))
        waiting = a_claim(fresh_name(), owner="task-4", lease_s=60.0)
        assert one.reserve(waiting) is None
        assert other.reserve(waiting._replace(owner="task-5")) == "task-4"

    database.close()


def test_sqlite_goes_by_the_clock_of_its_host(tmp_path: Path) -> None:
    """There is one of it; and the test above would see a clock that is used."""
    database = SqlDatabase(f"sqlite:///{tmp_path}/keys.sqlite3")
    fast = SqlKeyStore(database, "shop", clock=lambda: time.time() + HOUR)
    begin(SqlKeyStore(database, "shop"), lease_s=60.0)

    assert fast.begin(a_claim(owner="task-2")).verdict is Verdict.RUN

    database.close()


def test_no_other_part_of_keys_reads_a_wall_clock() -> None:
    """Two workers' clocks may be an hour apart: Redis keeps the time, too."""
    found = {
        (path.name, f"{call.value.id}.{call.attr}")
        for path in Path(idempotency.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Attribute)
        and isinstance(call.value, ast.Name)
        and call.attr in ("time", "time_ns", "now", "utcnow", "today")
        and call.value.id in ("time", "datetime", "date")
    }

    # A retry's eta is a moment of this host's.
    assert found == {("sql_store.py", "time.time"), ("task.py", "datetime.now")}


@pytest.mark.parametrize(
    ("kind", "pause"), [("postgresql", "pg_sleep"), ("mariadb", "sleep")]
)
def test_time_stands_still_in_a_statement(request: Any, kind: str, pause: str) -> None:
    """Else a lease may lapse between two columns of one row."""
    database = SqlDatabase(request.getfixturevalue(f"{kind}_url")())
    now = database.dialect.statement_now()
    waited = sql_case((func.length(cast(getattr(func, pause)(0.02), Text)) >= 0, now))
    query = select(now.label("before"), waited.label("after"))

    ((before, after),) = database.statements.run_once(query).rows

    database.close()
    assert before == after


@pytest.mark.parametrize(
    ("kind", "who"), [("postgresql", "pg_backend_pid"), ("mariadb", "connection_id")]
)
def test_a_child_has_a_connection_of_its_own(request: Any, kind: str, who: str) -> None:
    """One that was forked never answers on its parent's; each keeps its own."""
    database = SqlDatabase(request.getfixturevalue(f"{kind}_url")())
    query = select(getattr(func, who)())
    reader, writer = fork.Pipe(duplex=False)

    def ask() -> list[Any]:
        return [database.statements.run_once(query).rows[0][0] for _ in range(2)]

    before = ask()
    child = fork.Process(target=lambda: writer.send(ask()))
    child.start()
    child.join()
    inside = reader.recv()
    after = ask()
    reader.close()
    writer.close()
    database.close()

    assert len({*before, *after}) == 1
    assert len({*inside}) == 1
    assert not {*inside} & {*before}


# --- the server -----------------------------------------------------------------------

SERVERS = ("redis", "postgresql", "mariadb")


@pytest.fixture(params=SERVERS)
def proxied(request: Any, servers: Any) -> Iterator[tuple[KeyStore, Proxy]]:
    """A store whose connections may be cut."""
    server = servers(request.param)
    with proxy_to(server) as proxy:
        backend = Backend(url_through(proxy, server.url))
        yield backend.keys(fresh_name("proxied")), proxy
        backend.close()


def test_a_run_costs_two_round_trips(proxied: tuple[KeyStore, Proxy]) -> None:
    """One to begin, one to finish; a duplicate costs one, a heartbeat one."""
    store, proxy = proxied

    def turns(ask: Callable[[], object]) -> int:
        before = proxy.turns
        ask()
        return proxy.turns - before

    # PostgreSQL's driver prepares what it has said five times.
    for number in range(10):
        store.finish(begin(store, key=f"{number:064x}"), KeyState.DONE)
        store.begin(a_claim(key=f"{number:064x}"))
    claim = a_claim()

    assert turns(lambda: store.begin(claim)) == 1
    assert turns(lambda: store.renew([claim])) == 1
    assert turns(lambda: store.finish(claim, KeyState.DONE)) == 1
    assert turns(lambda: store.begin(a_claim(owner="task-2"))) == 1


def test_a_connection_that_died_while_it_was_idle_is_replaced(
    proxied: tuple[KeyStore, Proxy],
) -> None:
    """The task hears nothing of it."""
    store, proxy = proxied
    claim = begin(store)

    proxy.cut()
    assert store.finish(claim, KeyState.DONE) is None
    proxy.cut()

    assert store.begin(a_claim()).verdict is Verdict.DONE


def test_a_claim_whose_answer_was_lost_can_be_made_again(
    proxied: tuple[KeyStore, Proxy],
) -> None:
    """The store may do so by itself; the key was taken once."""
    store, proxy = proxied
    begin(store, key="b")
    claim = a_claim()
    proxy.cut_answer_to(claim.token.encode())

    try:
        begun = store.begin(claim)
    except StoreUnavailable:
        begun = store.begin(claim)

    assert proxy.has_cut_answer
    assert begun == Begun(Verdict.RUN, epoch=1)


def test_a_store_that_is_away_says_so(backend_that_is_away: Backend) -> None:
    """Every method: nothing is known then."""
    store = backend_that_is_away.keys("shop")
    claim = a_claim()

    for call in (
        lambda: store.begin(claim),
        lambda: store.finish(claim, KeyState.DONE),
        lambda: store.renew([claim]),
        lambda: store.reserve(claim),
        lambda: store.release(claim.key, claim.owner),
        lambda: store.get(claim.key),
        lambda: list(store.list()),
        lambda: store.forget(claim.key),
    ):
        with pytest.raises(StoreUnavailable):
            call()


@contextlib.contextmanager
def frozen(server: Service) -> Iterator[None]:
    """A server that keeps its connections and answers nothing, until the end."""
    threads = threading.active_count()
    parents = [psutil.Process(process.pid) for process in server.processes]
    # PostgreSQL's are in sessions of their own.
    children = [child for parent in parents for child in parent.children()]
    server.freeze()
    for child in children:
        child.suspend()
    try:
        yield
    finally:
        for child in children:
            child.resume()
        server.thaw()
        # What was given up may be answered now.
        eventually(lambda: threading.active_count() == threads, what="late answers")


@pytest.mark.parametrize("kind", SERVERS)
def test_a_store_that_hangs_says_so_in_time(
    own_server: Callable[[str], Service], kind: str
) -> None:
    """With its connections open; when it answers again, all is well."""
    server = own_server(kind)
    backend = Backend(server.url)
    store = backend.keys("shop")
    claim = begin(store)

    started = time.monotonic()
    with frozen(server), pytest.raises(StoreUnavailable):
        store.finish(claim, KeyState.DONE)

    assert time.monotonic() - started < 9
    assert store.finish(claim, KeyState.DONE) is None
    backend.close()


def test_a_database_that_hangs_at_first_use_says_so_in_time(
    own_server: Callable[[str], Service],
) -> None:
    """Before anything is known of its tables."""
    server = own_server("mariadb")
    backend = Backend(server.url)

    started = time.monotonic()
    with frozen(server), pytest.raises(StoreUnavailable):
        backend.keys("shop").begin(a_claim())

    assert time.monotonic() - started < 20
    backend.close()


def test_keys_may_be_in_a_cluster(own_server: Callable[[str], Service]) -> None:
    """Each script uses one slot, and a list asks whoever has it."""
    backend = Backend(own_server("redis-cluster").url)
    store = backend.keys("shop")
    claim = begin(store)

    assert store.begin(a_claim()).verdict is Verdict.BUSY
    assert store.renew([claim]) == set()
    assert store.finish(claim, KeyState.DONE, result=b"r") is None
    assert store.reserve(a_claim("b")) is None
    store.release(a_claim("b").key, claim.owner)
    assert [record.key for record in store.list()] == [claim.key]
    assert store.forget(claim.key)
    backend.close()
