"""Merge partials: the body of a chord compacts its split, the root merge makes the answer.

The engine's merge tasks, rounds and the closing of jobs call it, and clients for partial answers.
Adjacent partials that tile a range become one, if all are still there.  So a body that comes early,
late, twice or never costs only time.  Begin with `compact_split`, then `merged`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from rlm_tasks.jobs import codec
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.output_limit import OutputLimit
from rlm_tasks.ledger.reader import reading
from rlm_tasks.operations.registry import Operation

logger = logging.getLogger(__name__)

COMPACT_AT_ONCE = 2000
"""Most partials that one script replaces; more are merged in groups."""


class Uncovered(Exception):
    """Two stored partials overlap, so the ledger contradicts itself."""


def partials(
    ledger: Ledger, job: str, lo: int, hi: int, *, measure: Callable[[int], None] | None = None
) -> Iterator[Any]:
    """Yield the partials of a range in item order; ranges without a successful item have none.

    `measure` gets the bytes of each partial before it is unpacked, and may raise.  Raises
    Uncovered, JobUnreadable, StoreUnavailable.
    """
    at = lo
    for start, end, packed in ledger.pieces(job, lo, hi):
        if start < at:
            raise Uncovered(
                f"partial [{start}, {end}) of job {job} overlaps the one before, which ends at {at}"
            )
        at = end
        if packed:
            if measure is not None:
                measure(codec.unpacked_bytes(packed))
            with reading(job, "a partial answer"):
                value = codec.unpack(packed)
            yield value


def flattened(pages: Iterator[list[Any]]) -> Iterator[Any]:
    """Yield the outputs of a job without a merge, page by page."""
    for page in pages:
        yield from page


def compact_split(
    ledger: Ledger, job: str, operation: Operation, limit: OutputLimit, *, lo: int, hi: int
) -> bool:
    """Replace the partials of [lo, hi) by one if they tile it; return whether they did.

    Raises OutputTooLarge for a merge that cannot be stored.
    """
    pieces = list(ledger.pieces(job, lo, hi))
    edges = [lo] + [end for _, end, _ in pieces]
    if len(pieces) < 2 or edges[-1] != hi or [start for start, _, _ in pieces] != edges[:-1]:
        return False
    while len(pieces) > 1:
        merged = []
        for at in range(0, len(pieces), COMPACT_AT_ONCE):
            group = pieces[at : at + COMPACT_AT_ONCE]
            with reading(job, "a partial answer"):
                values = [codec.unpack(packed) for _, _, packed in group if packed]
            partial = codec.pack(operation.combine(values)) if values else b""
            limit.checked(partial, "the merged partial")
            if len(group) > 1 and not ledger.compact(job, [each[:2] for each in group], partial):
                return False
            merged.append((group[0][0], group[-1][1], partial))
        pieces = merged
    return True


def merged(ledger: Ledger, spec: JobSpec, operation: Operation) -> Any:
    """Return the answer of a job from its partials.

    It is the merged and shaped partial, or, without a merge, the outputs one by one.
    """
    found = partials(ledger, spec.job, 0, spec.n)
    if operation.merge is not None:
        first = next(found, None)
        if first is None:
            return _answer_of_nothing(operation)
        return operation.shaped(operation.merge(_chained(first, found)))
    outputs = flattened(found)
    return outputs if operation.finalize is None else operation.finalize(list(outputs))


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _answer_of_nothing(operation: Operation) -> Any:
    """Return the answer of a job without an output.

    It is None if the operation's merge cannot merge nothing; `finalize` does not get this None.
    """
    try:
        merged = operation.combine(iter(()))
    except Exception:
        return None
    return operation.shaped(merged)
