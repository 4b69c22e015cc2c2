"""When a pool's process starts: a child of prefork looks at its memory from then on."""

from __future__ import annotations

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
