"""Tasks of the test app that take memory, and some that do not give it back."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, signals

MIB = 1 << 20

#: What leaks, leaks into this.
kept: list[Any] = []


def memory_mib() -> float:
    """What this process has, resident."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def private_kib() -> int:
    """What this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.partition("Private_Dirty:")[2].split()[0])


def lift() -> None:
    """Be as on a system that does not enforce the limit of a process's data."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def take(mib: int, kept_in: list[Any]) -> None:
    """Take memory in small steps, each of which is filled."""
    for _ in range(mib * 16):
        kept_in.append(b"x" * (MIB // 16))


def register(
    app: Celery, base: Any, note: Callable[..., None], conf: dict[str, Any]
) -> None:
    """
    Add the tasks to *app*.

    Args:
        conf: `fleet_ballast_mib`, what its processes have from the start; and
            `fleet_recycle_every`, runs after which a child ends; `fleet_cgroups`,
            the folder of another kernel's cgroups.
    """
    if conf.get("fleet_cgroups"):
        from celery_resilience.memory import container

        container.CGROUPS = Path(conf["fleet_cgroups"])
    if conf.get("fleet_ballast_mib"):
        take(conf["fleet_ballast_mib"], kept)

    def task(**options: Any) -> Any:
        return app.task(base=base, bind=True, shared=False, **options)

    def started(self: Any) -> None:
        note(self.name, self.request.id, os.getpid(), time.time())

    def ended(self: Any) -> None:
        note("ended", self.request.id, os.getpid(), time.time())

    @task(name="leak")
    def leak(self: Any, mib: int) -> None:
        started(self)
        take(mib, kept)
        ended(self)

    @task(name="collect_garbage")
    def collect_garbage(self: Any) -> None:
        note("private_kib", private_kib())
        gc.collect()
        note("private_kib", private_kib())

    @task(name="spike")
    def spike(self: Any, mib: int) -> None:
        started(self)
        take(mib, [])
        ended(self)

    def greedy(self: Any, how: str, mib: int = 2_048) -> None:
        started(self)
        if how == "at once":
            bytearray(mib << 20)
        elif how == "in crumbs":
            # Nothing is left for the smallest object of the handler's either.
            crumbs: list[Any] = []
            while True:
                crumbs = [crumbs, len(crumbs) + 0.5, {}]
        else:
            take(mib, [])
        note("survived", self.request.id)

    task(name="greedy")(greedy)
    task(name="greedy_late", acks_late=True)(greedy)

    @task(name="greedy_unlimited", memory_limit_mib=4_096)
    def greedy_unlimited(self: Any, mib: int) -> None:
        started(self)
        take(mib, [])
        ended(self)

    def unbridled(self: Any, how: str, mib: int = 2_048) -> None:
        started(self)
        lift()
        if how == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65))
        held: list[Any] = []
        try:
            if how == "at once":
                held.append(bytearray(b"x") * (mib << 20))
            else:
                for _ in range(mib):
                    take(1, held)
                    time.sleep(0.002)
        except Exception as exc:
            note("cleaned up", self.request.id, type(exc).__name__)
            held.clear()
            raise
        note("survived", self.request.id)

    task(name="unbridled")(unbridled)
    task(name="unbridled_late", acks_late=True)(unbridled)

    @task(name="hold", acks_late=True)
    def hold(self: Any, mib: int, seconds: float, end: str = "") -> None:
        started(self)
        held: list[Any] = []
        take(mib, held)
        note("holds", self.request.id)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (end and os.path.exists(end)):
            time.sleep(0.02)
        ended(self)

    every = conf.get("fleet_recycle_every")
    if every:

        @signals.worker_process_init.connect(weak=False)
        def end_often(**_: Any) -> None:
            from celery_resilience import _pools

            child = _pools.pool_child()
            assert child is not None
            child.end_before_next_job(lambda jobs: jobs >= every)
