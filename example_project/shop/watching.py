"""Sentry and OpenTelemetry, where the environment names them."""

from __future__ import annotations

import os


def begin() -> None:
    """
    Set up what `SENTRY_DSN` and `OTEL_EXPORTER_OTLP_ENDPOINT` ask for, before the app.

    With both, Sentry's events have the ids of OpenTelemetry's spans, and it makes none.
    """
    has_spans = bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"))
    if has_spans:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter,
        )
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
        CeleryInstrumentor().instrument()
    if os.environ.get("SENTRY_DSN"):
        import sentry_sdk
        from sentry_sdk.integrations import Integration
        from sentry_sdk.integrations.celery import CeleryIntegration

        integrations: list[Integration] = [
            CeleryIntegration(propagate_traces=not has_spans)
        ]
        if has_spans:
            from sentry_sdk.integrations.otlp import OTLPIntegration

            integrations.append(
                OTLPIntegration(
                    setup_otlp_traces_exporter=False, setup_propagator=False
                )
            )
        sentry_sdk.init(
            integrations=integrations, release=os.environ.get("SHOP_RELEASE")
        )
