"""The child's side: judges a start that may follow the death of a whole worker."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery_resilience.crashes.policy import (
    MAX_REDELIVERIES_UNSTORED,
    Step,
    before_start,
)
from celery_resilience.crashes.store import StartStore
from celery_resilience.deadline import TASK_WAITS_S, answer_within
from celery_resilience.errors import (
    ResilienceError,
    SendAgain,
    TooManyCrashes,
)

logger = logging.getLogger("celery_resilience.crashes")

#: The fact that tells how many runs had ended with their process before this one.
RUNS_BEFORE = "runs_before"


class StartGuard:
    """
    Counts the starts of messages that were delivered before.

    Args:
        starts: The store of this process, or None when the app has none; called
            at each use, because a process opens its own.
        max_crashes: The app's limit, for tasks without their own.
        window_s: Older starts are forgotten.
        worker: Names the worker, and this start of it.
        tell: Tells the main process, by task id, what it must know if this child dies.
    """

    def __init__(
        self,
        starts: Callable[[], StartStore | None],
        *,
        max_crashes: int,
        window_s: float,
        worker: str,
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._tell = tell
        self._starts = starts
        self._max_crashes = max_crashes
        self._window_s = window_s
        self._worker = worker

    def before(
        self,
        task_id: str,
        retries: int,
        marks: Mapping[str, Any],
        *,
        is_redelivered: bool,
        max_crashes: int | None,
    ) -> Callable[[], None] | None:
        """
        Judge this start.

        Returns:
            What to call when the run has ended, or None.

        Raises:
            SendAgain: It must not run now, but alone, or counted first.
            TooManyCrashes: It must not run any more.
        """
        is_alone = bool(marks.get("alone"))
        if not is_redelivered and not is_alone:
            return None
        limit = max_crashes or self._max_crashes
        try:
            starts = self._starts()
            if starts is None:
                if is_redelivered:
                    self._count_in_message(marks, limit)
                return None
            key = start_key(task_id, retries, marks)
            runs, ended = answer_within(
                TASK_WAITS_S,
                lambda: self._stored(starts, key, marks, is_alone, limit),
            )
            # Without a first delivery of which nobody knows whether it ran: a
            # child's death is judged by runs that are known.
            self._tell(task_id, {RUNS_BEFORE: runs})
            return ended
        except TooManyCrashes:
            raise
        except ResilienceError as exc:
            logger.warning("%s runs uncounted: %s", task_id, exc)
            return None

    def forget_worker(self) -> None:
        """The worker was asked to stop: what it cuts off is no crash."""
        try:
            starts = self._starts()
            if starts is not None:
                starts.clear_worker(self._worker)
        except ResilienceError as exc:
            logger.warning("runs cut off by this stop may count as crashes: %s", exc)

    def _stored(
        self,
        starts: StartStore,
        key: str,
        marks: Mapping[str, Any],
        is_alone: bool,
        limit: int,
    ) -> tuple[int, Callable[[], None]]:
        unrecorded = int(marks.get("unrecorded", 0)) if is_alone else 1
        step, runs = before_start(
            crashes=int(marks.get("crashes", 0)),
            unrecorded=unrecorded,
            earlier=starts.unfinished(key, window_s=self._window_s),
            is_alone=is_alone,
            max_crashes=limit,
        )
        if step is Step.FAIL:
            starts.clear(key)
            raise TooManyCrashes(
                f"{runs} runs ended with their worker, the last one alone in it", runs
            )
        if step is Step.RUN_ALONE_FIRST:
            raise SendAgain(
                "suspect", 0.0, {"alone": True, "unrecorded": unrecorded or None}
            )
        starts.record(key, is_alone=is_alone, worker=self._worker)

        def ended() -> None:
            try:
                answer_within(TASK_WAITS_S, lambda: starts.clear(key))
            except ResilienceError as exc:
                logger.warning("this run of %s may count as a crash: %s", key, exc)

        return runs - unrecorded, ended

    def _count_in_message(self, marks: Mapping[str, Any], limit: int) -> None:
        count = int(marks.get("redeliveries", 0)) + 1
        if count > MAX_REDELIVERIES_UNSTORED:
            raise TooManyCrashes(
                f"delivered {count} times without an end, and there is no store "
                "that knows how often it had started",
                count,
            )
        raise SendAgain(
            "redelivered",
            0.0,
            {"redeliveries": count, "alone": True if count + 1 >= limit else None},
        )


def start_key(task_id: str, retries: int, marks: Mapping[str, Any]) -> str:
    """One attempt of one task id, since its last counted crash and replay."""
    replay = marks.get("replay") or {}
    parts = (task_id, retries, marks.get("crashes", 0), replay.get("number", 0))
    text = "\0".join(map(str, parts))
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
