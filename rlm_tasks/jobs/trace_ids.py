"""The ids of a job's trace and spans, computed from the job's id so that none must be stored.

Submission, workers' spans and `Job.trace_id` call it.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from typing import NamedTuple

from rlm_tasks.jobs.spec import JobSpec

RANDOM = 2**56
"""The lower 7 bytes of a trace id are random, as W3C Trace Context asks; so are those of a UUID."""


class Origin(NamedTuple):
    """The trace and the parent span of a job's spans; parent 0 means none."""

    trace: int
    parent: int
    sampled: bool


def origin(spec: JobSpec, sample_rate: float) -> Origin:
    """Return the trace that a job was submitted under, or else a trace of its own."""
    if spec.trace:
        _, trace, parent, flags = spec.trace.split("-")
        return Origin(int(trace, 16), int(parent, 16), bool(int(flags, 16) & 1))
    trace_id = uuid.UUID(spec.job).int
    return Origin(trace_id, 0, trace_id % RANDOM >= round((1 - sample_rate) * RANDOM))


def span_id(job: str, *node: object) -> int:
    """Return the id of the span of a job, of a node, or of a lost attempt (node and epoch)."""
    text = " ".join(map(str, (job, *node)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1


def traceparent(trace: int, parent: int, sampled: bool) -> str:
    """Return a trace as a `traceparent` of W3C Trace Context."""
    return f"00-{trace:032x}-{parent:016x}-{int(sampled):02x}"


def current_traceparent() -> str:
    """Return the current trace of this thread; '' without one, or without OpenTelemetry."""
    if (trace := sys.modules.get("opentelemetry.trace")) is None:
        return ""
    current = trace.get_current_span().get_span_context()
    return (
        traceparent(current.trace_id, current.span_id, current.trace_flags.sampled)
        if current.is_valid
        else ""
    )


def trace_id_of(spec: JobSpec) -> str:
    """Return the id of a job's trace as 32 hex digits."""
    return f"{origin(spec, 0).trace:032x}"
