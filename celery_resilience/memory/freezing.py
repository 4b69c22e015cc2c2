"""What a pool's children share with the main process is left alone by garbage collection.

Python's collector writes to each object that it looks at (``_gc_prev``, CPython 3.11), so
that a child's first full collection copies each page of them that it shared. And Celery
collects before each child that it forks (``concurrency/asynpool.py:567``, Celery 5.7), in
the loop that hands out tasks: 0.1 s with the 200,000 objects of a small app.
"""

from __future__ import annotations

import gc
from typing import Any

from celery import signals


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
