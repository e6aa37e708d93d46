"""The ids of a job's trace and spans."""

from __future__ import annotations

import hashlib
import sys
import uuid
from typing import NamedTuple

from rlm_tasks.jobs.spec import JobSpec

RANDOM = 2**56
"""W3C Trace Context calls the lower 7 bytes of a trace id random; those of a job's UUID are."""


class Origin(NamedTuple):
    """What a job's spans have in common; a parent of 0 is none."""

    trace: int
    parent: int
    sampled: bool


def origin(spec: JobSpec, sample_rate: float) -> Origin:
    """Return the trace that a job was submitted under, or its own."""
    if spec.trace:
        _, trace, parent, flags = spec.trace.split("-")
        return Origin(int(trace, 16), int(parent, 16), bool(int(flags, 16) & 1))
    trace_id = uuid.UUID(spec.job).int
    return Origin(trace_id, 0, trace_id % RANDOM >= round((1 - sample_rate) * RANDOM))


def span_id(job: str, *place: object) -> int:
    """Return the id of a job's span, a node's (job, node), or that of an attempt that came to
    nothing (job, node, epoch).
    """
    told = " ".join(map(str, (job, *place)))
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest()) or 1


def traceparent(trace: int, parent: int, sampled: bool) -> str:
    """Return a trace as W3C Trace Context writes it."""
    return f"00-{trace:032x}-{parent:016x}-{int(sampled):02x}"


def current_traceparent() -> str:
    """Return the trace that this thread is in, '' where there is none or OpenTelemetry is not even
    loaded.
    """
    if (trace := sys.modules.get("opentelemetry.trace")) is None:
        return ""
    current = trace.get_current_span().get_span_context()
    return (
        traceparent(current.trace_id, current.span_id, current.trace_flags.sampled)
        if current.is_valid
        else ""
    )


def trace_id_of(spec: JobSpec) -> str:
    """Return by which id a job's trace is found, as 32 hex digits."""
    return f"{origin(spec, 0).trace:032x}"
