"""What only the child knows reaches the main process, or is given up in time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest

from celery_resilience.delivery import facts as module
from celery_resilience.delivery.facts import MAX_BYTES, FactsChannel

fork = multiprocessing.get_context("fork")

FACTS = {"exception": "E", "message": "m\ud800\0é", "fingerprint": "f"}


@pytest.fixture
def channel() -> Iterator[FactsChannel]:
    """A channel that this process, the main one, has made."""
    channel = FactsChannel()
    yield channel
    channel.close()


def in_child(work: Callable[[], Any]) -> int:
    """Run *work* in a forked child; returns its pid."""

    def run() -> None:
        try:
            work()
        except BaseException:
            os._exit(9)
        os._exit(0)

    process = fork.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert process.pid is not None
    return process.pid


def test_a_childs_facts_arrive(channel: FactsChannel) -> None:
    """Once, for the run that they belong to."""
    pid = in_child(lambda: channel.send("task-1", FACTS))

    assert channel.take(pid, "task-1") == FACTS
    assert channel.take(pid, "task-1") == {}


def test_facts_wait_for_their_result(channel: FactsChannel) -> None:
    """Results arrive in another order; each gets its own facts."""

    def work() -> None:
        for number in range(5):
            channel.send(f"task-{number}", {"n": number})

    pid = in_child(work)

    for number in (3, 0, 4, 1, 2):
        assert channel.take(pid, f"task-{number}") == {"n": number}


def test_two_children_are_told_apart(channel: FactsChannel) -> None:
    """A redelivery may run in one while the other still ends."""
    one = in_child(lambda: channel.send("task-1", {"n": 1}))
    two = in_child(lambda: channel.send("task-1", {"n": 2}))

    assert channel.take(two, "task-1") == {"n": 2}
    assert channel.take(one, "task-1") == {"n": 1}


def test_a_run_without_facts_has_none(channel: FactsChannel) -> None:
    """The main process does not wait for any."""
    assert channel.take(1, "task-1") == {}
    assert channel.take(None, "task-1") == {}


def test_the_last_word_of_a_run_counts(channel: FactsChannel) -> None:
    """Two runs of one task in one child, the first result lost."""

    def work() -> None:
        channel.send("task-1", {"n": 1})
        channel.send("task-1", {"n": 2})

    assert channel.take(in_child(work), "task-1") == {"n": 2}


@pytest.mark.parametrize("size", [60_000, MAX_BYTES - 100])
def test_large_facts_arrive(channel: FactsChannel, size: int) -> None:
    """A message of 8 192 characters may need six bytes for each."""
    pid = in_child(lambda: channel.send("task-1", {"x": "x" * size}))

    assert channel.take(pid, "task-1") == {"x": "x" * size}


def test_facts_that_are_too_large_are_given_up(channel: FactsChannel) -> None:
    """The settlement describes the failure from the result; nothing hangs."""

    def work() -> None:
        channel.send("huge", {"x": "x" * MAX_BYTES})
        channel.send("next", {"n": 1})

    pid = in_child(work)

    assert channel.take(pid, "huge") == {}
    assert channel.take(pid, "next") == {"n": 1}


def test_a_main_process_that_does_not_read_stops_no_child(
    channel: FactsChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's queue is full: the child waits a little, and goes on."""
    channel.close()
    monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.0)
    patient = FactsChannel()
    patient._writer.setblocking(False)

    def work() -> None:
        for number in range(2_000):
            patient.send(f"task-{number}", {"x": "x" * 500})

    pid = in_child(work)

    assert patient.take(pid, "task-0") == {"x": "x" * 500}
    assert patient.take(pid, "task-1999") == {}
    patient.close()


def test_facts_of_lost_results_are_forgotten(
    channel: FactsChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest first, so that memory is bounded."""
    monkeypatch.setattr(module, "MAX_UNCLAIMED", 20)

    def work() -> None:
        for number in range(25):
            channel.send(f"task-{number}", {"n": number})

    pid = in_child(work)

    assert channel.take(pid, "task-4") == {}
    assert len(channel._unclaimed) == 20
    assert channel.take(pid, "task-5") == {"n": 5}
    assert channel.take(pid, "task-24") == {"n": 24}


def test_a_closed_channel_stops_no_child(channel: FactsChannel) -> None:
    """The pool has ended; a last child still reports."""

    def work() -> None:
        channel.close()
        channel.send("task-1", {"n": 1})

    pid = in_child(work)

    assert channel.take(pid, "task-1") == {}


# --- pools that run tasks in the main process -----------------------------------------


def test_in_one_process_facts_are_handed_over(channel: FactsChannel) -> None:
    """No datagram, no copy through JSON; once."""
    thing = object()
    channel.send("task-1", {"thing": thing})

    assert channel.take(None, "task-1") == {"thing": thing}
    assert channel.take(None, "task-1") == {}


def test_facts_of_another_task_are_not_handed_over(channel: FactsChannel) -> None:
    """A run whose result was lost does not describe the next one."""
    channel.send("task-1", FACTS)

    assert channel.take(None, "task-2") == {}
    assert channel.take(None, "task-1") == {}


def test_threads_do_not_mix_their_facts(channel: FactsChannel) -> None:
    """The thread that runs the task runs its callback too."""
    wrong: list[Any] = []

    def work(number: int) -> None:
        for turn in range(100):
            channel.send("same-id", {"n": number, "turn": turn})
            found = channel.take(None, "same-id")
            if found != {"n": number, "turn": turn}:
                wrong.append(found)

    threads = [Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_what_is_handed_over_is_a_copy(channel: FactsChannel) -> None:
    """The settlement may add to it."""
    facts = {"n": 1}
    channel.send("task-1", facts)

    channel.take(None, "task-1")["more"] = 2

    assert facts == {"n": 1}


def test_a_result_that_comes_after_the_end_has_no_facts(channel: FactsChannel) -> None:
    """The worker has shut down; a thread of its pool still settles."""
    channel.close()

    assert channel.take(1, "task-1") == {}


def test_more_facts_are_added(channel: FactsChannel) -> None:
    """To those of the same run; those of another are replaced by what is sent."""

    def work() -> None:
        channel.send("task-1", {"a": 1, "b": 1})
        channel.add("task-1", {"b": 2})
        channel.add("task-2", {"c": 3})
        channel.send("task-3", {"d": 4})
        channel.send("task-3", {"e": 5})

    pid = in_child(work)
    assert channel.take(pid, "task-1") == {"a": 1, "b": 2}
    assert channel.take(pid, "task-2") == {"c": 3}
    assert channel.take(pid, "task-3") == {"e": 5}
    channel.send("task-4", {"a": 1})
    channel.add("task-4", {"b": 2})
    assert channel.take(None, "task-4") == {"a": 1, "b": 2}
    channel.send("task-5", {"a": 1})
    channel.add("task-6", {"b": 2})
    assert channel.take(None, "task-6") == {"b": 2}
