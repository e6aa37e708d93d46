"""Traces of real workers at a collector: they are complete, even when a process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from rlm_tasks import Binary, Client, Job, JobFailed, Status
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.integration.traced_app import Collector, Received, collector
from tests.support import wait_until

OPERATIONS = "tests.integration.ops,tests.integration.traced_app"
PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
LATER = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
"""With this delay no span is exported before the worker stops."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Collector]:
    with collector() as own:
        yield own


@pytest.fixture(scope="module")
def traced(server: embedded.Server, logs: Path, receiver: Collector) -> Iterator[Client]:
    """A client of a worker that traces all jobs."""
    environment = environment_of(
        server.url, "traced", RLM_OPERATIONS=OPERATIONS, **receiver.environment
    )
    with client_of(environment) as client, embedded.worker(environment, log=logs / "traced.log"):
        yield client


def whole_trace(receiver: Collector, job: Job) -> dict[str, Received]:
    """Wait until a job's trace is complete, and return its spans by id.

    Assert that each span and its parent are there exactly once."""
    nodes = {node.id for node in job.tree() if node.state in ("done", "cut")}
    wait_until(lambda: any(each.name.startswith("job ") for each in receiver.of(job.trace_id)))
    wait_until(
        lambda: nodes <= {each.about.get("rlm.node_id") for each in receiver.of(job.trace_id)}
    )
    found = receiver.of(job.trace_id)
    spans = {each.id: each for each in found}
    assert len(spans) == len(found)
    assert {each.name for each in found if each.parent and each.parent not in spans} == set()
    return spans


def of_nodes(spans: dict[str, Received]) -> dict[str, Received]:
    return {
        each.about["rlm.node_id"]: each for each in spans.values() if "rlm.node_id" in each.about
    }


@pytest.mark.parametrize("operation", ["with_span", "with_span_async"])
def test_a_job_is_one_trace_across_its_splits(
    traced: Client, receiver: Collector, operation: str
) -> None:
    job = traced.submit(
        operation=operation, items=list(range(80)), strategy=Binary(min_chunk_size=10)
    )
    assert job.result(timeout=30).output == sum(range(80))

    spans = whole_trace(receiver, job)

    nodes, tree = of_nodes(spans), {node.id: node for node in job.tree()}
    assert set(nodes) == set(tree)
    [of_job] = [each for each in spans.values() if each.name == f"job {operation}"]
    assert (of_job.parent, of_job.failed, of_job.service) == ("", False, "rlm-tasks")
    assert (of_job.about["rlm.state"], of_job.about["rlm.done"]) == ("succeeded", 80)
    for id, span in nodes.items():
        assert span.parent == (nodes[tree[id].parent].id if tree[id].parent else of_job.id)
        assert span.about["rlm.job_id"] == job.id
        assert (span.about["rlm.depth"], span.about["rlm.parent_id"]) == (
            tree[id].depth,
            tree[id].parent,
        )
    theirs = Counter(each.parent for each in spans.values() if each.name == "inner")
    assert theirs == Counter(
        {span.id: span.about["rlm.done"] for span in nodes.values() if span.about.get("rlm.done")}
    )
    if operation == "with_span":
        assert any("last_item" in each.about for each in nodes.values())


def test_finished_nodes_of_a_killed_process_are_in_the_trace(
    traced: Client, receiver: Collector, tmp_path: Path
) -> None:
    items: list[dict[str, Any]] = [{"i": i} for i in range(60)]
    items[33]["marker"] = str(tmp_path / "died")

    job = traced.submit(operation="die_with_span", items=items, strategy=Binary(min_chunk_size=5))

    assert job.result(timeout=30).output == 60
    nodes = of_nodes(whole_trace(receiver, job))
    finished = {node.id: node.attempts for node in job.tree() if node.state in ("done", "cut")}
    assert set(finished) == set(nodes)
    assert {id: span.about["rlm.attempt"] for id, span in nodes.items()} == finished
    assert max(finished.values()) == 2


def test_an_incoming_trace_is_continued(traced: Client, receiver: Collector) -> None:
    continued = traced.submit(
        operation="with_span",
        items=[1],
        trace_context={"traceId": PARENT[0], "parentSpanId": PARENT[1]},
    )
    not_sampled = traced.submit(
        operation="with_span", items=[1], trace_context=f"00-{'5' * 32}-{PARENT[1]}-00"
    )
    within = SpanContext(int("6" * 32, 16), 7, is_remote=False, trace_flags=TraceFlags(1))
    with trace.use_span(NonRecordingSpan(within)):
        here = traced.submit(operation="with_span", items=[1])
    for job in (continued, not_sampled, here):
        job.result(timeout=30)

    assert [continued.trace_id, here.trace_id] == [PARENT[0], "6" * 32]
    for trace_id, parent in ((continued.trace_id, PARENT[1]), (here.trace_id, f"{7:016x}")):
        wait_until(lambda trace_id=trace_id: len(receiver.of(trace_id)) >= 4)  # type: ignore[misc]
        [job_span] = [each for each in receiver.of(trace_id) if each.name == "job with_span"]
        assert job_span.parent == parent
    assert receiver.of(not_sampled.trace_id) == []


def test_the_trace_of_a_failed_job_has_the_error_type_but_no_user_data(
    traced: Client, receiver: Collector
) -> None:
    job = traced.submit(operation="fail_odd", items=[2, 7_654_321], params={"key": "hush"})
    with pytest.raises(JobFailed):
        job.result(timeout=30)

    spans = whole_trace(receiver, job)

    assert {each.name: each.failed for each in spans.values()} == {
        "job fail_odd": True,
        "node fail_odd": True,
    }
    assert "ValueError" in {each.about.get("error.type") for each in spans.values()}
    assert not [each for each in spans.values() if "7654321" in str(each) or "hush" in str(each)]


def test_a_worker_exports_the_span_of_a_cancelled_job(traced: Client, receiver: Collector) -> None:
    job = traced.submit(operation="nap", items=[300.0] * 40, type="parallel", chunk_size=1)
    wait_until(lambda: job.progress().done > 0)

    job.cancel()
    assert job.wait(timeout=20) is Status.CANCELLED

    spans = whole_trace(receiver, job)
    [of_job] = [each for each in spans.values() if each.name == "job nap"]
    assert (of_job.about["rlm.state"], of_job.failed) == ("cancelled", False)


def test_a_stopping_worker_exports_the_spans_of_sampled_jobs_only(
    server: embedded.Server, logs: Path
) -> None:
    with collector() as receiver:
        variables = {**receiver.environment, **LATER, "RLM_TRACING__SAMPLE_RATE": "0"}
        environment = environment_of(
            server.url, "traced-stopped", RLM_OPERATIONS=OPERATIONS, **variables
        )
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=logs / "traced-stopped.log") as worker,
        ):
            not_sampled = client.submit(
                operation="with_span", items=list(range(40)), strategy=Binary(min_chunk_size=10)
            )
            assert not_sampled.result(timeout=30).output == sum(range(40))
            job = client.submit(
                operation="with_span",
                items=list(range(40)),
                strategy=Binary(min_chunk_size=10),
                trace_context=f"00-{'7' * 32}-{PARENT[1]}-01",
            )
            assert job.result(timeout=30).output == sum(range(40))
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=20)
            tree = {node.id for node in job.tree()}

        assert {each.trace for each in receiver.spans} == {"7" * 32}
        spans = {each.id: each for each in receiver.spans}
        assert set(of_nodes(spans)) == tree
        roots = {each.name for each in spans.values() if each.parent not in spans}
        assert roots == {"job with_span"}


def test_a_users_own_tracer_provider_is_used(server: embedded.Server, logs: Path) -> None:
    with collector() as receiver:
        environment = environment_of(
            server.url,
            "traced-own",
            RLM_OPERATIONS=OPERATIONS,
            OWN_PROVIDER="1",
            **receiver.environment,
        )
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=logs / "traced-own.log"),
        ):
            job = client.submit(
                operation="with_span", items=list(range(40)), strategy=Binary(min_chunk_size=10)
            )
            assert job.result(timeout=30).output == sum(range(40))
            spans = whole_trace(receiver, job)

    assert {each.service for each in spans.values()} == {"their service"}


def test_a_worker_that_cannot_trace_names_the_missing_package(
    server: embedded.Server, tmp_path: Path
) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text(
        "raise ModuleNotFoundError('not here', name='opentelemetry')"
    )
    environment = environment_of(server.url, "traced-without", RLM_TRACING__ENABLED="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])

    command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "worker", "-P", "solo"]
    ran = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ran.returncode != 0
    assert "pip install 'rlm-tasks[otel]'" in ran.stderr
    assert "Traceback" not in ran.stderr
