"""Measure the cost of tracing a node, in processor time, by the number of spans in a batch.

``python -m tests.bench.telemetry`` prints a table.  One process begins and ends a span, hands it
over, takes it and exports it.  In a worker, a pool process and the main process share this work.
The collector is a separate process.  A share is the part of a node's own time.  Whole jobs cannot
show this cost: two runs of one job differ by ten times as much.  Nothing asserts."""

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
"""Attributes: the same number as on the span of a node."""
NODES_MS = (1000.0, 50.0, 10.0)
"""Node times: the default target, one slice, and a node that is too small."""


def receive(port_pipe: Connection) -> None:
    """Run the collector until killed; send its port through the pipe first."""
    with collector() as own:
        port_pipe.send(own.server_port)
        while True:
            time.sleep(3600)


def cost_us(endpoint: str, batching: dict[str, str]) -> float:
    """Return the processor time of a span in microseconds, from its begin to its export."""
    with mock.patch.dict(os.environ, batching):
        export = Export([OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")])
        spans, began = Spans([HandOver(export.sender)]), time.process_time()
        export.start()
        for at in range(1, SPANS + 1):
            span = spans.start("node bench", Ids(at, at, 0, True), time.time_ns(), ABOUT)
            assert span is not None
            span.end()
        export.sender.setblocking(True)
        export.sender.send(b"")  # as `stop` does, without its bound on the wait
        export.join()
    return 1e6 * (time.process_time() - began) / SPANS


def main() -> None:
    """Run all batch sizes in turn, so that other load on the machine affects all of them alike."""
    kinds = {"every span by itself": {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}}
    for size, flush_s in ((5, 10.0), (10, 30.0), (50, 60.0)):
        environment = OptimizationConfig(
            telemetry_batch_size=size, telemetry_flush_interval_seconds=flush_s
        ).as_environment()
        kinds[f"{size}, or {flush_s:g} s"] = {
            name: value for name, value in environment.items() if name.startswith("OTEL_")
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
