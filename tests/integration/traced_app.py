"""A collector of traces for the tests, and operations that make spans."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from rlm_tasks import operation

tracer = trace.get_tracer("theirs")


@operation("with_span", merge=sum)
def with_span(number: int) -> int:
    """Set an attribute of the node's span, and work within an inner span."""
    trace.get_current_span().set_attribute("last_item", number)
    with tracer.start_as_current_span("inner"):
        return number


@operation("with_span_async", concurrency=8, merge=sum)
async def with_span_async(number: int) -> int:
    """Work within an inner span, with eight items in flight."""
    with tracer.start_as_current_span("inner"):
        await asyncio.sleep(0.001)
        return number


@operation("die_with_span", merge=sum)
def die_with_span(item: dict[str, Any]) -> int:
    """Work within an inner span; kill the process the first time the marked item runs."""
    with tracer.start_as_current_span("inner"):
        if (marker := item.get("marker")) and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1


@dataclass(frozen=True)
class Received:
    """A span as the collector received it."""

    trace: str
    id: str
    parent: str
    name: str
    start_ns: int
    end_ns: int
    about: dict[str, Any]
    failed: bool
    message: str
    service: str


class Collector(ThreadingHTTPServer):
    """A receiver of OTLP traces over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Received] = []

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that send traces here."""
        return {
            "RLM_TRACING__ENABLED": "1",
            "RLM_TRACING__SAMPLE_RATE": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def of(self, trace_id: str) -> list[Received]:
        """Return the spans of a trace."""
        return [each for each in self.spans if each.trace == trace_id]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        self.server.spans += spans_of(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Received]:
    """Yield the spans of one request."""
    for each in request.resource_spans:
        service = _plain(each.resource.attributes)["service.name"]
        for scope in each.scope_spans:
            for span in scope.spans:
                yield Received(
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.name,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _plain(span.attributes),
                    span.status.code == 2,
                    span.status.message,
                    service,
                )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector for the length of a block."""
    with Collector() as own:
        thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield own
        finally:
            own.shutdown()
            thread.join()


@worker_process_init.connect
def provide(**_: Any) -> None:
    """Set a tracer provider as users do: in the pool process, before its first task."""
    if os.environ.get("OWN_PROVIDER"):
        provider = TracerProvider(resource=Resource({"service.name": "their service"}))
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
