"""The leases of a process are renewed, and only what is lost is given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from polling import eventually

from celery_resilience.events import observe
from celery_resilience.idempotency.heartbeat import Heartbeat
from celery_resilience.idempotency.record import Claim


@dataclass
class Store:
    """Renews what is in it."""

    tokens: set[str]
    renewed: list[set[str]] = field(default_factory=list)

    def renew(self, claims: Sequence[Claim]) -> set[str]:
        """The keys of those that are not in it are lost."""
        self.renewed.append({claim.token for claim in claims})
        return {claim.key for claim in claims if claim.token not in self.tokens}

    def purge(self, limit: int) -> int:
        """Nothing."""
        return 0


@pytest.fixture
def lost() -> Iterator[list[str]]:
    """The tokens of runs that were told that they have lost their key."""
    tokens: list[str] = []

    def heard(*, claim: Claim) -> None:
        tokens.append(claim.token)

    stop: Callable[[], None] = observe("idempotency.lease_lost", heard)
    yield tokens
    stop()


def test_of_two_runs_with_one_key_the_later_keeps_it(lost: list[str]) -> None:
    """A process stood still, and has taken its own run's key over."""
    store = Store({"new"})
    heartbeat = Heartbeat(lambda: store)  # type: ignore[arg-type, return-value]
    old, new = (
        Claim("k" * 64, "k", "shop.charge", token, token, lease_s=0.06)
        for token in ("old", "new")
    )
    heartbeat.add(old)
    heartbeat.add(new)

    eventually(lambda: {"new"} in store.renewed)

    assert lost == ["old"]
    store.tokens.clear()
    eventually(lambda: lost == ["old", "new"])
