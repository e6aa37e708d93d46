"""Make one partial of many: a chord's body compacts its own split, the root merge makes the answer.

Merging is compaction: adjacent partials that tile a range become one, if they are still there.  A
body that comes early, late, twice or never costs time and nothing else.  Refuses to know how
partials came about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from rlm_tasks.jobs import codec
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.operations.registry import Operation

logger = logging.getLogger(__name__)


class Uncovered(Exception):
    """Partials that overlap or leave a range out: the ledger contradicts itself."""


def partials(ledger: Ledger, job: str, lo: int, hi: int) -> Iterator[Any]:
    """Yield the partials of a range in item order; ranges without a successful item have none."""
    at = lo
    for start, end, packed in ledger.pieces(job, lo, hi):
        if start < at:
            raise Uncovered(f"partial [{start}, {end}) overlaps what ends at {at}")
        at = end
        if packed:
            yield codec.unpack(packed)


def flattened(pages: Iterator[list[Any]]) -> Iterator[Any]:
    """Yield the outputs of a job without a merge, page by page."""
    for page in pages:
        yield from page


def compact_split(ledger: Ledger, job: str, operation: Operation, lo: int, hi: int) -> bool:
    """Replace the partials of [lo, hi) by one when they tile it; say whether they did."""
    pieces = list(ledger.pieces(job, lo, hi))
    edges = [lo] + [end for _, end, _ in pieces]
    if len(pieces) < 2 or edges[-1] != hi or [start for start, _, _ in pieces] != edges[:-1]:
        return False
    values = [codec.unpack(packed) for _, _, packed in pieces if packed]
    merged = codec.pack(operation.combine(values)) if values else b""
    return ledger.compact(job, [(start, end) for start, end, _ in pieces], merged)


def merged(ledger: Ledger, spec: JobSpec, operation: Operation) -> Any:
    """Return what the partials of a job come to: its merged and shaped partial, or, without a
    merge, its outputs one by one.
    """
    found = partials(ledger, spec.job, 0, spec.n)
    if operation.merge is not None:
        first = next(found, None)
        return operation.shaped(
            _of_nothing(operation) if first is None else operation.merge(_chained(first, found))
        )
    outputs = flattened(found)
    return outputs if operation.finalize is None else operation.finalize(list(outputs))


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _of_nothing(operation: Operation) -> Any:
    """Return the merge of no partials; an operation whose merge has no such value answers None."""
    try:
        return operation.combine(iter(()))
    except (ValueError, TypeError, IndexError, StopIteration):
        return None
