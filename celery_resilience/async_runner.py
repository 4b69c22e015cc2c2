"""One event loop for each thread of a process, which outlives the runs of tasks.

An engine's pool of asynchronous connections belongs to its loop: with a loop for each
run, each run connects anew, or fails on the connections of the one before.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Seconds for what a coroutine that was cut off still has to say to its servers.
LAST_WORDS_S = 2.0


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.runner: asyncio.Runner | None = None
        self.pid = os.getpid()


_mine = _OfThread()

#: Loops of a parent process, whose descriptors are the parent's to close.
_of_parents: list[asyncio.Runner] = []


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """
    What *coroutine* returns, run on this thread's own loop.

    Tasks that it leaves running are cancelled, as `asyncio.run` does.

    Raises:
        RuntimeError: A loop runs in this thread: await it instead.
    """
    runner = _runner()
    loop = runner.get_loop()
    try:
        # The runner's own context would be that of its first run.
        return runner.run(coroutine, context=contextvars.copy_context())
    finally:
        if not loop.is_running():
            _end_tasks(loop)


def _runner() -> asyncio.Runner:
    if _mine.pid != os.getpid():
        if _mine.runner is not None:
            _of_parents.append(_mine.runner)
        _mine.runner = None
        _mine.pid = os.getpid()
    if _mine.runner is None:
        _mine.runner = asyncio.Runner()
    return _mine.runner


def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    if not left:
        return
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.wait(left, timeout=LAST_WORDS_S))
    # A driver that was cancelled may have begun to tell its server so.
    left = asyncio.all_tasks(loop)
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=LAST_WORDS_S))
