"""Tasks that count what they do, and then end in the way that they are told."""

from __future__ import annotations

import json
import os
import signal
from threading import Thread
from typing import Any

from celery import Celery
from retrying import SOON_S

from celery_resilience import Skip
from celery_resilience.events import emit


def register(app: Celery, base: Any, conf: dict[str, Any]) -> None:
    """
    Add them to *app*.

    Args:
        conf: With `fleet_otel`, OpenTelemetry's SDK is set up in a worker, as an app does
            when it is imported: each process writes there what it exports, a line of JSON each.
    """
    if "fleet_otel" in conf and "FLEET_CONF" in os.environ:
        _set_up_otel(conf["fleet_otel"])

    @app.task(base=base, bind=True, name="metered", shared=False, max_retries=1)
    def metered(self: Any, how: str, secret: str = "") -> str:
        self.resilience.count("orders", 2, how=how)
        self.resilience.observe("amount_eur", 12.5)
        if how == "event":
            # As a heartbeat does it: in a thread that has no current task.
            thread = Thread(
                target=emit, args=("idempotency.lease_lost",), kwargs={"claim": None}
            )
            thread.start()
            thread.join()
        if how == "raise":
            raise ValueError(secret)
        if how == "retry":
            raise self.retry(countdown=SOON_S)
        if how == "retry_once" and self.request.retries == 0:
            raise self.retry(countdown=SOON_S)
        if how == "skip":
            raise Skip("nothing to do")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return how

    @app.task(base=base, bind=True, name="misnamed", shared=False)
    def misnamed(self: Any) -> None:
        self.resilience.count("Orders!")


def _set_up_otel(file: str) -> None:
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import (
        ConsoleMetricExporter,
        PeriodicExportingMetricReader,
    )

    def line(data: Any) -> str:
        found = json.loads(data.to_json(indent=None))
        told = [
            metric
            for resource in found["resource_metrics"]
            for scope in resource["scope_metrics"]
            for metric in scope["metrics"]
        ]
        return json.dumps({"pid": os.getpid(), "metrics": told}) + "\n"

    out = open(file, "a", buffering=1)  # noqa: SIM115 -- until the process ends
    exporter = ConsoleMetricExporter(out=out, formatter=line)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=500)
    metrics.set_meter_provider(MeterProvider([reader]))
