"""What a worker's metrics look like to Prometheus: its text, or OpenMetrics.

Written here and not by prometheus_client, which takes 12 µs for a line: a worker of 200
tasks has more than ten thousand of them, and its main process waits meanwhile.

Source: Prometheus's text exposition format 0.0.4; OpenMetrics 1.0.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

from celery_resilience.telemetry.instruments import Instrument, Kind
from celery_resilience.telemetry.series import Labels, Reading, cumulative

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

#: Series whose name and labels are remembered as text.
MAX_WRITTEN = 200_000

#: Whole floats below this one are shown without a point.
EXACT = 2.0**53

_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n"}


class MetricsPage:
    """
    The page that Prometheus scrapes.

    Args:
        read: What is known at this moment.
    """

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read
        self._starts: dict[tuple[str, Labels], tuple[str, ...]] = {}

    def __call__(self, accept: str) -> tuple[str, bytes]:
        """
        Content type and text, in the format that is asked for.

        Args:
            accept: The header of the request: OpenMetrics, or else Prometheus's text.
        """
        is_open = accepts_openmetrics(accept)
        lines: list[str] = []
        for reading in self._read():
            lines.extend(_head(reading.instrument, is_open=is_open))
            self._add_numbers(reading, lines)
            self._add_histograms(reading, lines)
        if is_open:
            lines.append("# EOF")
        text = "\n".join(lines) + "\n"
        # A name may have come over the wire with half of a character.
        data = text.encode("utf-8", "replace")
        return (OPENMETRICS if is_open else TEXT), data

    def _add_numbers(self, reading: Reading, lines: list[str]) -> None:
        instrument, starts = reading.instrument, self._starts
        (name, *_) = instrument.series
        for labels, number in reading.numbers.items():
            start = starts.get((name, labels))
            if start is None:
                start = self._remember(
                    (name, labels), (name + _labels(instrument, labels),)
                )
            lines.append(f"{start[0]} {number_text(number)}")

    def _add_histograms(self, reading: Reading, lines: list[str]) -> None:
        instrument, starts = reading.instrument, self._starts
        name = instrument.family
        for labels, histogram in reading.histograms.items():
            start = starts.get((name, labels))
            if start is None:
                start = self._remember((name, labels), _parts(instrument, labels))
            total = 0
            for begin, total in zip(start, cumulative(histogram.counts), strict=False):
                lines.append(f"{begin} {total}")
            lines.append(f"{start[-2]} {total}")
            lines.append(f"{start[-1]} {number_text(histogram.sum)}")

    def _remember(
        self, key: tuple[str, Labels], start: tuple[str, ...]
    ) -> tuple[str, ...]:
        if len(self._starts) < MAX_WRITTEN:
            self._starts[key] = start
        return start


def accepts_openmetrics(accept: str) -> bool:
    """Whether a header of HTTP asks for OpenMetrics, of the version that this is."""
    for part in accept.split(","):
        kind, *words = (word.strip() for word in part.split(";"))
        versions = [word for word in words if word.startswith("version=")]
        is_refused = "q=0" in words or "q=0.0" in words
        if kind == "application/openmetrics-text" and not is_refused:
            return versions in ([], ["version=1.0.0"], ["version=0.0.1"])
    return False


def number_text(number: float) -> str:
    """A number as both formats have it."""
    if isinstance(number, int) or (number.is_integer() and abs(number) < EXACT):
        return str(int(number))
    if math.isfinite(number):
        return repr(number)
    return "NaN" if math.isnan(number) else "+Inf" if number > 0 else "-Inf"


def _head(instrument: Instrument, *, is_open: bool) -> Iterator[str]:
    name = instrument.family
    if instrument.kind is Kind.COUNTER and not is_open:
        name += "_total"
    text = re.sub(r"[\\\n]", lambda found: _ESCAPES[found[0]], instrument.help)
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {instrument.kind}"


def _labels(instrument: Instrument, labels: Labels, more: str = "") -> str:
    named = [
        f'{name}="{_escaped(value)}"'
        for name, value in zip(instrument.labels, labels, strict=True)
    ]
    if more:
        named.append(more)
    return "{" + ",".join(named) + "}" if named else ""


def _parts(instrument: Instrument, labels: Labels) -> tuple[str, ...]:
    """How each line of a histogram begins: the buckets, the count and the sum."""
    ends = [*(repr(float(bound)) for bound in instrument.bounds), "+Inf"]
    buckets, count, sum = instrument.series
    plain = _labels(instrument, labels)
    return (
        *(buckets + _labels(instrument, labels, f'le="{end}"') for end in ends),
        count + plain,
        sum + plain,
    )


def _escaped(value: str) -> str:
    return re.sub(r'[\\"\n]', lambda found: _ESCAPES[found[0]], value)
