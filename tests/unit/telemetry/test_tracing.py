"""The spans of a job and their ids, when messages are lost or doubled and processes die.

Spans contain no data of the user.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rlm_tasks import Binary, JobRequest, NWay, operation
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.trace_ids import span_id
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.telemetry.spans import Spans
from rlm_tasks.telemetry.tracing import TracedLedger, Tracing
from tests.unit.harness import Platform

_sent = InMemorySpanExporter()
_spans = Spans(
    [SimpleSpanProcessor(_sent)]
)  # one for each process, as in a worker: OpenTelemetry accepts one provider


@pytest.fixture
def sent() -> Iterator[InMemorySpanExporter]:
    _sent.clear()
    yield _sent
    _spans.leave()


class Died(BaseException):
    """The death of a process, in a test that has only one."""


def _concatenated(parts: Iterable[list[int]]) -> list[int]:
    return [item for part in parts for item in part]


@operation("unit_looking", merge=_concatenated)
def unit_looking(item: int) -> list[int]:
    """Work within a span of the user."""
    with trace.get_tracer("theirs").start_as_current_span("looking"):
        if item < 0:
            raise ValueError(f"the secret of item {item}")
        return [item]


def traced(seed: int = 0, sample_rate: float = 1.0) -> Platform:
    platform = Platform(seed)
    tracing = Tracing(_spans, sample_rate, lambda: "normal")
    platform.runtime.ledger = platform.ledger = TracedLedger(platform.ledger, tracing)
    return platform


def request(items: Any, **fields: Any) -> JobRequest:
    return JobRequest(operation="unit_looking", items=items, **fields)


def ids(spans: Iterable[ReadableSpan]) -> dict[int, ReadableSpan]:
    found = {each.context.span_id: each for each in spans if each.context}
    assert len(found) == len(list(spans)), "an id was used twice"
    return found


# --- one trace --------------------------------------------------------------------------------


def test_a_job_and_its_nodes_are_one_trace(sent: InMemorySpanExporter) -> None:
    platform = traced()

    spec = platform.submit(request(list(range(40)), strategy=Binary(min_chunk_size=5)))
    platform.run(spec)

    spans = ids(sent.get_finished_spans())
    assert {each.context.trace_id for each in spans.values() if each.context} == {
        uuid.UUID(spec.job).int
    }
    of_job = spans[span_id(spec.job)]
    assert (of_job.name, of_job.parent, of_job.status.is_ok) == ("job unit_looking", None, True)
    assert of_job.attributes is not None
    assert {
        "rlm.state": "succeeded",
        "rlm.done": 40,
        "rlm.items": 40,
    }.items() <= of_job.attributes.items()
    assert [event.name for event in of_job.events] == ["started"]
    for record in platform.ledger.all_records(spec.job):
        node = spans[span_id(spec.job, record.id)]
        assert node.parent is not None
        assert node.parent.span_id == span_id(spec.job, *record.parent.split())
        assert node.attributes is not None
        expected = {
            "job_id": spec.job,
            "node_id": record.id,
            "parent_id": record.parent,
            "depth": record.depth,
            "lo": record.lo,
        }
        assert {
            f"rlm.{name}": value for name, value in expected.items()
        }.items() <= node.attributes.items()
        assert node.start_time is not None
        assert node.end_time is not None
        assert node.start_time <= node.end_time
    theirs = [each for each in spans.values() if each.name == "looking"]
    assert len(theirs) == 40
    assert all(
        each.parent and spans[each.parent.span_id].name == "node unit_looking" for each in theirs
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_parent_span_is_missing_when_processes_die(
    sent: InMemorySpanExporter, seed: int
) -> None:
    """Processes die at every point and messages come twice; each finished span has its parent."""
    platform, random = traced(seed), Random(seed)
    platform.runtime.reached = lambda _: maybe_die(random)

    spec = platform.submit(
        request(list(range(30)), strategy=NWay(split_factor=3, min_chunk_size=2))
    )
    while (facts := platform.ledger.facts(spec.job))["state"] != "succeeded":
        run_until_death(platform, spec)
        recover(platform, spec)

    assert (facts["done"], platform.output(spec)) == ("30", list(range(30)))
    spans = ids(sent.get_finished_spans())
    finished = {span_id(spec.job, record.id) for record in platform.ledger.all_records(spec.job)}
    assert finished | {span_id(spec.job)} <= set(spans)
    assert [
        each.name for each in spans.values() if each.parent and each.parent.span_id not in spans
    ] == []
    attempts = [
        each.attributes["rlm.attempt"]
        for each in spans.values()
        if each.attributes and "rlm.attempt" in each.attributes
    ]
    assert len(attempts) >= len(finished)
    if seed == 0:
        assert max(attempts) > 1, "no process has died"


def maybe_die(random: Random) -> None:
    if random.random() < 0.1:
        raise Died


def run_until_death(platform: Platform, spec: JobSpec) -> None:
    try:
        platform.run(spec)
    except Died:
        _spans.leave()


def recover(platform: Platform, spec: JobSpec) -> None:
    """Release the nodes of dead processes and send waiting nodes, as the supervisor and the sweep
    do.
    """
    nodes = platform.store.client.hgetall(platform.keys.of(spec.job).nodes)
    for id, text in nodes.items():
        record = json.loads(text)
        if record["s"] == "r":
            platform.ledger.release(spec.job, id.decode(), record["k"], -1, "")
        if record["s"] in "rq":
            platform.mailbox.resend(spec, [id.decode()], merges=True)


def test_a_failed_attempt_has_its_own_span_beside_the_successful_one(
    sent: InMemorySpanExporter,
) -> None:
    platform = traced()
    spec = platform.submit(request([1, 2, 3]))
    first = platform.ledger.claim(spec.job, "root", "first", "w1")
    platform.ledger.park(first, 0, "the bucket is empty")
    platform.ledger.unpark(spec.job, "root")

    platform.run(spec)

    spans = ids(sent.get_finished_spans())
    attempt, node = spans[span_id(spec.job, "root", 1)], spans[span_id(spec.job, "root")]
    assert attempt.parent == node.parent
    assert attempt.attributes is not None
    assert node.attributes is not None
    assert (attempt.attributes["rlm.attempt"], attempt.attributes["rlm.reason"]) == (
        1,
        "the bucket is empty",
    )
    assert node.attributes["rlm.attempt"] == 2


def test_work_that_another_holder_finished_has_an_attempt_span(sent: InMemorySpanExporter) -> None:
    platform = traced()
    spec = platform.submit(request([1, 2, 3]))

    def given_away(point: CrashPoint) -> None:
        if point is CrashPoint.BEFORE_FINISH:
            platform.runtime.reached = lambda _: None
            [text] = platform.store.client.hvals(platform.keys.of(spec.job).nodes)
            guard = Ledger(platform.store, platform.keys, platform.settings.ledger)
            guard.release(spec.job, "root", json.loads(text)["k"], -1, "")
            platform.mailbox.send_root([spec], "root")

    platform.runtime.reached = given_away
    platform.run(spec)

    spans = sent.get_finished_spans()
    assert Counter(each.name for each in spans)["node unit_looking"] == 2
    assert {span_id(spec.job, "root"), span_id(spec.job, "root", 1)} <= set(ids(spans))


# --- failures, and data of the user -----------------------------------------------------------


def test_a_failure_has_its_type_and_code_and_no_data_of_the_user(
    sent: InMemorySpanExporter,
) -> None:
    platform = traced()

    spec = platform.submit(request([7_654_321, -1_234_567], params={"key": "hush-hush"}))
    platform.run(spec)

    spans = ids(sent.get_finished_spans())
    node, job = spans[span_id(spec.job, "root")], spans[span_id(spec.job)]
    assert node.attributes is not None
    assert job.attributes is not None
    assert (node.attributes["error.type"], node.attributes["rlm.failed"], node.status.is_ok) == (
        "ValueError",
        1,
        False,
    )
    assert (job.attributes["rlm.state"], job.attributes["rlm.code"], job.status.is_ok) == (
        "failed",
        "FAILED",
        False,
    )
    ours = [each.to_json() for each in spans.values() if each.name != "looking"]
    assert not [
        each
        for each in ours
        if "hush" in each or "1234567" in each or "7654321" in each or "secret" in each
    ]


@pytest.mark.parametrize("ended_by", ["a cancellation", "a sweep"])
def test_a_job_that_ends_while_it_waits_has_one_span(
    sent: InMemorySpanExporter, ended_by: str
) -> None:
    platform = traced()
    spec = platform.submit(request([1, 2]))

    if ended_by == "a sweep":
        Ledger(platform.store, platform.keys, platform.settings.ledger).stop(
            spec.job, "cancelled"
        )  # as a client does
        platform.ledger.sweep(spec.job)
    else:
        platform.ledger.stop(spec.job, "cancelled")
    platform.ledger.sweep(spec.job)
    platform.ledger.claim(spec.job, "root", "late", "w")

    [span] = sent.get_finished_spans()
    assert span.attributes is not None
    assert (span.name, span.attributes["rlm.state"], span.status.is_ok) == (
        "job unit_looking",
        "cancelled",
        True,
    )


# --- sampling ---------------------------------------------------------------------------------


def test_a_job_that_is_not_sampled_has_no_spans_of_the_user_either(
    sent: InMemorySpanExporter,
) -> None:
    platform = traced(sample_rate=0.0)

    platform.run(platform.submit(request([1, 2, 3])))

    assert sent.get_finished_spans() == ()


# --- imports ----------------------------------------------------------------------------------


def test_tracing_is_not_imported_when_it_is_off() -> None:
    """redis-py imports the metrics of OpenTelemetry wherever they are installed; we
    import nothing.
    """
    program = """if True:
        import sys, rlm_tasks.engine.node, rlm_tasks.client.client, rlm_tasks.worker.bootsteps
        loaded = {"rlm_tasks.telemetry.spans", "opentelemetry.exporter"} & set(sys.modules)
        sys.exit(bool(loaded))
    """

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
