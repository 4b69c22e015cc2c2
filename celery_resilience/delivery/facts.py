"""What only the child knows about a run, on its way to the settlement.

A prefork child sends one datagram before its result; the main process reads
it when the result arrives. Pools that run tasks in the main process hand the
facts over in the thread that runs the task and then its callback. A run
without anything to tell sends nothing.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
from collections import OrderedDict
from threading import local
from typing import Any, Protocol

#: The kernel refuses larger datagrams at its default buffer size of 208 KiB.
MAX_BYTES = 131_072

#: Seconds that a child waits for room in the main process's queue.
SEND_TIMEOUT_S = 1.0

#: Facts of results that never arrived are forgotten beyond this many.
MAX_UNCLAIMED = 1_000


class TellsFacts(Protocol):
    """The child's end of a channel."""

    def send(self, task_id: str, facts: dict[str, Any]) -> None:
        """Tell the facts of this run, in place of those that were told before."""
        ...

    def add(self, task_id: str, facts: dict[str, Any]) -> None:
        """Tell more facts of the same run."""
        ...


class NoFacts:
    """The end of a spawned child, which has no copy of the worker's channel."""

    def send(self, task_id: str, facts: dict[str, Any]) -> None:
        """Nobody hears it."""

    def add(self, task_id: str, facts: dict[str, Any]) -> None:
        """Nobody hears it."""


class FactsChannel:
    """
    One queue of datagrams from all children to the main process.

    Made before the pool forks. A spawned child has `NoFacts`: the settlement then
    describes the failure from the result.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_DGRAM
        )
        self._reader.setblocking(False)
        seconds = int(SEND_TIMEOUT_S)
        self._writer.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0)
        )
        # One byte that all children share: 1 while there is something to receive,
        # so that a result without facts costs the main process no system call.
        self._has_news: mmap.mmap | bytearray = mmap.mmap(-1, 1)
        self._main_pid = os.getpid()
        self._here = local()
        self._unclaimed: OrderedDict[tuple[int, str], dict[str, Any]] = OrderedDict()

    def send(self, task_id: str, facts: dict[str, Any]) -> None:
        """Child, or the thread that runs the task: tell the facts of this run."""
        if os.getpid() == self._main_pid:
            self._here.facts = (task_id, facts)
        else:
            self._post([os.getpid(), task_id, facts])

    def add(self, task_id: str, facts: dict[str, Any]) -> None:
        """Child, or the thread that runs the task: tell more facts of this run."""
        if os.getpid() == self._main_pid:
            here = getattr(self._here, "facts", None)
            told = here[1] if here is not None and here[0] == task_id else {}
            self._here.facts = (task_id, {**told, **facts})
        else:
            self._post([os.getpid(), task_id, facts, "more"])

    def _post(self, datagram: list[Any]) -> None:
        data = json.dumps(datagram).encode()
        if len(data) <= MAX_BYTES:
            try:
                self._writer.send(data)
            except OSError:
                return
            # After the datagram and before the result, which the main process
            # reads after a system call of both.
            self._has_news[0] = 1

    def take(self, pid: int | None, task_id: str) -> dict[str, Any]:
        """Main process: the facts of the run that just ended, or {}."""
        here = getattr(self._here, "facts", None)
        if here is not None:
            self._here.facts = None
            if here[0] == task_id:
                return dict(here[1])
        if self._has_news[0]:
            # Cleared first: what comes meanwhile sets it again.
            self._has_news[0] = 0
            self._receive()
        if not self._unclaimed:
            return {}
        return self._unclaimed.pop((pid or 0, task_id), {})

    def close(self) -> None:
        """Main process: the pool has ended."""
        self._reader.close()
        self._writer.close()
        # A late result finds nothing to receive.
        self._has_news = bytearray(1)

    def _receive(self) -> None:
        while True:
            try:
                data = self._reader.recv(MAX_BYTES)
            except OSError:
                return
            pid, task_id, facts, *more = json.loads(data)
            told = self._unclaimed.get((pid, task_id), {}) if more else {}
            self._unclaimed[pid, task_id] = {**told, **facts}
            while len(self._unclaimed) > MAX_UNCLAIMED:
                self._unclaimed.popitem(last=False)
