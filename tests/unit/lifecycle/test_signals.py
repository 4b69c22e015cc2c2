"""A child's SIGTERM, and who has meant it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from celery.worker import state
from polling import eventually

from celery_resilience import _celery_worker, draining
from celery_resilience.draining import SharedFlags
from celery_resilience.lifecycle.processes import can_answer
from celery_resilience.lifecycle.signals import WAIT_S, kill, shielded


class Child:
    """A child's handler, and a clock that goes while it waits."""

    def __init__(self) -> None:
        self.flags = SharedFlags()
        self.now = 0.0
        self.ends: list[int] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def wait(self, seconds: float) -> None:
        """Time passes, and something happens."""
        self.now += seconds
        self.meanwhile()

    def term(self) -> list[int]:
        """What a SIGTERM comes to: [] if it is ignored."""
        handler = shielded(
            self.flags,
            lambda signum, frame: self.ends.append(signum),
            clock=lambda: self.now,
            wait=self.wait,
        )
        handler(signal.SIGTERM, None)
        return self.ends


def test_what_the_main_process_means_ends_the_child_at_once() -> None:
    """Draining or not."""
    for is_draining in (False, True):
        child = Child()
        child.flags.mean(os.getpid())
        if is_draining:
            child.flags.drain()
        assert child.term() == [signal.SIGTERM]
        assert child.now == 0


def test_what_the_whole_group_was_sent_is_the_workers() -> None:
    """The main process may hear of it later than the child."""
    child = Child()
    child.flags.drain()
    assert child.term() == []

    later = Child()
    later.meanwhile = lambda: later.flags.drain() if later.now > 1 else None
    assert later.term() == []
    assert 1 < later.now < WAIT_S


def test_what_somebody_means_for_this_child_ends_it_after_a_while() -> None:
    """No word of a drain came."""
    child = Child()

    assert child.term() == [signal.SIGTERM]
    assert child.now >= WAIT_S


def test_what_is_meant_for_another_child_is_not_meant_for_this_one() -> None:
    """Also where both have one place."""
    flags = SharedFlags()
    flags.mean(os.getpid() + draining.PLACES)

    assert not flags.is_meant(os.getpid())
    flags.mean(os.getpid())
    assert flags.is_meant(os.getpid())
    assert not flags.is_draining


def test_a_process_that_a_task_forks_keeps_the_signal() -> None:
    """It has inherited the handler, and is no child of the worker's."""
    child = Child()
    child.flags.drain()
    handler = shielded(
        child.flags, lambda *_: os._exit(7), clock=lambda: 0.0, wait=child.wait
    )
    pid = os.fork()
    if pid == 0:
        handler(signal.SIGTERM, None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_the_flags_are_shared_with_forked_children() -> None:
    """Written on one side, read on the other."""
    flags = draining.share()
    assert draining.shared() is flags
    assert not draining.is_draining()
    pid = os.fork()
    if pid == 0:
        flags.drain()
        os._exit(0)
    os.waitpid(pid, 0)

    assert draining.is_draining()
    draining.share()


def test_a_stopped_process_cannot_answer_and_is_killed() -> None:
    """Nor can one that has ended, or that there is not."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert can_answer(process.pid)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: not can_answer(process.pid), within_s=5)
    process.send_signal(signal.SIGCONT)
    eventually(lambda: can_answer(process.pid), within_s=5)
    process.send_signal(signal.SIGSTOP)

    assert kill([process.pid]) == 1
    eventually(lambda: kill([process.pid]) == 0, within_s=5)
    assert not can_answer(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert not can_answer(process.pid)
    process.communicate()


@pytest.mark.parametrize(
    ("name", "asked", "is_stopping"),
    [
        ("should_stop", None, False),
        ("should_stop", False, False),
        ("should_stop", 0, True),
        ("should_stop", 1, True),
        ("should_terminate", True, True),
    ],
)
def test_a_warm_stop_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: object, is_stopping: bool
) -> None:
    """Its exit code is 0, which is no False."""
    monkeypatch.setattr(state, name, asked)

    assert _celery_worker.is_worker_stopping() is is_stopping


def test_to_ask_for_a_stop_does_not_undo_a_cold_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks once."""
    monkeypatch.setattr(state, "should_stop", None)
    monkeypatch.setattr(state, "should_terminate", True)
    _celery_worker.ask_to_stop()
    assert state.should_stop is None

    monkeypatch.setattr(state, "should_terminate", None)
    _celery_worker.ask_to_stop()
    assert state.should_stop == 0
