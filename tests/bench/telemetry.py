"""What tracing costs for each node, in processor time of its worker, by how many spans leave in a
batch.

``python -m tests.bench.telemetry`` prints a table: a span is begun, ended, handed over, taken and
exported to a collector in a process of its own; what the pool process and the main process spend on
it is spent here by one.  A share is that of a node's own time.  Whole jobs are no measure: two runs
of one differ by ten times as much.  Nothing asserts."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from statistics import median
from unittest import mock

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from rlm_tasks import OptimizationConfig
from rlm_tasks.telemetry.spans import Export, HandOver, Ids, Spans
from tests.integration.traced_app import collector

RUNS, SPANS = 9, 1000
ABOUT = {
    f"rlm.{name}": "0123456789"
    for name in ("job_id", "node_id", "parent_id", "operation", "worker", "level")
} | {f"rlm.{name}": 12345 for name in ("depth", "lo", "hi", "attempt", "done", "failed")}
"""As many attributes as a node's span has."""
NODES_MS = (1000.0, 50.0, 10.0)
"""A node's target, a slice, and a node that is too small."""


def receive(told: Connection) -> None:
    """Be the collector, until killed."""
    with collector() as own:
        told.send(own.server_port)
        while True:
            time.sleep(3600)


def cost_us(endpoint: str, batching: dict[str, str]) -> float:
    """Return the processor time of a span, from its begin until it has left."""
    with mock.patch.dict(os.environ, batching):
        export = Export([OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")])
        spans, began = Spans([HandOver(export.way)]), time.process_time()
        export.start()
        for at in range(1, SPANS + 1):
            span = spans.start("node bench", Ids(at, at, 0, True), time.time_ns(), ABOUT)
            assert span is not None
            span.end()
        export.way.setblocking(True)
        export.way.send(b"")  # as `stop` does, without its bound on the wait
        export.join()
    return 1e6 * (time.process_time() - began) / SPANS


def main() -> None:
    """Run all kinds in turn, so that what else the machine does strikes all of them alike."""
    kinds = {"every span by itself": {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}}
    for size, flush_s in ((5, 10.0), (10, 30.0), (50, 60.0)):
        told = OptimizationConfig(
            telemetry_batch_size=size, telemetry_flush_interval_seconds=flush_s
        ).as_environment()
        kinds[f"{size}, or {flush_s:g} s"] = {
            name: value for name, value in told.items() if name.startswith("OTEL_")
        }
    kinds["OpenTelemetry's 512, or 5 s"] = {}
    here, there = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("fork").Process(
        target=receive, args=(there,), daemon=True
    )
    receiver.start()
    endpoint = f"http://127.0.0.1:{here.recv()}"
    runs = [
        {kind: cost_us(endpoint, batching) for kind, batching in kinds.items()}
        for _ in range(RUNS + 1)
    ][1:]
    receiver.kill()
    receiver.join()
    print(
        f"{'a batch':30}{'a node':>10}" + "".join(f"{f'of {each:g} ms':>14}" for each in NODES_MS)
    )
    for kind in kinds:
        us = median(each[kind] for each in runs)
        print(f"{kind:30}{us:7.0f} us" + "".join(f"{us / 10 / each:12.2f} %" for each in NODES_MS))


if __name__ == "__main__":
    main()
