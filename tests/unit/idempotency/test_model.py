"""Whatever is asked of a store, in any order: it answers as the model does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from unit.conftest import Backend
from unit.specimens import fresh_name

from celery_resilience.idempotency.record import (
    WAITING,
    Begun,
    Claim,
    KeyState,
    Verdict,
)
from celery_resilience.idempotency.store import KeyStore

KEY = "a" * 64

#: A time that has not passed at the end of a test, and one that has at once.
LONG, OVER = 3_600.0, 0.0

times = st.sampled_from([LONG, LONG, OVER])
owners = st.sampled_from(["task-1", "task-2"])
fingerprints = st.sampled_from(["e" * 32, "f" * 32, ""])
holders = st.sampled_from(["host:boot:1", "host:boot:2"])


@dataclass(frozen=True)
class Known:
    """
    What is known of the key.

    Attributes:
        token: Of the last run; None where there was none.
        is_live: Its lease has not lapsed.
        is_kept: It is remembered when it has.
        found: What the last run found.
    """

    state: KeyState
    owner: str
    fingerprint: str
    is_live: bool
    is_kept: bool
    holder: str = ""
    token: str | None = None
    found: KeyState | None = None
    result: bytes | None = None

    @property
    def is_there(self) -> bool:
        """It has not expired."""
        return self.is_live or self.is_kept

    def is_like(self, claim: Claim) -> bool:
        """Whether its arguments are those of *claim*."""
        both = {self.fingerprint, claim.fingerprint} - {""}
        return len(both) < 2


class Keys(RuleBasedStateMachine):
    """One key, in a store and in a model. No time passes: leases are long, or over."""

    store: KeyStore

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.known: Known | None = None
        self.epoch = 0
        self.asked: list[Claim] = []

    def now_known(self, known: Known | None) -> None:
        """What is known from now on."""
        self.known = known if known is not None and known.is_there else None
        if self.known is None:
            self.epoch = 0  # at least that, where the store knows better

    @rule(
        target=claims,
        owner=owners,
        fingerprint=fingerprints,
        holder=holders,
        lease_s=times,
        keep_s=times,
        dead_holder=st.none() | holders,
        is_forced=st.booleans(),
    )
    def begin(self, **facts: Any) -> Claim:
        """A run, a redelivery, a retry, a duplicate, a replay."""
        claim = Claim(
            key=KEY, name="charge:7", task="shop.charge", token=uuid4().hex, **facts
        )
        self.asked.append(claim)
        self.ask(claim)
        return claim

    @rule(claim=claims)
    def begin_again(self, claim: Claim) -> None:
        """The answer was lost, or the question comes late."""
        self.ask(claim)

    def ask(self, claim: Claim) -> None:
        """Begin, in both."""
        begun = self.store.begin(claim)
        known = self.known
        if known is not None and self.is_its_own(known, claim):
            assert begun == Begun(Verdict.RUN, epoch=begun.epoch, found=known.found)
            assert begun.epoch == self.epoch
            return
        verdict = self.verdict(known, claim)
        assert begun.verdict is verdict
        assert begun.found is (None if known is None else known.state)
        if verdict is Verdict.RUN:
            if known is None or known.token is None:
                assert begun.epoch >= 1
            else:
                assert begun.epoch == self.epoch + 1
            self.epoch = begun.epoch
            self.now_known(
                Known(
                    KeyState.RUNNING,
                    owner=claim.owner,
                    fingerprint=claim.fingerprint,
                    is_live=claim.lease_s > 0,
                    is_kept=claim.keep_s > 0,
                    holder=claim.holder,
                    token=claim.token,
                    found=None if known is None else known.state,
                )
            )
        elif verdict is not Verdict.MISMATCH:
            assert known is not None
            assert begun.owner == known.owner
            assert begun.result == known.result
            assert (begun.remaining_s > 0) == (verdict is Verdict.BUSY)

    @staticmethod
    def is_its_own(known: Known, claim: Claim) -> bool:
        """A live run's own claim."""
        is_dead = claim.dead_holder == known.holder
        return (
            known.state is KeyState.RUNNING
            and known.is_live
            and known.token == claim.token
            and not is_dead
        )

    @staticmethod
    def verdict(known: Known | None, claim: Claim) -> Verdict:
        """`KeyStore.begin`'s docstring once more."""
        if known is None or known.state is KeyState.QUEUED:
            return Verdict.RUN
        is_mine = known.owner == claim.owner
        if known.state is KeyState.RETRYING and is_mine:
            return Verdict.RUN
        if not (claim.is_forced or known.is_like(claim)):
            return Verdict.MISMATCH
        match known.state:
            case KeyState.DONE:
                return Verdict.RUN if claim.is_forced else Verdict.DONE
            case KeyState.RUNNING:
                is_dead = is_mine and known.holder == claim.dead_holder
                is_busy = known.is_live and not is_dead
            case KeyState.RETRYING:
                is_busy = known.is_live
            case _:
                is_busy = False
        return Verdict.BUSY if is_busy else Verdict.RUN

    @rule(
        claim=claims,
        state=st.sampled_from(
            [KeyState.DONE, KeyState.FAILED, KeyState.INTERRUPTED, KeyState.RETRYING]
        ),
        result=st.sampled_from([None, b"", b"r"]),
        until_s=times,
    )
    def finish(
        self, claim: Claim, state: KeyState, result: bytes | None, until_s: float
    ) -> None:
        """In time, late, or twice."""
        has_key = self.store.finish(claim, state, result=result, until_s=until_s)
        known = self.known
        if known is not None and known.token not in (None, claim.token):
            assert has_key == known.owner
            return
        assert has_key is None
        record = self.store.get(KEY)
        if known is None or known.token is None:
            self.epoch = 1 if record is None else max(1, record.epoch)
        is_retrying = state is KeyState.RETRYING
        is_new = known is None or known.token is None
        self.now_known(
            Known(
                state,
                owner=claim.owner,
                fingerprint=claim.fingerprint,
                is_live=is_retrying and until_s > 0,
                is_kept=claim.keep_s > 0,
                holder=claim.holder,
                token=claim.token,
                found=None if known is None or is_new else known.found,
                result=result if state is KeyState.DONE else None,
            )
        )

    @rule()
    def renew(self) -> None:
        """The heartbeat of a process that believes in every claim of its own."""
        lost = self.store.renew(self.asked)
        known = self.known
        running = [
            claim
            for claim in self.asked
            if known is not None
            and known.state is KeyState.RUNNING
            and known.token == claim.token
        ]
        assert lost == ({KEY} if len(running) < len(self.asked) else set())
        for claim in running:
            assert known is not None
            self.now_known(
                replace(known, is_live=claim.lease_s > 0, is_kept=claim.keep_s > 0)
            )

    @rule(owner=owners, fingerprint=fingerprints, lease_s=times)
    def reserve(self, owner: str, fingerprint: str, lease_s: float) -> None:
        """A send."""
        claim = Claim(
            key=KEY,
            name="charge:7",
            task="shop.charge",
            owner=owner,
            token=uuid4().hex,
            fingerprint=fingerprint,
            lease_s=lease_s,
        )
        waits = self.store.reserve(claim)
        known = self.known
        if known is None:
            assert waits is None
            self.now_known(
                Known(
                    KeyState.QUEUED,
                    owner=owner,
                    fingerprint=fingerprint,
                    is_live=lease_s > 0,
                    is_kept=False,
                )
            )
            return
        is_same = known.is_like(claim)
        is_waiting = known.is_live and known.state in (
            *(KeyState.QUEUED, KeyState.RETRYING),
        )
        is_in_the_way = is_waiting and is_same and known.owner != owner
        assert waits == (known.owner if is_in_the_way else None)
        if (
            (known.state is KeyState.QUEUED and known.owner == owner)
            or (known.state is KeyState.QUEUED and not known.is_live)
            or (known.state is KeyState.RETRYING and not known.is_live and is_same)
            or (known.state is KeyState.FAILED and is_same)
        ):
            self.now_known(
                replace(
                    known,
                    state=KeyState.QUEUED,
                    owner=owner,
                    holder="",
                    fingerprint=fingerprint,
                    is_live=lease_s > 0,
                    # It outlives its lease if what was there before does.
                    is_kept=known.is_kept or known.is_live,
                )
            )

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        """A message was revoked."""
        self.store.release(KEY, owner)
        known = self.known
        if known is None or known.state not in WAITING or known.owner != owner:
            return
        if known.token is None:
            self.now_known(None)
        else:
            self.now_known(replace(known, state=KeyState.FAILED))

    @rule(is_running_too=st.booleans())
    def forget(self, is_running_too: bool) -> None:
        """An administrator."""
        known = self.known
        is_running = (
            known is not None and known.state is KeyState.RUNNING and known.is_live
        )
        is_forgotten = known is not None and (is_running_too or not is_running)

        assert self.store.forget(KEY, is_running_too=is_running_too) is is_forgotten

        if is_forgotten:
            self.now_known(None)

    @invariant()
    def is_as_known(self) -> None:
        """The store's record says what the model does."""
        record, known = self.store.get(KEY), self.known
        assert [r.state for r in self.store.list()] == (
            [] if known is None else [known.state]
        )
        if known is None:
            assert record is None
            return
        assert record is not None
        assert (record.state, record.owner) == (known.state, known.owner)
        assert record.result_bytes == len(known.result or b"")
        if known.token is not None:
            assert record.epoch == self.epoch


def test_a_store_answers_as_the_model_does(backend: Backend) -> None:
    """Never two runs with one key, no stale finish, no second run unless forced."""

    class Here(Keys):
        def __init__(self) -> None:
            super().__init__()
            self.store = backend.keys(fresh_name("model"))

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
