"""The deliveries that this worker holds, and the one way in which each ends.

Runs in the main process: in the event loop's thread with an asynchronous
prefork pool, in a pool's own threads with the others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakSet

from celery_resilience._celery_worker import (
    has_yet_to_run,
    is_worker_stopping,
    requests_that_will_run,
    running_requests,
)
from celery_resilience._kombu import queue_of
from celery_resilience._kombu_redis import (
    finish_poll,
    is_broadcast,
    redis_channel,
)
from celery_resilience._pools import is_untouched
from celery_resilience.delivery.facts import FactsChannel
from celery_resilience.delivery.outbox import Outbox
from celery_resilience.errors import MemoryLimitExceeded
from celery_resilience.message import OriginalMessage, original_message, text_of
from celery_resilience.outcome import Outcome, Settlement

logger = logging.getLogger("celery_resilience.delivery")

#: Children that were ended, of which more are forgotten.
MAX_ENDED = 100

#: Exchanges and routing keys whose queue is remembered.
MAX_SOURCES = 1_000


class Verdict(Protocol):
    """What becomes of a run that ended with its process."""

    @property
    def runs(self) -> int:
        """How many runs have ended so, this one included."""
        ...

    @property
    def delay_s(self) -> float | None:
        """Seconds until the next run; None: there is none."""
        ...

    @property
    def marks(self) -> Mapping[str, Any]:
        """Written on the message that is sent again."""
        ...


class Keeps(Protocol):
    """What keeps failures: the room `failed`."""

    def message_for(
        self, settlement: Settlement, original: OriginalMessage
    ) -> OriginalMessage | None:
        """What must be stored before the ack: an envelope, a report, or nothing."""
        ...


class JudgesCrashes(Protocol):
    """What bounds crashes: the room `crashes`."""

    def judge(
        self, marks: Mapping[str, Any], max_crashes: int | None, runs_before: int = 0
    ) -> Verdict: ...

    def describe(self) -> str:
        """Memory and host, for the record of a lost worker."""
        ...


class Admits(Protocol):
    """What lets a suspect run alone: the room `crashes`."""

    def admit(self, request: Any) -> bool: ...

    def left(self, request: Any) -> None: ...

    def waiting(self) -> set[Any]: ...

    def clear(self) -> None: ...


class Deliveries:
    """
    Every delivery of a resilient task from its arrival to its settlement.

    Attributes:
        counts: Settlements by outcome since the worker started.
        received: Deliveries since the worker started.
        held: Messages that are dealt with but wait for the outbox before their ack.
        on_closed: Called after each settlement; None where nobody counts.
        ended_children: Why a run failed whose child was ended for it, by the pid.
    """

    def __init__(
        self,
        *,
        worker: str,
        outbox: Outbox,
        facts: FactsChannel,
        keeps: Keeps,
        crashes: JudgesCrashes,
        gate: Admits,
    ) -> None:
        self.worker = worker
        self.outbox = outbox
        self.facts = facts
        self.keeps = keeps
        self.crashes = crashes
        self.gate = gate
        self.consumer: Any = None
        self.counts: Counter[Outcome] = Counter()
        self.received = 0
        self.held: set[Any] = set()
        self.on_closed: Callable[[], None] | None = None
        self.ended_children: dict[int, MemoryLimitExceeded] = {}
        self._open: dict[int, Any] = {}
        self._untouched: list[Any] = []
        self._kept: WeakSet[Any] = WeakSet()
        self._queues: dict[tuple[str, ...], str] = {}

    @property
    def open_count(self) -> int:
        """How many deliveries are not settled: they run, or wait in memory."""
        return len(self._open)

    def opened(self, request: Any) -> None:
        """A delivery has arrived."""
        self.received += 1
        self._open[id(request)] = request

    def closed(self, request: Any, outcome: Outcome) -> None:
        """A delivery is settled."""
        self._open.pop(id(request), None)
        self.counts[outcome] += 1
        if self.on_closed is not None:
            self.on_closed()

    def is_running_in(self, pid: int) -> bool:
        """Whether a child runs one of these deliveries."""
        return any(request.worker_pid == pid for request in list(self._open.values()))

    def ended_child(self, pid: int, why: MemoryLimitExceeded) -> None:
        """A child is about to be ended, for what its run has taken."""
        self.ended_children[pid] = why
        while len(self.ended_children) > MAX_ENDED:
            self.ended_children.pop(next(iter(self.ended_children)))

    def drop_unstarted(self, keep: set[Any]) -> None:
        """
        The consumer lost or closed its connection: what has not started is not ours.

        The broker delivers it again, here or elsewhere.

        Args:
            keep: The requests that the pool runs all the same. What waits at the
                gate is none of them, though Celery counts it so.
        """
        keep = keep - self.gate.waiting()
        self.gate.clear()
        self._kept = WeakSet(keep)
        for request in list(self._open.values()):
            if request not in keep:
                request.dropped()

    def note_untouched(self, pool: Any) -> None:
        """The consumer closes: remember what nobody has begun to run, nor will."""
        self._untouched = [
            request.message
            for request in list(self._open.values())
            if is_untouched(request, pool)
        ]

    def hand_back(self) -> None:
        """
        The worker consumes no more: return what was untouched, for others to run.

        Celery holds it until the last task has ended.
        """
        untouched, self._untouched = self._untouched, []
        try:
            channel = redis_channel(self.consumer)
            if channel is not None:
                finish_poll(channel)
            for message in untouched:
                message.requeue()
        except Exception as exc:
            # The end of the connection returns them too.
            logger.info("messages that had not started are returned later: %s", exc)

    def given_back(self) -> None:
        """The connection is lost: the broker delivers what is unacknowledged again."""
        for request in list(self._open.values()):
            request.is_given_back = True
        self.held.clear()
        self.outbox.given_back()

    def will_run(self, consumer: Any) -> set[Any]:
        """The requests that run, or will, though the connection is lost."""
        given = requests_that_will_run(consumer) | self.kept()
        return given - self.gate.waiting()

    def kept(self) -> set[Any]:
        """The requests that the pool still has since the last lost connection."""
        return running_requests() | set(filter(has_yet_to_run, list(self._kept)))

    @property
    def is_stopping(self) -> bool:
        """A signal has asked the worker to stop."""
        return is_worker_stopping()

    def consumer_started(self, consumer: Any) -> None:
        """The consumer is connected, for the first time or again."""
        self.consumer = consumer
        self._queues.clear()

    def queue_of(self, message: Any) -> str:
        """The queue that a kombu message was taken from."""
        info = message.delivery_info or {}
        parts = (info.get(p) for p in ("consumer_tag", "exchange", "routing_key"))
        key = tuple(map(text_of, parts))
        queue = self._queues.get(key)
        if queue is None:
            if len(self._queues) >= MAX_SOURCES:
                self._queues.clear()  # a topic's keys may have ids in them
            queue = self._queues[key] = queue_of(self.consumer, message)
        return queue

    def original(self, message: Any) -> OriginalMessage:
        """The original of a kombu message that this worker took."""
        queue = self.queue_of(message)
        original = original_message(message, queue)
        return replace(original, is_broadcast=is_broadcast(message, queue))

    def can_come_again(self, message: Any) -> bool:
        """Whether a copy of a message that this worker took can be sent to it."""
        return not is_broadcast(message, self.queue_of(message))
