"""Whether a worker is live and ready, as it looks from within."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_resilience import _celery_worker, _pools
from celery_resilience.forks import thread_gate
from celery_resilience.lifecycle.health import Answer, Seen, Since, live, ready
from celery_resilience.lifecycle.processes import can_answer
from celery_resilience.redaction import safe_text

if TYPE_CHECKING:
    from celery_resilience.lifecycle.bootstep import Lifecycle

#: Seconds between two looks.
TICK_S = 1.0

#: Seconds between two questions to the store.
STORE_S = 10.0


class HealthWatch:
    """
    Looks at one worker, in two threads: at its pool, and at its main loop from within.

    Args:
        lifecycle: Of the worker.
        waiting_at_gate: How many requests wait to run alone.
        ask_store: See `Lifecycle`.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        waiting_at_gate: Callable[[], set[Any]],
        ask_store: Callable[[], None] | None,
    ) -> None:
        self._lifecycle = lifecycle
        self._waiting_at_gate = waiting_at_gate
        self._ask_store = ask_store
        self.is_connected = False
        self._turned_at = time.monotonic()
        self._stuck, self._waits = Since(), Since()
        self._stuck_s: float | None = None
        self._waits_s: float | None = None
        self._accepted = 0
        self._store = ""

    def connected(self, consumer: Any) -> None:
        """The main loop turns from now on."""
        self._turned_at = time.monotonic()
        self.is_connected = True

    def tick(self, consumer: Any) -> None:
        """Every second: in the event loop, or in a thread that asks another loop."""
        pool = consumer.pool
        if _pools.is_event_loop_prefork(pool):
            self._turned()
        else:
            consumer.call_soon(self._turned)
        accepted = _celery_worker.accepted_tasks()
        try:
            waiting = _celery_worker.unaccepted_requests() - self._waiting_at_gate()
        except RuntimeError:
            waiting = set()  # they change, so that something goes on
        is_free = _celery_worker.running_tasks() < _pools.slots_of(pool)
        waits = bool(waiting) and is_free and accepted == self._accepted
        self._accepted = accepted
        self._waits_s = self._waits.look(waits, time.monotonic())

    def _turned(self) -> None:
        self._turned_at = time.monotonic()

    def run(self) -> None:
        """Look at the children every second, and ask the store now and then."""
        asked_at = -STORE_S
        pool = self._lifecycle.worker.pool
        ended = self._lifecycle.drain.has_ended
        while not ended.wait(TICK_S):
            with thread_gate.inside():
                pids = _pools.children_of(pool)
                is_stuck = bool(pids) and not any(map(can_answer, pids))
                now = time.monotonic()
                self._stuck_s = self._stuck.look(is_stuck, now)
                if self._ask_store is not None and now - asked_at >= STORE_S:
                    asked_at = now
                    self._look_at_store(self._ask_store)

    def _look_at_store(self, ask: Callable[[], None]) -> None:
        try:
            ask()
            self._store = ""
        except Exception as exc:
            self._store = safe_text(exc)

    def seen(self) -> Seen:
        """What is seen now; of any thread."""
        pool = self._lifecycle.worker.pool
        held_up = (
            not _pools.is_event_loop_prefork(pool) and _celery_worker.running_tasks()
        )
        pids = _pools.children_of(pool)
        return Seen(
            is_draining=self._lifecycle.drain.has_begun.is_set(),
            is_connected=self.is_connected,
            loop_age_s=None if held_up else time.monotonic() - self._turned_at,
            children=len(pids) or None,
            children_stuck_s=self._stuck_s,
            work_waits_s=self._waits_s,
            store=self._store,
        )

    def live(self) -> Answer:
        """Whether a new start would help."""
        return live(self.seen())

    def ready(self) -> Answer:
        """Whether it takes tasks."""
        return ready(self.seen())

    def facts(self) -> dict[str, Any]:
        """Told beside each answer."""
        seen = self.seen()
        return {
            "worker": self._lifecycle.worker.hostname,
            "draining": seen.is_draining,
            "connected": seen.is_connected,
            "children": seen.children,
            "running": _celery_worker.running_tasks(),
            "held": _celery_worker.held_tasks(),
        }
