"""The root merge: it makes the answer of a job and closes the job.

`node` calls `merge_root` when FINISH gives the merge to its process, or when a lost merge runs
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from resilience.errors import StoreUnavailable, count, is_a, name_of
from rlm_tasks.engine.crashpoints import CrashPoint, no_hook
from rlm_tasks.engine.node_events import NodeEvents
from rlm_tasks.engine.rounds import RoundFailed, Rounds
from rlm_tasks.engine.shared_page import Steps
from rlm_tasks.errors import Quarantined
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.item_failures import failure_of, raise_if_shutdown
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.output_limit import OutputLimit
from rlm_tasks.ledger.partials import merged
from rlm_tasks.ledger.records import Claim
from rlm_tasks.metrics import emission
from rlm_tasks.operations.registry import Operation
from rlm_tasks.results import Status

logger = logging.getLogger(__name__)


def merge_root(
    ledger: Ledger,
    claim: Claim,
    spec: JobSpec,
    operation: Operation,
    steps: Steps,
    rounds: Rounds,
    limit: OutputLimit,
    node_events: NodeEvents,
    reached: Callable[[CrashPoint], None] = no_hook,
) -> str:
    """Make the answer of a job in `steps` and close it; return its final state.

    Return '' when another process holds the merge, or when a round has to end first.
    """
    has_rounds = operation.then is not None and not spec.parent

    def end(status: Status, answer: bytes = b"", error: Mapping[str, Any] | None = None) -> str:
        closed = ledger.close(spec.job, claim.token, status, answer, error)
        rounds.continue_parent(spec)
        if closed.state and has_rounds:
            rounds.end(spec)
        node_events.of_job(spec, closed)
        return closed.state

    reached(CrashPoint.DURING_MERGE)  # outside of the try: a death is no error of the merge
    try:
        if claim.losses >= ledger.settings.death_limit:
            raise Quarantined("the merge", claim.losses, claim.lost_by)
        if has_rounds:
            answer = rounds.advance(claim, spec, steps.marked(operation), steps)
        else:
            answer = _answer(ledger, spec, steps.marked(operation))
        if answer is None:
            return ""
        limit.checked(answer, "the answer of the job")
    except MemoryError:
        raise  # a later attempt may have memory
    except BaseException as error:
        raise_if_shutdown(error)
        # A later attempt may have Redis; another server is a matter of the user's functions.
        if is_a(error, StoreUnavailable) and error.url == ledger.store.url:
            raise
        logger.warning("The merge of job %s raised %s", spec.job, name_of(error))
        status = error.ends_as if is_a(error, RoundFailed) else Status.FAILED
        return end(status, error=failure_of(-1, error))
    reached(CrashPoint.BEFORE_CLOSE)
    ended = end(Status.SUCCEEDED, answer)
    if ended:
        logger.info("Job ended as %s: %s of %s", ended, count(spec.n, "item"), operation.name)
    if ended == Status.SUCCEEDED:
        emission.emit(spec.emits)
    return ended


def _answer(ledger: Ledger, spec: JobSpec, operation: Operation) -> bytes:
    """Return the packed answer, b"" when the outputs stay in the ledger as pages."""
    if operation.merge is None and operation.finalize is None:
        return b""
    return codec.pack(merged(ledger, spec, operation))
