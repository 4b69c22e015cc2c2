"""Counts the spans that OpenTelemetry's SDK drops, which it tells nobody (1.45).

By wraps on the instances of the app's own processors. Where a name is missing, nothing
is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

#: Marks what is wrapped already.
_COUNTED = "_celery_resilience_counted"


def count_dropped_spans(provider: Any, dropped: Callable[[int], None]) -> None:
    """
    Call *dropped* with the number of spans that a provider's processors could not send.

    Args:
        provider: A TracerProvider; one without batch processors is left alone.
    """
    for batches in _batches_of(provider):
        exporter = getattr(batches, "_exporter", None)
        if exporter is None or getattr(exporter, _COUNTED, False):
            continue
        setattr(exporter, _COUNTED, True)
        exporter.export = _counting(exporter.export, dropped)
        metrics = getattr(batches, "_metrics", None)
        drop_items = getattr(metrics, "drop_items", None)
        if metrics is not None and drop_items is not None:
            metrics.drop_items = _overflowing(drop_items, dropped)


def _batches_of(provider: Any) -> Iterator[Any]:
    active = getattr(provider, "_active_span_processor", None)
    for processor in getattr(active, "_span_processors", ()):
        batches = getattr(processor, "_batch_processor", None)
        if batches is not None:
            yield batches


def _counting(
    export: Callable[[Any], Any], dropped: Callable[[int], None]
) -> Callable[[Any], Any]:
    def export_and_count(spans: Any) -> Any:
        try:
            result = export(spans)
        except BaseException:
            dropped(len(spans))
            raise
        if getattr(result, "name", "") == "FAILURE":
            dropped(len(spans))
        return result

    return export_and_count


def _overflowing(
    drop_items: Callable[..., Any], dropped: Callable[[int], None]
) -> Callable[..., Any]:
    def drop_and_count(count: int, *more: Any, **words: Any) -> Any:
        dropped(count)
        return drop_items(count, *more, **words)

    return drop_and_count
