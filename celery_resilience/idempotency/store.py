"""Where keys are remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from celery_resilience.idempotency.record import Begun, Claim, KeyRecord, KeyState


class KeyStore(Protocol):
    """
    Keys of one app. Every time that is compared is the store's own.

    Every method may raise StoreUnavailable: the store did not answer within seconds,
    and nothing is known of what it did.
    """

    def begin(self, claim: Claim) -> Begun:
        """
        Take a key for one run, in one round trip.

        A key is free when it is unknown, expired, QUEUED, FAILED or INTERRUPTED; when
        its lease has lapsed; when it is RETRYING and *claim* has its owner; and when it
        is RUNNING and *claim* names its holder as dead and has its owner. A live lease
        is busy for everybody else, its own owner included: that is a redelivery.
        A DONE key is free to a forced claim only.

        Arguments are compared in every state but QUEUED, except for a forced claim, and
        for the owner's own retry, whose arguments may be others.

        The same claim again, whose answer was lost, gets the same answer while it runs.
        """
        ...

    def finish(
        self,
        claim: Claim,
        state: KeyState,
        *,
        result: bytes | None = None,
        until_s: float = 0.0,
    ) -> str | None:
        """
        Say what the run of *claim* came to, in one round trip.

        Nothing changes where another run has begun since. A key that is not there any
        more is written anew: nobody else has it. Saying it again is allowed, with
        another state too.

        Args:
            state: DONE, FAILED, INTERRUPTED, or RETRYING.
            result: DONE: what a duplicate is given.
            until_s: RETRYING: seconds for which the key waits for its owner.

        Returns:
            None; or the task id that has the key now.
        """
        ...

    def renew(self, claims: Sequence[Claim]) -> set[str]:
        """
        Begin the leases of running keys anew, in one command.

        Returns:
            The keys that other runs have taken, or that are not running.
        """
        ...

    def reserve(self, claim: Claim) -> str | None:
        """
        Reserve a key for a message that is about to be sent, for `lease_s` seconds.

        Only what waits stands in the way: a live reservation, or a task that will be
        retried, with the same arguments.

        Returns:
            None: send it. Else the task id that waits already.
        """
        ...

    def release(self, key: str, owner: str) -> None:
        """
        The message *owner*, for which *key* waits, will not run.

        Another may be sent, and begin; a run keeps its key.
        """
        ...

    def weaknesses(self) -> Sequence[str]:
        """How this store may forget keys before their time, a sentence each."""
        ...

    # --- for those who look after keys ---------------------------------------------

    def get(self, key: str) -> KeyRecord | None:
        """What is known of a key."""
        ...

    def list(
        self, *, state: KeyState | None = None, task: str = "*", name: str = ""
    ) -> Iterator[KeyRecord]:
        """
        The keys that are remembered, in any order.

        Args:
            state: Only those.
            task: Only those of tasks whose name is like this glob.
            name: Only those whose name is this.
        """
        ...

    def forget(self, key: str, *, is_running_too: bool = False) -> bool:
        """
        Forget a key, so that its effect may happen again.

        Args:
            is_running_too: Also one whose lease is live.

        Returns:
            Whether it was there, and is forgotten.
        """
        ...

    def purge(self, limit: int) -> int:
        """Delete at most *limit* expired keys, where the store does not by itself."""
        ...
