"""A dead child is heard out before its job is given to another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from celery.concurrency.asynpool import AsynPool

from celery_resilience import _pools


class Pool(AsynPool):
    """Celery's own pool, without processes: only what becomes of a dead one's job."""

    def __init__(self) -> None:
        self.put_back: list[Any] = []
        self.unread: dict[Any, Any] = {}
        self.heard: list[Any] = []
        self._put_back = self.put_back.append

    def process_flush_queues(self, proc: Any) -> None:
        self.heard.append(proc)
        job = self.unread.pop(proc, None)
        if job is not None:
            job._accepted = True

    def _find_worker_queues(self, proc: Any) -> Any:
        raise ValueError(proc)

    @property
    def _queues(self) -> list[Any]:
        return []

    def __del__(self) -> None:
        """Nothing was started."""


class Child:
    """A process of the pool's."""

    dead = False

    def __init__(self, *, is_alive: bool = False) -> None:
        self._is_alive = lambda: is_alive


def a_job(child: Child) -> Any:
    """One that was written to *child*."""
    return SimpleNamespace(
        _write_to=child, _scheduled_for=child, _accepted=False, _writer=lambda: None
    )


def a_pool() -> Pool:
    """One that a worker of ours has."""
    pool = Pool()
    _pools.hear_before_giving_back(SimpleNamespace(_pool=pool))
    return pool


def test_a_job_that_has_started_is_not_given_to_another_child() -> None:
    """Its start was told, and not read yet: else it runs again, counted by nobody."""
    pool, child = a_pool(), Child()
    job = pool.unread[child] = a_job(child)

    pool.on_job_process_down(job, 5)

    assert pool.put_back == []
    # For the pool's next look, which finds it dead with a job that it had accepted.
    assert child.dead is False


def test_plain_celery_gives_it_to_another_child() -> None:
    """The test bites."""
    pool, child = Pool(), Child()
    job = pool.unread[child] = a_job(child)

    pool.on_job_process_down(job, 5)

    assert pool.put_back == [job]


def test_a_job_that_has_not_started_is_given_to_another_child() -> None:
    """Nothing of it was told."""
    pool, child = a_pool(), Child()
    job = a_job(child)

    pool.on_job_process_down(job, 5)

    assert pool.put_back == [job]
    assert child.dead is True


def test_a_living_child_is_not_read() -> None:
    """What it says comes by the event loop, perhaps in parts."""
    pool = a_pool()
    child = Child(is_alive=True)

    pool.on_job_process_down(a_job(child), 5)

    assert (pool.heard, pool.put_back) == ([], [])


def test_a_pool_is_wrapped_once() -> None:
    """The consumer connects again and again."""
    pool = a_pool()
    wrapped = pool.on_job_process_down

    _pools.hear_before_giving_back(SimpleNamespace(_pool=pool))
    _pools.hear_before_giving_back(SimpleNamespace(_pool=object()))
    _pools.hear_before_giving_back(object())

    assert pool.on_job_process_down is wrapped
