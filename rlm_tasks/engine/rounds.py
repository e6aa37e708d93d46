"""The rounds of a job: the answers of one round become the items of the next round.

Each round after the first is a job of its own.  The root merge of the first job leads them: it
calls `Rounds.advance`, which opens the next round, parks the merge, or returns the answer.  The id
of a round follows from the job's id, so a merge that runs again finds the open rounds.
`Operation.then` says what the next round is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.errors import RlmError
from rlm_tasks.engine.shared_page import Step, Steps
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.file_roots import FilesRoot
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.rounds import ROUND_FAILED, NextRound, Round
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import ItemWriter
from rlm_tasks.ledger.budgets import OPEN_S
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.partials import flattened, merged, partials
from rlm_tasks.ledger.records import MERGE, ROOT, Claim
from rlm_tasks.ledger.round_ids import expire_rounds, opened_rounds, round_id
from rlm_tasks.messaging.dispatch import Dispatcher, new_id
from rlm_tasks.operations import registry
from rlm_tasks.operations.context import copied
from rlm_tasks.results import Status

if TYPE_CHECKING:
    from rlm_tasks.ledger.budgets import JobBudgets
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.settings.model import Settings

logger = logging.getLogger(__name__)

CHECK_ROUND_MS = 5000
"""A parked merge checks its round after this, if the end of the round has not woken it."""


class RoundFailed(RlmError):
    """A round ended without an answer, and so does the job.

    Has the round's `job_id` and final `status`, and the status that its job `ends_as`.
    """

    code = ROUND_FAILED
    http_status = 500
    when = "The job of a round failed, expired or was cancelled."
    remedy = "Look at the failures of that round's job."

    def __init__(self, number: int, job_id: str, status: Status, why: str) -> None:
        self.job_id, self.status = job_id, status
        self.ends_as = Status.EXPIRED if status is Status.EXPIRED else Status.FAILED
        super().__init__(f"round {number}, job {job_id}, {status}{f': {why}' if why else ''}")


class Rounds:
    """The rounds of one process's jobs."""

    def __init__(
        self,
        ledger: Ledger,
        dispatcher: Dispatcher,
        settings: Settings,
        budgets: JobBudgets,
        wake: Callable[[Sequence[str]], int],
    ) -> None:
        """`wake` lets parked nodes run; it takes their names, `<job> <node>`."""
        self._ledger, self._dispatcher, self._settings = ledger, dispatcher, settings
        self._budgets, self._wake = budgets, wake

    def advance(
        self, claim: Claim, spec: JobSpec, operation: Operation, steps: Steps
    ) -> bytes | None:
        """Return the packed answer of a job, None when its merge now waits for a round.

        This process holds the merge by `claim`, and runs it in `steps`.  Raises RoundFailed.
        """
        assert operation.then is not None  # without it a job has no rounds
        rounds = opened_rounds(self._ledger, spec.job)
        if rounds and not Status(rounds[-1][1]["state"]).final:
            self._wait(claim, len(rounds), rounds[-1][0])
            return None
        self._budgets.end_round(spec, len(rounds))
        facts = self._ledger.facts(spec.job)
        answer = operation.then(self._outputs(spec, operation, rounds), _ended(spec, facts, rounds))
        if not isinstance(answer, NextRound):
            return codec.pack(answer)
        if not self._ledger.holds(claim):
            # Redis has lost its latest writes: the outputs that `then` received may lack some.
            return None
        number = len(rounds) + 1
        id = self._open(
            spec=spec,
            number=number,
            next_round=answer,
            deadline_ms=int(facts["deadline"]),
            steps=steps,
        )
        self._wait(claim, number, id)
        return None

    def continue_parent(self, spec: JobSpec) -> None:
        """Wake the merge of the job whose round has ended; a job that is no round does nothing."""
        if spec.parent:
            self._wake([f"{spec.parent} {MERGE}"])

    def end(self, spec: JobSpec) -> None:
        """Let the rounds of a job that has ended live as long as its own result."""
        expire_rounds(self._ledger, spec.job, self._settings.result_ttl_s)

    def _wait(self, claim: Claim, number: int, id: str) -> None:
        """Park the merge until its round ends."""
        self._ledger.park(claim, CHECK_ROUND_MS, f"its round {number} is at work: job {id}")
        if Status(self._ledger.facts(claim.job)["state"]).final:
            # The job ended before it knew of this round, so its end has not stopped the round.
            self._ledger.stop(id, "cancelled", by=f"the end of its job {claim.job}")
        elif Status(self._ledger.facts(id)["state"]).final:
            self._wake([f"{claim.job} {MERGE}"])  # the round ended before the merge was parked

    def _outputs(
        self, spec: JobSpec, operation: Operation, rounds: Sequence[tuple[str, dict[str, str]]]
    ) -> Any:
        """Return the last round's merged partial, or without a merge its outputs in item order.

        Raises RoundFailed.
        """
        if not rounds:
            return merged(self._ledger, spec, operation)
        id, facts = rounds[-1]
        if (status := Status(facts["state"])) is not Status.SUCCEEDED:
            error = msgspec.json.decode(facts["error"]) if facts.get("error") else {}
            raise RoundFailed(
                len(rounds), id, status, error.get("message", "") or self._first_failure(id)
            )
        packed = self._ledger.answer(id)
        return (
            codec.unpack(packed)
            if packed is not None
            else flattened(partials(self._ledger, id, 0, int(facts["n"])))
        )

    def _first_failure(self, id: str) -> str:
        failures = self._ledger.failures(id)
        return f"item {failures[0].index}: {failures[0].message}" if failures else ""

    def _open(
        self, spec: JobSpec, number: int, next_round: NextRound, deadline_ms: int, steps: Steps
    ) -> str:
        """Open a round and return its id; a second call finds the round open."""
        id, token, settings = round_id(spec.job, number), new_id(), self._settings
        self._budgets.begin_round(spec, number, last=next_round.last)
        index, blocks = self._ledger.keys.staged(id, token)
        writer = ItemWriter(
            self._ledger.store,
            index,
            blocks,
            max_item_bytes=settings.max_item_bytes,
            root=FilesRoot(settings.files_root),
        )
        with steps.run(Step.THEN):  # its items may be a generator
            source, n = source_of(next_round.items).write(writer)
        operation = registry.get(next_round.operation)
        self._ledger.note_rounds(spec.job, number)
        now_ms = self._ledger.call(lambda _: self._ledger.store.now_ms()) if deadline_ms else 0
        left_ms = max(1.0, deadline_ms - now_ms) if deadline_ms else None
        child = msgspec.structs.replace(
            _child_spec(spec, number, next_round, operation),
            job=id,
            source=source,
            n=n,
            timeout_ms=left_ms,
        )
        # A round is read until its job has ended, and then lives as long as that.
        [is_new] = self._ledger.open([(child, token)], max(OPEN_S, settings.result_ttl_s))
        if is_new:
            logger.info(
                "Job %s goes on with round %d: %s items of %s in job %s",
                spec.job,
                number,
                f"{n:,}",
                operation.name,
                id,
            )
            self._dispatcher.send_root([child], ROOT)
        return id


def _child_spec(spec: JobSpec, number: int, next_round: NextRound, operation: Operation) -> JobSpec:
    """Return the spec of a round as far as its job and `NextRound` fix it."""
    return msgspec.structs.replace(
        spec,
        operation=operation.name,
        version=operation.version,
        params=next_round.params,
        shape=Shape("flat", min_chunk=spec.shape.min_chunk, target_ms=spec.shape.target_ms),
        kind="recursive",
        parent=spec.job,
        round=number,
        skip_if_empty=False,
        validate=False,
        early_termination_threshold=None,
        idempotency_key="",
        patient=False,
        queue_timeout_ms=None,
        emits={},
        continue_on_error=spec.continue_on_error and not next_round.strict,
        error_threshold=None if next_round.strict else spec.error_threshold,
    )


def _ended(
    spec: JobSpec, facts: dict[str, str], rounds: Sequence[tuple[str, dict[str, str]]]
) -> Round:
    """Return the round that ended, as `Operation.then` receives it."""
    all_facts = [facts, *(each for _, each in rounds if each)]
    last = all_facts[-1]
    return Round(
        number=len(rounds),
        params=copied(spec.params),
        total=int(last["n"]),
        done=int(last["done"]),
        stopped=last.get("stop", ""),
        short=any(int(each["done"]) < int(each["n"]) for each in all_facts),
    )
