"""The same numbers as instruments of OpenTelemetry's, where an app has set up its SDK.

Counters and gauges are asked for when they are exported; a histogram is told each
value, in the thread that counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import Any

from celery_resilience.telemetry import instruments as i
from celery_resilience.telemetry.instruments import Instrument, Kind
from celery_resilience.telemetry.metrics import Metrics
from celery_resilience.telemetry.series import Labels, Reading

SCOPE = "celery_resilience"

#: Seconds for which one reading is good: an export asks for each instrument by itself.
GOOD_S = 0.5


class Exported:
    """
    The metrics of this process's worker, as OpenTelemetry asks for them.

    Args:
        meter: Of a MeterProvider of the SDK.
        observation: OpenTelemetry's class of one number with its labels.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        meter: Any,
        observation: Callable[[float, Mapping[str, str]], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._observation = observation
        self._clock = clock
        self._pid = os.getpid()
        self._lock = Lock()
        self._metrics: Metrics | None = None
        self._read_at = -GOOD_S
        self._readings: dict[str, Reading] = {}
        self._known: set[str] = set()
        self._histograms: dict[str, Any] = {}
        for instrument in i.ALL:
            self._create(instrument)

    def show(self, metrics: Metrics) -> None:
        """Show these from now on, in place of an earlier worker's."""
        if self._metrics is not None:
            self._metrics.hears = None
        self._metrics = metrics
        metrics.hears = self._hear
        metrics.on_new_business = self._create

    def _create(self, instrument: Instrument) -> None:
        if instrument.name in self._known:
            return
        self._known.add(instrument.name)
        meter, name, unit = self._meter, instrument.name, instrument.unit
        if instrument.kind is Kind.COUNTER:
            meter.create_observable_counter(
                name, [self._asked(instrument, _numbers)], unit, instrument.help
            )
        elif instrument.kind is Kind.GAUGE:
            meter.create_observable_gauge(
                name, [self._asked(instrument, _numbers)], unit, instrument.help
            )
        elif instrument in i.ALL:
            self._histograms[name] = self._histogram(instrument)
        else:
            # Children have put the values into buckets, which no instrument takes.
            for end, read in (("count", _counts), ("sum", _sums)):
                meter.create_observable_counter(
                    f"{name}.{end}",
                    [self._asked(instrument, read)],
                    "",
                    instrument.help,
                )

    def _histogram(self, instrument: Instrument) -> Any:
        words = (instrument.name, instrument.unit, instrument.help)
        try:
            return self._meter.create_histogram(
                *words, explicit_bucket_boundaries_advisory=list(instrument.bounds)
            )
        except TypeError:
            # Releases such as 1.29 take no buckets: they are the SDK's own.
            return self._meter.create_histogram(*words)

    def _hear(self, instrument: Instrument, labels: Labels, value: float) -> None:
        named = dict(zip(instrument.labels, labels, strict=True))
        self._histograms[instrument.name].record(value, named)

    def _asked(
        self,
        instrument: Instrument,
        read: Callable[[Reading], Iterator[tuple[Labels, float]]],
    ) -> Callable[[Any], list[Any]]:
        def observations(_: Any) -> list[Any]:
            reading = self._reading(instrument.name)
            if reading is None:
                return []
            return [
                self._observation(
                    value, dict(zip(instrument.labels, labels, strict=True))
                )
                for labels, value in read(reading)
            ]

        return observations

    def _reading(self, name: str) -> Reading | None:
        # A forked child has a copy of the exporter, and would tell everything twice.
        if self._metrics is None or os.getpid() != self._pid:
            return None
        with self._lock:
            if self._clock() - self._read_at >= GOOD_S:
                readings = self._metrics.read()
                self._readings = {it.instrument.name: it for it in readings}
                self._read_at = self._clock()
            return self._readings.get(name)


def _numbers(reading: Reading) -> Iterator[tuple[Labels, float]]:
    yield from reading.numbers.items()


def _counts(reading: Reading) -> Iterator[tuple[Labels, float]]:
    for labels, histogram in reading.histograms.items():
        yield labels, histogram.count


def _sums(reading: Reading) -> Iterator[tuple[Labels, float]]:
    for labels, histogram in reading.histograms.items():
        yield labels, histogram.sum


_exported: dict[int, Exported] = {}


def attach(metrics: Metrics) -> bool:
    """
    Show *metrics* by the app's MeterProvider, and in place of an earlier worker's.

    Returns:
        False where the app has set none.
    """
    from opentelemetry import metrics as otel

    provider = otel.get_meter_provider()
    if type(provider).__module__.startswith("opentelemetry.metrics"):
        return False  # the API's own, behind which there is nothing
    exported = _exported.get(id(provider))
    if exported is None:
        meter = provider.get_meter(SCOPE)
        exported = _exported[id(provider)] = Exported(meter, otel.Observation)
    exported.show(metrics)
    return True
