"""Threads beside the one that runs a child's tasks."""

from __future__ import annotations

import _thread
import signal
from collections.abc import Callable
from threading import Thread


def start_deaf(run: Callable[[], None], name: str) -> Thread:
    """
    Start *run* in a thread of its own, which takes no signal.

    A child of billiard's has one thread, in which SIGTERM is held back while it says its
    last word (``pool.py:310``, billiard 4.3). Taken by another one, it ends the child
    with the lock of the results in its hand, and no child of a pool without an event
    loop is heard again.
    """
    thread = Thread(target=run, name=name, daemon=True)
    if not hasattr(signal, "pthread_sigmask"):
        thread.start()
        return thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()  # with this thread's mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread


def start_at_once(run: Callable[[], None]) -> None:
    """
    Start *run* in a thread of its own, and do not wait until it has begun.

    Where a signal's handler may not wait: gevent calls it in its hub.
    """
    _thread.start_new_thread(run, ())
