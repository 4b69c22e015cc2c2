"""Counts what the worker's main process settles, and answers who asks for it.

What happens is noted in the thread where it happens, which takes about a microsecond,
and counted in the thread that reads: a scrape, or a look once a second.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, Protocol

from celery_resilience.events import observe
from celery_resilience.outcome import COUNTED, ENDED, Ended, Outcome, Settlement
from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.instruments import OTHER, Instrument, Kind
from celery_resilience.telemetry.series import (
    Histogram,
    Labels,
    Reading,
    Series,
    put,
)
from celery_resilience.telemetry.shared_counts import SharedCounts

logger = logging.getLogger("celery_resilience.telemetry")

#: Notes above which whoever makes the next one counts them all.
MAX_NOTES = 5_000

#: Names that tasks may count and observe; those above are dropped.
MAX_BUSINESS = 200

#: Values of each label of those.
MAX_BUSINESS_VALUES = 200

#: Sets of labels of each of those.
MAX_BUSINESS_SERIES = 2_000

#: Tasks, queues and outcomes whose place is remembered.
MAX_CELLS = 20_000

Look = Callable[[], Iterable[tuple[Labels, float]]]


class Hears(Protocol):
    """Who is told each single value of a histogram: what takes no finished ones."""

    def __call__(
        self, instrument: Instrument, labels: Labels, value: float
    ) -> None: ...


class _Failed(NamedTuple):
    task: str
    reason: str
    error_type: str


class _Counted(NamedTuple):
    instrument: Instrument
    labels: Labels
    amount: float


class _Cells(NamedTuple):
    """Where the deliveries of one task, queue and outcome are counted."""

    outcomes: dict[Labels, float]
    labels: Labels
    run: Histogram
    wait: Histogram
    attempts: Histogram | None
    successes: dict[Labels, float] | None
    task: Labels


class Metrics:
    """
    The numbers of one worker.

    Args:
        tasks: Names of the registered tasks; messages of others share one label.
        clock: Wall time, in seconds.

    Attributes:
        hears: See there; None: nobody.
        on_new_business: Told of each name that a task counts or observes first.
    """

    def __init__(
        self, tasks: Iterable[str], *, clock: Callable[[], float] = time.time
    ) -> None:
        self.tasks = frozenset(tasks)
        self.hears: Hears | None = None
        self.on_new_business: Callable[[Instrument], None] = lambda _: None
        self._clock = clock
        self._pid = os.getpid()
        self._notes: deque[Any] = deque()
        self._untold: deque[Callable[[], None]] = deque()
        self._lock = Lock()
        self._series = {it.name: Series(it) for it in i.ALL}
        # Children count these outside of a run, too: at an item, or in another thread.
        self._shared = SharedCounts(
            [
                *((i.EVENTS.name, (name,)) for name in i.COUNTED_EVENTS),
                *((i.KEPT.name, ("kept", task)) for task in (*self.tasks, OTHER)),
            ]
        )
        self._cells: dict[tuple[str, str, Outcome], _Cells] = {}
        self._business: dict[str, Series] = {}
        self._looks: dict[str, Look] = {}
        self._stops: list[Callable[[], None]] = []
        self._told: set[str] = set()

    # --- what happens ------------------------------------------------------------------

    def attach(self, others: Iterable[Callable[[], None]] = ()) -> None:
        """
        Hear of what happens from now on, in place of an earlier worker's metrics.

        Args:
            others: What ends with it.
        """
        global _detach
        _detach()
        self._stops = [
            *others,
            observe(ENDED, self.ended),
            observe("delivery.failed", self.failed),
            observe(COUNTED, self.counted),
            observe("failed.kept", self._kept),
            observe("failed.replay_ended", self._replay_ended),
            observe("telemetry.dropped", self.dropped),
            *(observe(name, partial(self._event, name)) for name in i.COUNTED_EVENTS),
        ]
        _detach = self.detach

    def detach(self) -> None:
        """Hear no more."""
        for stop in self._stops:
            stop()

    def ended(self, ended: Ended) -> None:
        """A delivery is settled."""
        self._note(ended)

    def failed(self, settlement: Settlement) -> None:
        """Why one has failed, which `ended` counts too."""
        failure = settlement.failure
        kind = failure.exception if failure is not None else ""
        self._note(_Failed(settlement.task, str(settlement.reason), kind))

    def counted(self, fact: Any) -> None:
        """What a run has counted itself, as `RunCounts.fact` tells it."""
        self._note([fact])

    def dropped(self, signal: str = OTHER, count: int = 1, **_: Any) -> None:
        """So much could not be told."""
        if os.getpid() == self._pid:
            self.count(i.DROPPED, (str(signal),), count)

    def count(self, instrument: Instrument, labels: Labels, amount: float = 1) -> None:
        """Count *amount* more; of any thread."""
        self._note(_Counted(instrument, labels, amount))

    def _kept(self, task: str, **_: Any) -> None:
        self._count_anywhere(i.KEPT, ("kept", self._task(task)))

    def _replay_ended(self, task: str, outcome: Outcome, **_: Any) -> None:
        if outcome is not Outcome.REVOKED:
            how = "failed" if outcome is Outcome.FAILED else "succeeded"
            self.count(i.KEPT, (f"replay_{how}", self._task(task)))

    def _event(self, name: str, **_: Any) -> None:
        self._count_anywhere(i.EVENTS, (name,))

    def _count_anywhere(self, instrument: Instrument, labels: Labels) -> None:
        if os.getpid() == self._pid:
            self.count(instrument, labels)
        else:
            self._shared.add((instrument.name, labels))

    def _note(self, note: Any) -> None:
        self._notes.append(note)
        if len(self._notes) > MAX_NOTES and self._lock.acquire(blocking=False):
            # Never waited for: this may be a signal's handler, within the lock.
            try:
                self._count_notes()
            finally:
                self._lock.release()

    # --- counting ----------------------------------------------------------------------

    def start_at_zero(self, queues_of: Mapping[str, Iterable[str]]) -> None:
        """
        Have each task's numbers from the start, so that the first failure is an increase.

        Args:
            queues_of: The queues in which each task is expected.
        """
        with self._lock:
            for task, queues in queues_of.items():
                self._series[i.KEPT.name].have(("kept", task))
                for queue in queues:
                    for outcome in i.EXPECTED:
                        labels = (task, queue, str(outcome))
                        self._series[i.OUTCOMES.name].have(labels)
            for name in i.COUNTED_EVENTS:
                self._series[i.EVENTS.name].have((name,))
            for exit in i.EXPECTED_EXITS:
                self._series[i.CHILD_EXITS.name].have(exit)
            for signal in ("metrics", "spans", "events"):
                self._series[i.DROPPED.name].have((signal,))

    def look_at(self, instrument: Instrument, look: Look) -> None:
        """Ask *look* for the numbers of a gauge whenever somebody reads."""
        self._looks[instrument.name] = look

    def read(self) -> list[Reading]:
        """All that is known now; of any thread."""
        with self._lock:
            self._count_notes()
            self._count_shared()
            readings = [
                Reading.of(series)
                for series in (*self._series.values(), *self._business.values())
                if series.instrument.name not in self._looks
            ]
        for name, look in self._looks.items():
            instrument = self._series[name].instrument
            try:
                readings.append(Reading(instrument, dict(look())))
            except Exception:
                self._tell_once("cannot look at %s", name)
        return readings

    def tick(self) -> None:
        """Count what was noted, and tell who hears; called every second or so."""
        with self._lock:
            self._count_notes()
            self._count_shared()
        # Without the lock: who hears has one too, with which it asks for all.
        while self._untold:
            try:
                self._untold.popleft()()
            except Exception:
                self._tell_once("cannot tell %s", "OpenTelemetry")

    def _tell_new(self, instrument: Instrument) -> None:
        self.on_new_business(instrument)

    def _count_shared(self) -> None:
        for (name, labels), count in self._shared.new().items():
            self._series[name].add(labels, count)

    def _count_notes(self) -> None:
        notes = self._notes
        while notes:
            note = notes.popleft()
            try:
                self._count_note(note)
            except Exception:
                self._tell_once("cannot count %r", type(note).__name__)

    def _count_note(self, note: Any) -> None:
        if isinstance(note, Ended):
            self._count_ended(note)
        elif isinstance(note, _Counted):
            self._series[note.instrument.name].add(note.labels, note.amount)
        elif isinstance(note, _Failed):
            task = self._task(note.task)
            labels = (task, note.reason, note.error_type)
            self._series[i.FAILURES.name].add(labels)
        else:
            self._count_fact(*note[0])

    def _count_ended(self, ended: Ended) -> None:
        task, queue, outcome, attempt, run_s, wait_s = ended
        key = (task, queue, outcome)
        cells = self._cells.get(key)
        if cells is None:
            cells = self._find_cells(task, queue, outcome)
            if len(self._cells) < MAX_CELLS:
                self._cells[key] = cells
        cells.outcomes[cells.labels] += 1
        if run_s is not None:
            put(cells.run, i.RUN, run_s)
        if wait_s is not None:
            put(cells.wait, i.WAIT, wait_s)
        if cells.attempts is not None:
            put(cells.attempts, i.ATTEMPTS, attempt)
        if cells.successes is not None:
            cells.successes[cells.task] = self._clock()
        if self.hears is not None:
            self._hear(self.hears, cells, ended)

    def _find_cells(self, task: str, queue: str, outcome: Outcome) -> _Cells:
        series, task = self._series, self._task(task)
        is_last = outcome not in i.NOT_YET and outcome is not Outcome.REVOKED
        outcomes = series[i.OUTCOMES.name]
        successes = series[i.LAST_SUCCESS.name]
        return _Cells(
            outcomes.numbers,
            outcomes.have((task, queue, str(outcome))),
            series[i.RUN.name].histogram((task, str(outcome))),
            series[i.WAIT.name].histogram((task, queue)),
            series[i.ATTEMPTS.name].histogram((task,)) if is_last else None,
            successes.numbers if outcome is Outcome.SUCCEEDED else None,
            (task,),
        )

    def _hear(self, hears: Hears, cells: _Cells, ended: Ended) -> None:
        task, queue, outcome = cells.labels
        told: list[tuple[Instrument, Labels, float | None]] = [
            (i.RUN, (task, outcome), ended.run_s),
            (i.WAIT, (task, queue), ended.wait_s),
            (i.ATTEMPTS, (task,), ended.attempt if cells.attempts else None),
        ]
        for instrument, labels, value in told:
            if value is not None:
                self._untold.append(partial(hears, instrument, labels, value))

    def _task(self, name: str) -> str:
        return name if name in self.tasks else OTHER

    # --- what runs count themselves ----------------------------------------------------

    def _count_fact(
        self,
        counts: list[Any],
        observed: list[Any],
        dropped: int,
    ) -> None:
        for name, labels, amount in counts:
            series = self._business_series(name, Kind.COUNTER, labels)
            if series is not None:
                series.add(tuple(value for _, value in labels), amount)
        for name, labels, sum, buckets in observed:
            series = self._business_series(name, Kind.HISTOGRAM, labels)
            if series is not None:
                spread = [0] * (len(series.instrument.bounds) + 1)
                for bucket, count in buckets:
                    spread[bucket] += count
                series.merge(tuple(value for _, value in labels), spread, sum)
        if dropped:
            self._series[i.DROPPED.name].add(("metrics",), dropped)

    def _business_series(
        self, name: str, kind: Kind, labels: list[list[str]]
    ) -> Series | None:
        names = tuple(label for label, _ in labels)
        family = name.replace(".", "_")
        series = self._business.get(family)
        if series is None and len(self._business) < MAX_BUSINESS:
            made = i.business(name, kind, names)
            series = self._business[family] = Series(
                made, MAX_BUSINESS_VALUES, MAX_BUSINESS_SERIES
            )
            self._untold.append(partial(self._tell_new, made))
        if series is not None and series.instrument.is_same(name, kind, names):
            return series
        self._series[i.DROPPED.name].add(("metrics",))
        self._tell_once(
            "metric %s is not counted: it has other labels than before, is both counted "
            f"and observed, or is one of more than {MAX_BUSINESS}",
            name,
        )
        return None

    def _tell_once(self, text: str, about: str) -> None:
        if text not in self._told:
            self._told.add(text)
            has_raised = sys.exc_info()[0] is not None
            logger.warning(text + " (told once)", about, exc_info=has_raised)


def _no_metrics() -> None:
    """There were none in this process."""


_detach = _no_metrics
