"""The export of spans from pool processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rlm_tasks.telemetry.spans import Export, HandOver, packed, unpacked
from tests.unit.telemetry.test_tracing import request, sent, traced

__all__ = ["sent"]


def test_a_span_is_exported_whole(sent: InMemorySpanExporter) -> None:
    platform = traced()
    platform.run(platform.submit(request([1, -2])))

    for span in sent.get_finished_spans():
        assert unpacked(packed(span), span.resource).to_json() == span.to_json()


class Stuck(SpanExporter):
    """An exporter that waits for a collector that does not answer."""

    def __init__(self) -> None:
        self.asked, self.answered = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.answered.wait()
        return SpanExportResult.FAILURE


def test_a_collector_that_does_not_answer_delays_nothing(
    sent: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlm_tasks.telemetry.spans.FLUSH_S", 0.1)
    platform = traced()
    platform.run(platform.submit(request([1])))
    stuck = Stuck()
    export = Export([stuck])
    export.start()
    for span in sent.get_finished_spans():
        HandOver(export.sender).on_end(span)

    export.stop()

    assert stuck.asked.wait(10)
    assert export.is_alive(), "the worker does not wait for it"
    stuck.answered.set()
    export.join(20)


def test_lost_spans_are_logged_once(
    sent: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rlm_tasks.telemetry.spans.HAND_OVER_S", 0.001)
    platform = traced()
    platform.run(platform.submit(request([1])))
    export = Export([])  # as in a worker whose main process is stopped
    hand_over = HandOver(export.sender)

    for _ in range(1000):
        hand_over.on_end(sent.get_finished_spans()[0])

    assert caplog.text.count("A span is lost") == 1
    export.start()
    export.stop()
