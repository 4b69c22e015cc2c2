"""Asks again and again what takes a round trip, each question in a thread of its own.

An answer is good for some time; without one nobody knows, which is not zero.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event

from celery_resilience.forks import thread_gate
from celery_resilience.telemetry.instruments import Instrument
from celery_resilience.telemetry.series import Labels

logger = logging.getLogger("celery_resilience.telemetry")

#: Seconds between an answer and the next question.
EVERY_S = 10.0

#: Seconds for which an answer is good: a question that hangs makes it too old.
GOOD_S = 30.0

Answer = Mapping[Instrument, Mapping[Labels, float]]


@dataclass(slots=True)
class Probe:
    """
    One question.

    Attributes:
        name: Such as "store".
        ask: Answers, or raises.
        clock: Monotonic seconds.
    """

    name: str
    ask: Callable[[], Answer]
    clock: Callable[[], float] = time.monotonic
    _answer: Answer = field(default_factory=dict)
    _answered_at: float | None = None
    _has_said: bool = False

    def run(self, has_ended: Event) -> None:
        """Ask until *has_ended*; a thread's."""
        while True:
            with thread_gate.inside():
                self.ask_once()
            if has_ended.wait(EVERY_S):
                return

    def ask_once(self) -> None:
        """Ask, and remember the answer."""
        try:
            answer = self.ask()
        except Exception as exc:
            self._answered_at = None
            if not self._has_said:
                self._has_said = True
                logger.warning(
                    "metrics: cannot ask %s, so that nobody knows: %s", self.name, exc
                )
            return
        self._answer, self._answered_at = answer, self.clock()
        self._has_said = False

    @property
    def is_good(self) -> bool:
        """Whether there is an answer that is young enough."""
        at = self._answered_at
        return at is not None and self.clock() - at <= GOOD_S

    def numbers(self, instrument: Instrument) -> Mapping[Labels, float]:
        """What is known of *instrument*; nothing where nobody knows."""
        return self._answer.get(instrument, {}) if self.is_good else {}


class Probes:
    """
    All questions of one worker.

    Args:
        probes: By none of which two tell of one instrument.
    """

    def __init__(self, probes: Iterable[Probe]) -> None:
        self.all = tuple(probes)

    def successes(self) -> Iterator[tuple[Labels, float]]:
        """1 for each question that has an answer, 0 for the others."""
        for probe in self.all:
            yield (probe.name,), float(probe.is_good)

    def look(self, instrument: Instrument) -> Iterator[tuple[Labels, float]]:
        """What is known of one instrument."""
        for probe in self.all:
            yield from probe.numbers(instrument).items()
