"""Takes in, on loopback, what Sentry's SDK and OpenTelemetry's exporter send."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)


@dataclass(frozen=True, slots=True)
class SentSpan:
    """
    One span as it arrived.

    Attributes:
        links: Trace ids of its links.
        events: Attributes of its events, one text each.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    is_error: bool
    status: str
    duration_s: float
    attributes: dict[str, Any]
    links: list[str]
    events: list[str]

    @property
    def task_id(self) -> Any:
        """Of the task whose run, or publish, it is."""
        return self.attributes.get("messaging.message.id")


@dataclass(slots=True)
class Sink:
    """
    What has arrived.

    Attributes:
        items: Sentry's, by their kinds ("event", "transaction", …).
        raw: Every body whole, as text.
    """

    port: int = 0
    items: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    spans: list[SentSpan] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)

    @property
    def dsn(self) -> str:
        """For `sentry_sdk.init`."""
        return f"http://key@127.0.0.1:{self.port}/1"

    @property
    def endpoint(self) -> str:
        """For OTLP over HTTP."""
        return f"http://127.0.0.1:{self.port}/v1/traces"

    def events(self, task_id: str | None = None) -> list[dict[str, Any]]:
        """Sentry's events, of one task or all."""
        found = [item for kind, item in list(self.items) if kind == "event"]
        return [
            event
            for event in found
            if task_id in (None, event.get("tags", {}).get("celery_task_id"))
        ]

    def runs(self, task_id: str) -> list[SentSpan]:
        """The spans of the runs of one task."""
        return [
            span
            for span in list(self.spans)
            if span.task_id == task_id and span.name.startswith("run/")
        ]

    def take_envelope(self, body: bytes) -> None:
        """Sentry's format: lines of JSON, a header before each item."""
        lines = body.splitlines()[1:]
        while lines:
            header = json.loads(lines.pop(0))
            payload = lines.pop(0) if lines else b"{}"
            kind = header.get("type", "")
            if kind in ("event", "transaction"):
                self.items.append((kind, json.loads(payload)))

    def take_spans(self, body: bytes) -> None:
        """OTLP's protobuf."""
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        self.raw.append(str(request))
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [_span_of(span) for span in scope.spans]


def _span_of(span: Any) -> SentSpan:
    return SentSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        is_error=span.status.code == 2,
        status=span.status.message,
        duration_s=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        attributes={a.key: _value_of(a.value) for a in span.attributes},
        links=[link.trace_id.hex() for link in span.links],
        events=[str(event.attributes) for event in span.events],
    )


def _value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None


@contextmanager
def telemetry_sink() -> Iterator[Sink]:
    """A sink for the length of a block."""
    sink = Sink()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.startswith("/v1/traces"):
                sink.take_spans(body)
            else:
                sink.raw.append(body.decode(errors="replace"))
                sink.take_envelope(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    sink.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
