"""Numbers by their labels, bounded in how many there may be. Policy only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from celery_resilience.telemetry.instruments import OTHER, Instrument, Kind

#: Values of one label of one instrument that are told apart; the rest is one more.
MAX_VALUES = 500

#: The same for types of exceptions, which tasks make up.
MAX_TYPES = 100

#: Sets of labels of one instrument, of which each value may be few.
MAX_SERIES = 20_000

Labels = tuple[str, ...]


@dataclass(slots=True)
class Histogram:
    """
    What was observed under one set of labels.

    Attributes:
        counts: One for each bucket, and one for what is above them all; each counts
            its own values only.
    """

    counts: list[int]
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self.counts)


def put(histogram: Histogram, instrument: Instrument, value: float) -> None:
    """Put one value into its bucket."""
    histogram.counts[bisect_left(instrument.bounds, value)] += 1
    histogram.sum += value


class Series:
    """
    One instrument's numbers by its labels.

    Not safe for threads: who has it has a lock.

    Args:
        instrument: Of which they are.
        max_values: Values that each label may have; the rest is `OTHER`.
        max_series: Sets of labels; of one more each label is `OTHER`.
    """

    def __init__(
        self,
        instrument: Instrument,
        max_values: int = MAX_VALUES,
        max_series: int = MAX_SERIES,
    ) -> None:
        self.instrument = instrument
        self.numbers: dict[Labels, float] = {}
        self.histograms: dict[Labels, Histogram] = {}
        self._max_values = max_values
        self._max_series = max_series
        self._max_types = min(max_values, MAX_TYPES)
        self._known: list[set[str]] = [set() for _ in instrument.labels]

    def have(self, labels: Labels) -> Labels:
        """Have a number under these labels, 0 at first; returns those that it has."""
        if labels not in self.numbers:
            labels = self._bounded(labels)
            self.numbers.setdefault(labels, 0)
        return labels

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Count *amount* more."""
        self.numbers[self.have(labels)] += amount

    def histogram(self, labels: Labels) -> Histogram:
        """The buckets under these labels; empty at first."""
        found = self.histograms.get(labels)
        if found is None:
            labels = self._bounded(labels)
            empty = [0] * (len(self.instrument.bounds) + 1)
            found = self.histograms.setdefault(labels, Histogram(empty))
        return found

    def merge(self, labels: Labels, counts: list[int], sum: float) -> None:
        """Add what another process has put into its buckets."""
        found = self.histogram(labels)
        for at, count in enumerate(counts):
            found.counts[at] += count
        found.sum += sum

    def _bounded(self, labels: Labels) -> Labels:
        labels = tuple(map(self._bounded_value, range(len(labels)), labels))
        is_known = labels in self.numbers or labels in self.histograms
        # A series has the ones or the others.
        count = len(self.numbers) + len(self.histograms)
        if is_known or count < self._max_series:
            return labels
        return (OTHER,) * len(labels)

    def _bounded_value(self, at: int, value: str) -> str:
        known = self._known[at]
        if value in known:
            return value
        is_type = self.instrument.labels[at] == "error_type"
        if len(known) >= (self._max_types if is_type else self._max_values):
            return OTHER
        known.add(value)
        return value


@dataclass(frozen=True, slots=True)
class Reading:
    """
    What one instrument tells at one moment.

    Attributes:
        numbers: Of a counter or gauge; what is not known is not there.
        histograms: With buckets that count all that is not above them.
    """

    instrument: Instrument
    numbers: dict[Labels, float] = field(default_factory=dict)
    histograms: dict[Labels, Histogram] = field(default_factory=dict)

    @classmethod
    def of(cls, series: Series) -> Reading:
        """A copy of what a series has now."""
        if series.instrument.kind is Kind.HISTOGRAM:
            copies = {
                labels: Histogram(list(found.counts), found.sum)
                for labels, found in series.histograms.items()
                if found.count
            }
            return cls(series.instrument, histograms=copies)
        return cls(series.instrument, dict(series.numbers))


def cumulative(counts: list[int]) -> Iterator[int]:
    """Prometheus's buckets: each with all that is below it."""
    total = 0
    for count in counts:
        total += count
        yield total
