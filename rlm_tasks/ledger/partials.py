"""Make one partial of many: a chord's body compacts its own split, the root merge makes the answer.

Merging is compaction: adjacent partials that tile a range become one, if they are still there.  A body that
comes early, late, twice or never costs time and nothing else.  Refuses to know how partials came about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from resilience.errors import StoreUnavailable
from rlm_tasks.engine.crashpoints import CrashPoint, nobody_listens
from rlm_tasks.errors import Quarantined
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.jobs.spec import Spec
from rlm_tasks.ledger.ledger import Claim, Ledger
from rlm_tasks.metrics import declared as metrics
from rlm_tasks.operations.registry import Operation
from rlm_tasks.results import Status

if TYPE_CHECKING:
    from rlm_tasks.engine.rounds import Rounds

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


def merge_root(
    ledger: Ledger,
    claim: Claim,
    spec: Spec,
    operation: Operation,
    rounds: Rounds,
    reached: Callable[[CrashPoint], None] = nobody_listens,
) -> str:
    """Make the answer of a job and close it; return its final state, '' when another process holds the merge, or a round
    has to end first.
    """
    try:
        if claim.losses >= ledger.settings.death_limit:
            raise Quarantined("the merge", claim.losses, claim.lost_by)
        reached(CrashPoint.DURING_MERGE)
        answer = (
            _answer(ledger, spec, operation) if operation.then is None or spec.parent else rounds.advance(claim, spec, operation)
        )
        if answer is None:
            return ""
    except (MemoryError, StoreUnavailable):
        raise  # another process, or another hour, may have more; a third loss fails the job
    except Exception as error:
        logger.warning("The merge of job %s raised %s", spec.job, type(error).__name__)
        ended = ledger.close(spec.job, claim.token, getattr(error, "ends_as", Status.FAILED), error=failure_of(-1, error))
        rounds.call(spec)
        return ended
    reached(CrashPoint.BEFORE_CLOSE)
    ended = ledger.close(spec.job, claim.token, Status.SUCCEEDED, answer)
    rounds.call(spec)
    if ended:
        logger.info("Job ended as %s: %s items of %s", ended, f"{spec.n:,}", operation.name)
    if ended == Status.SUCCEEDED:
        metrics.emit(spec.emits)
    return ended


def _answer(ledger: Ledger, spec: Spec, operation: Operation) -> bytes:
    """Return the packed answer, or nothing when the outputs stay where they are, as pages."""
    if operation.merge is None and operation.finalize is None:
        return b""
    return codec.pack(merged(ledger, spec, operation))


def merged(ledger: Ledger, spec: Spec, operation: Operation) -> Any:
    """Return what the partials of a job come to: its merged and shaped partial, or, without a merge, its outputs one by one."""
    found = partials(ledger, spec.job, 0, spec.n)
    if operation.merge is not None:
        first = next(found, None)
        return operation.shaped(_of_nothing(operation) if first is None else operation.merge(_chained(first, found)))
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
