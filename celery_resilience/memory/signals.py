"""
When a pool's process starts: a child of prefork looks at its memory from then on.

And it goes on sharing what the main process had. Python's collector writes to each
object that it looks at (``_gc_prev``, CPython 3.11), so that a child's first full
collection copies each page of them that it shared. Celery, too, collects before each
child that it forks (``concurrency/asynpool.py:567``, Celery 5.7), in the loop that hands
out tasks: 0.1 s with the 200,000 objects of a small app.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

from celery import signals

from celery_resilience import _pools
from celery_resilience.memory.recycling import Recycler
from celery_resilience.memory.task import MemoryAround

logger = logging.getLogger("celery_resilience.memory")


def child_started(around: MemoryAround, recycle_kib: int | None) -> None:
    """
    Enter this process, if it is a prefork child; a failure is logged and no more.

    Args:
        around: The room around the bodies.
        recycle_kib: What the child may gain until it is recycled; None: any amount.
    """
    child = _pools.pool_child()
    if child is None:
        return
    try:
        around.enter_child(child.place)
        if recycle_kib is not None:
            child.end_before_next_job(Recycler(around, recycle_kib).should_end)
    except Exception:
        logger.exception("the memory of this child is not looked at")


def attach(around: MemoryAround, recycle_kib: int | None, uid: str) -> None:
    """Enter each child that the worker forks."""

    def on_worker_process_init(**_: Any) -> None:
        child_started(around, recycle_kib)

    signals.worker_process_init.connect(
        on_worker_process_init, weak=False, dispatch_uid=f"{uid}-memory"
    )


def freeze_before_the_first_fork(uid: str) -> None:
    """
    Collect what is garbage as a worker's pool starts, and look at the rest never again.

    Objects that are made later are collected as ever, and those of before are freed
    when nobody refers to them; only a cycle of them is not. `gc.unfreeze` undoes it.

    Args:
        uid: Of this worker's receivers.
    """
    has_frozen: list[bool] = []

    def on_before_child(**_: Any) -> None:
        if not has_frozen:
            has_frozen.append(True)
            gc.collect()
            gc.freeze()

    signals.worker_before_create_process.connect(
        on_before_child, weak=False, dispatch_uid=f"{uid}-freeze"
    )
