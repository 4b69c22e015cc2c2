"""A thread beside a child's tasks takes none of its signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from polling import eventually

from celery_resilience.deadline import answer_within
from celery_resilience.idempotency.heartbeat import Heartbeat
from celery_resilience.idempotency.record import Claim
from celery_resilience.threads import start_at_once, start_deaf


def blocked() -> set[int]:
    """The signals that this thread does not take."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def of_a_thread() -> set[int]:
    """What a thread made by `start_deaf` does not take."""
    found: list[set[int]] = []
    start_deaf(lambda: found.append(blocked()), "deaf").join()
    return found[0]


def of_an_answer() -> set[int]:
    """What the thread that waits for a store does not take."""
    return answer_within(10, blocked)


def of_the_heartbeat() -> set[int]:
    """What the thread that renews leases does not take."""
    found: list[set[int]] = []

    def store() -> None:
        found.append(blocked())

    heartbeat = Heartbeat(store)
    claim = Claim(
        key="k", name="n", task="t", owner="o", token="x", holder="", lease_s=0.05
    )
    heartbeat.add(claim)
    eventually(lambda: found, within_s=10)
    heartbeat.remove(claim)
    return found[0]


@pytest.mark.parametrize("look", [of_a_thread, of_an_answer, of_the_heartbeat])
def test_it_takes_no_signal(look: Callable[[], set[int]]) -> None:
    """SIGTERM would end its child with the lock of the results in its hand."""
    before = blocked()

    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} <= look()
    assert blocked() == before


def test_what_is_started_at_once_runs_in_a_thread_of_its_own() -> None:
    """Its starter goes on without it."""
    ran: list[int] = []

    start_at_once(lambda: ran.append(threading.get_ident()))

    eventually(lambda: ran)
    assert ran != [threading.get_ident()]
