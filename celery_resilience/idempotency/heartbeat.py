"""One thread in each process looks after its keys: renews leases, forgets expired ones."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from threading import Condition, Thread

from celery_resilience.chance import between
from celery_resilience.errors import ResilienceError
from celery_resilience.events import emit
from celery_resilience.forks import thread_gate
from celery_resilience.idempotency.record import Claim
from celery_resilience.idempotency.store import KeyStore
from celery_resilience.threads import start_deaf

logger = logging.getLogger("celery_resilience.idempotency")

#: Leases are renewed so often within the shortest of them.
PER_LEASE = 3

#: Seconds between two purges of a process, about; how many keys one statement of it
#: deletes, and how many statements it has.
PURGE_EVERY_S = 60.0
PURGE_LIMIT = 1_000
PURGES = 10


class Heartbeat:
    """
    Renews leases, all of a process in one command a third of a lease.

    It also deletes expired keys, in bounded batches, where the store does not.

    Started with the first key of a process. A forked child begins anew: it has none
    of its parent's runs, and no thread.

    Args:
        store: The store of this process, called at each use.
    """

    def __init__(self, store: Callable[[], KeyStore | None]) -> None:
        self._store = store
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._claims: dict[str, Claim] = {}
        self._changed = Condition()
        self._thread: Thread | None = None
        self._interval_s = float("inf")
        self._purge_at = time.monotonic() + between(0.5, 1.0) * PURGE_EVERY_S

    def add(self, claim: Claim) -> None:
        """Renew the lease of *claim* until it is removed."""
        if self._pid != os.getpid():
            self._begin_anew()
        with self._changed:
            self._claims[claim.token] = claim
            if claim.lease_s < self._interval_s * PER_LEASE:
                self._interval_s = claim.lease_s / PER_LEASE
                self._changed.notify()
            if self._thread is None:
                self._thread = start_deaf(self._run, "keys")

    def remove(self, claim: Claim) -> None:
        """Let the lease of *claim* lapse."""
        with self._changed:
            self._claims.pop(claim.token, None)

    def _run(self) -> None:
        """
        Renew at a steady pace, that of the shortest lease that this process has had.

        So no run wakes this thread, and none waits longer than a third of its lease.
        """
        changed = self._changed
        while self._changed is changed:
            with changed:
                due_at = time.monotonic() + self._interval_s
                while (left_s := due_at - time.monotonic()) > 0:
                    changed.wait(left_s)
                    due_at = min(due_at, time.monotonic() + self._interval_s)
                claims = list(self._claims.values())
            for work in (self._renew, self._purge):
                try:
                    with thread_gate.inside():
                        work(claims)
                except ResilienceError as exc:
                    logger.warning("keys are not looked after: %s", exc)
                except Exception:
                    # Of a driver: the thread must go on for the runs that come.
                    logger.exception("keys are not looked after")

    def _renew(self, claims: list[Claim]) -> None:
        store = self._store()
        if store is None or not claims:
            return
        lost = store.renew(claims)
        for claim in claims:
            # Of two runs here with one key, the older has lost it.
            if claim.key in lost:
                lost.discard(claim.key)
                if self._claims.pop(claim.token, None) is not None:
                    lease_lost(claim)

    def _purge(self, _: list[Claim]) -> None:
        store = self._store()
        if store is None or time.monotonic() < self._purge_at:
            return
        self._purge_at = time.monotonic() + between(0.5, 1.0) * PURGE_EVERY_S
        for _batch in range(PURGES):
            if store.purge(PURGE_LIMIT) < PURGE_LIMIT:
                return


def lease_lost(claim: Claim) -> None:
    """Tell that another run has the key of a run that still goes on, or has ended."""
    logger.warning(
        "%s[%s] has lost the key %r: its lease had lapsed, and another run has it",
        claim.task,
        claim.owner,
        claim.name,
    )
    emit("idempotency.lease_lost", claim=claim)
