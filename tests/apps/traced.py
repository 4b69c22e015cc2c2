"""Turns Sentry and OpenTelemetry on in a worker of the test app, as its owner would."""

from __future__ import annotations

from typing import Any


def set_up(conf: dict[str, Any]) -> None:
    """
    Initialise what is asked for, before the app is made.

    Args:
        conf: `fleet_sentry`: keywords of `sentry_sdk.init`; `fleet_spans`: the address
            of a collector; `fleet_links_sentry`: Sentry's events have the ids of spans.
    """
    if "fleet_spans" in conf:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter,
        )
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=conf["fleet_spans"], timeout=1)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=200)
        )
        trace.set_tracer_provider(provider)
        CeleryInstrumentor().instrument()
    if "fleet_sentry" in conf:
        import sentry_sdk

        options = dict(conf["fleet_sentry"])
        if conf.get("fleet_links_sentry"):
            from sentry_sdk.integrations.celery import CeleryIntegration
            from sentry_sdk.integrations.otlp import OTLPIntegration

            options["integrations"] = [
                CeleryIntegration(propagate_traces=False),
                OTLPIntegration(
                    setup_otlp_traces_exporter=False, setup_propagator=False
                ),
            ]
        sentry_sdk.init(**options)
