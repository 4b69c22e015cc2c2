"""One drain, from the first signal to the last byte."""

from __future__ import annotations

import logging

import pytest

from celery_resilience.lifecycle.drain import Asked, Drain, Grace, Timekeeper

#: Nothing that these tests wait for is longer.
GRACE = Grace(kill_after_s=0.02, give_up_after_s=0.04, gone_after_s=0.02)


class Clock:
    """Seconds that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Acts:
    """A worker that notes what is done to it, and settles when it is told."""

    def __init__(self, settles_at: str = "", *, goes_on: bool = False) -> None:
        self.done: list[str] = []
        self.settles_at = settles_at
        self.goes_on = goes_on
        self.drain: Drain

    def running(self) -> int:
        """Two."""
        return 2

    def interrupt(self) -> bool:
        """Cut off what runs."""
        self._did("interrupt")
        return self.goes_on

    def kill_children(self) -> int:
        """Both."""
        self._did("kill")
        return 2

    def exit_now(self, code: int) -> None:
        """End."""
        self._did(f"exit {code}")

    def _did(self, what: str) -> None:
        self.done.append(what)
        if what == self.settles_at:
            self.drain.cut_off(is_put_back=True)
            self.drain.settled(None)
            self.drain.has_ended.set()


def drained(acts: Acts, timeout_s: float | None = 0.01) -> list[str]:
    """What a whole drain does."""
    acts.drain = Drain(timeout_s=timeout_s, on_begin=lambda: None, clock=Clock())
    acts.drain.begin(Asked("SIGTERM"))
    Timekeeper(acts.drain, acts, GRACE).run()
    return acts.done


def test_a_drain_that_ends_in_time_is_left_alone() -> None:
    """Nothing is cut off."""
    acts = Acts()
    acts.drain = Drain(timeout_s=60, on_begin=lambda: None, clock=Clock())
    acts.drain.begin(Asked("SIGTERM"))
    acts.drain.settled(None)
    acts.drain.has_ended.set()

    Timekeeper(acts.drain, acts, GRACE).run()
    assert acts.done == []
    assert acts.drain.words() == "drained (SIGTERM); exit code 0"


@pytest.mark.parametrize(
    ("settles_at", "done"),
    [
        ("interrupt", ["interrupt"]),
        ("kill", ["interrupt", "kill"]),
        ("", ["interrupt", "kill", "exit 77"]),
    ],
)
def test_after_the_deadline_each_step_is_harder(
    settles_at: str, done: list[str]
) -> None:
    """Until one helps; the last always does."""
    assert drained(Acts(settles_at)) == done


def test_tasks_that_cannot_be_cut_off_end_with_their_process() -> None:
    """With the exit code of what became of them."""
    acts = Acts("interrupt", goes_on=True)

    assert drained(acts)[:2] == ["interrupt", "exit 75"]


def test_a_worker_that_is_settled_and_does_not_stop_is_ended() -> None:
    """A connection's end may hang; the exit code is known."""
    acts = Acts()
    acts.drain = Drain(timeout_s=60, on_begin=lambda: None, clock=Clock())
    acts.drain.begin(Asked("SIGTERM"))
    acts.drain.cut_off(is_put_back=False)
    acts.drain.settled(None)

    Timekeeper(acts.drain, acts, GRACE).run()
    assert acts.done == ["exit 76"]


def test_without_a_deadline_nobody_is_hurried() -> None:
    """Not even after the last settlement."""
    acts = Acts()
    acts.drain = Drain(timeout_s=None, on_begin=lambda: None, clock=Clock())
    acts.drain.begin(Asked("SIGTERM"))
    assert acts.drain.left_s() is None
    acts.drain.settled(None)

    Timekeeper(acts.drain, acts, GRACE).run()
    assert acts.done == []


def test_an_interruption_that_fails_does_not_keep_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, and the next step taken."""

    class Broken(Acts):
        def interrupt(self) -> bool:
            raise OSError("no")

    with caplog.at_level(logging.INFO):
        assert drained(Broken()) == ["kill", "exit 77"]
    assert "could not be cut off" in caplog.text


def test_the_first_reason_counts() -> None:
    """And its moment: the deadline is one, however many signals come."""
    clock = Clock()
    begun: list[int] = []
    drain = Drain(timeout_s=30, on_begin=lambda: begun.append(1), clock=clock)

    assert drain.begin(Asked("memory limit", code=12))
    clock.now += 10
    assert not drain.begin(Asked("SIGTERM"))
    assert drain.left_s() == 20
    clock.now += 40
    assert drain.left_s() == 0
    assert drain.settled(None) == 12
    assert drain.words() == "recycled (memory limit); exit code 12"
    assert begun == [1]


def test_what_was_cut_off_is_told() -> None:
    """In the last line of the log."""
    drain = Drain(timeout_s=1, on_begin=lambda: None, clock=Clock())
    drain.begin(Asked("SIGTERM"))
    drain.cut_off(is_put_back=True)
    drain.cut_off(is_put_back=False)

    assert drain.settled(0) == 76
    assert drain.words() == (
        "work was cut off (SIGTERM; put back: 1, cut off for good: 1); exit code 76"
    )


def test_a_worker_that_nobody_asked_to_end_has_an_error() -> None:
    """Celery's exit code stays."""
    drain = Drain(timeout_s=1, on_begin=lambda: None, clock=Clock())

    assert drain.settled(1) == 1
