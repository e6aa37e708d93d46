"""Trace ids of jobs, and which jobs are sampled."""

from __future__ import annotations

import uuid
from random import Random
from typing import Any

import pytest

from rlm_tasks import JobRequest, Options
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.jobs.trace_ids import origin, trace_id_of


def request(items: Any, **fields: Any) -> JobRequest:
    return JobRequest(operation="unit_looking", items=items, **fields)


def spec_of(job: str, trace_context: Any = None) -> JobSpec:
    options = Options(trace_context=trace_context)
    shape = request([1]).shape(1000)
    context = options.trace_context.traceparent if options.trace_context else ""
    return specs.load(
        specs.dump(
            JobSpec(
                job=job,
                operation="sum",
                source=RangeSource(0, 1),
                n=1,
                shape=shape,
                queue="q",
                trace=context,
            )
        )
    )


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_jobs_is_sampled_and_every_process_agrees(rate: float) -> None:
    random = Random(1)
    drawn = [uuid.UUID(int=random.getrandbits(128), version=4) for _ in range(2000)]
    for names in (drawn, [uuid.uuid5(uuid.NAMESPACE_X500, str(each)) for each in drawn]):
        jobs = [spec_of(str(each)) for each in names]

        sampled = [origin(spec, rate).sampled for spec in jobs]

        assert abs(sum(sampled) / 2000 - rate) < (0.04 if rate % 1 else 1e-9)
        more = [origin(spec, min(1.0, rate + 0.2)).sampled for spec in jobs]
        assert all(now for before, now in zip(sampled, more, strict=True) if before)


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("context", "trace", "parent", "sampled"),
    [
        (PARENT, 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xF067AA0BA902B7, True),
        (PARENT[:-2] + "00", 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xF067AA0BA902B7, False),
        ({"traceId": "abc123", "parentSpanId": "5EA456"}, 0xABC123, 0x5EA456, True),
        ({"trace_id": "abc123", "sampled": False}, 0xABC123, 0, False),
    ],
)
def test_a_given_trace_context_is_continued_with_its_sampling(
    context: Any, trace: int, parent: int, sampled: bool
) -> None:
    spec = spec_of(str(uuid.uuid4()), context)

    assert origin(spec, 0.0) == origin(spec, 1.0) == (trace, parent, sampled)
    assert trace_id_of(spec) == f"{trace:032x}"


def test_a_spec_without_a_trace_has_no_trace_field() -> None:
    assert b"trace" not in specs.dump(spec_of(str(uuid.uuid4())))
