"""What a worker's metrics look like to Prometheus, by prometheus_client.

In a registry of its own: the global one is the app's, and Flower's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from celery_resilience.telemetry.instruments import Instrument, Kind
from celery_resilience.telemetry.series import Histogram, Labels, Reading, cumulative


class Collector:
    """
    A worker's metrics as a collector of prometheus_client's.

    Args:
        read: What is known at this moment.
    """

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Each family with its samples."""
        for reading in self._read():
            yield _family(reading)

    def describe(self) -> Iterator[Metric]:
        """None: nothing is counted while this is registered."""
        return iter(())


def _family(reading: Reading) -> Metric:
    instrument = reading.instrument
    family = Metric(
        instrument.family.replace(".", "_"), instrument.help, str(instrument.kind)
    )
    name = family.name + ("_total" if instrument.kind is Kind.COUNTER else "")
    for labels, number in reading.numbers.items():
        family.add_sample(name, _labels(instrument, labels), number)
    for labels, histogram in reading.histograms.items():
        _add_histogram(family, instrument, labels, histogram)
    return family


def _add_histogram(
    family: Metric, instrument: Instrument, labels: Labels, histogram: Histogram
) -> None:
    named = _labels(instrument, labels)
    ends = [*map(floatToGoString, instrument.bounds), "+Inf"]
    for end, count in zip(ends, cumulative(histogram.counts), strict=True):
        family.add_sample(family.name + "_bucket", {**named, "le": end}, count)
    family.add_sample(family.name + "_count", named, histogram.count)
    family.add_sample(family.name + "_sum", named, histogram.sum)


def _labels(instrument: Instrument, labels: Labels) -> dict[str, str]:
    return dict(zip(instrument.labels, labels, strict=True))


class MetricsPage:
    """
    The page that Prometheus scrapes.

    Args:
        read: What is known at this moment.
    """

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Collector(read))

    def __call__(self, accept: str) -> tuple[str, bytes]:
        """
        Content type and text, in the format that is asked for.

        Args:
            accept: The header of the request: OpenMetrics, or else Prometheus's text.
        """
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)
