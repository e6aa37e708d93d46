"""A job may go on in rounds: what one round has answered becomes the items of the next, which is a
job of its own.

The merge of the first job leads them: it looks how far they are, opens the next or makes the
answer, and waits parked in between.  Ids of rounds follow from the job's, so a merge that is done
again finds what it has opened.  Decides when a round begins and what its end means for the job;
refuses to know what rounds are for (`Operation.then`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.errors import RlmError
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.rounds import NextRound, Round
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import ItemWriter
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.partials import flattened, merged, partials
from rlm_tasks.ledger.records import MERGE, ROOT, Claim
from rlm_tasks.ledger.round_ids import opened_rounds, round_id
from rlm_tasks.messaging.dispatch import Dispatcher, new_id
from rlm_tasks.operations import registry
from rlm_tasks.results import Status

if TYPE_CHECKING:
    from rlm_tasks.ledger.budgets import JobBudgets
    from rlm_tasks.operations.registry import Operation
    from rlm_tasks.settings.model import Settings

logger = logging.getLogger(__name__)

LOOK_AGAIN_MS = 5000
"""A job looks after its round this often, should nobody have called it."""


class RoundFailed(RlmError):
    """A round ended without its answer, and so does the job.  Has the round's `job_id` and final
    `status`.
    """

    code = "ROUND_FAILED"

    def __init__(self, number: int, job_id: str, status: Status, why: str) -> None:
        self.job_id, self.status = job_id, status
        self.ends_as = (
            Status.EXPIRED if status is Status.EXPIRED else Status.FAILED
        )  # what its job ends as
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
        self._ledger, self._dispatcher, self._settings, self._budgets, self._wake = (
            ledger,
            dispatcher,
            settings,
            budgets,
            wake,
        )

    def advance(self, claim: Claim, spec: JobSpec, operation: Operation) -> bytes | None:
        """Return the packed answer of a job whose merge is held here, or None when it waits for a
        round.  Raises RoundFailed.
        """
        assert operation.then is not None  # it is what makes a job go in rounds
        rounds = opened_rounds(self._ledger, spec.job)
        if rounds and not Status(rounds[-1][1]["state"]).final:
            self._wait(claim, len(rounds), rounds[-1][0])
            return None
        self._budgets.end_round(spec, len(rounds))
        facts = self._ledger.facts(spec.job)
        answer = operation.then(self._outputs(spec, operation, rounds), _ended(spec, facts, rounds))
        if not isinstance(answer, NextRound):
            return codec.pack(answer)
        number = len(rounds) + 1
        self._wait(claim, number, self._open(spec, number, answer, int(facts["deadline"])))
        return None

    def call(self, spec: JobSpec) -> None:
        """Let the job of a round that has ended go on."""
        if spec.parent:
            self._wake([f"{spec.parent} {MERGE}"])

    def _wait(self, claim: Claim, number: int, id: str) -> None:
        self._ledger.park(claim, LOOK_AGAIN_MS, f"its round {number} is at work: job {id}")
        if Status(self._ledger.facts(claim.job)["state"]).final:
            self._ledger.stop(
                id, "cancelled"
            )  # the job has ended meanwhile, and knew of no such round
        elif Status(self._ledger.facts(id)["state"]).final:
            self._wake([f"{claim.job} {MERGE}"])  # it ended before the merge lay down

    def _outputs(
        self, spec: JobSpec, operation: Operation, rounds: Sequence[tuple[str, dict[str, str]]]
    ) -> Any:
        """Return what the last round has answered: its merged partial, or its outputs in item
        order, one by one.
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

    def _open(self, spec: JobSpec, number: int, asked: NextRound, deadline_ms: int) -> str:
        """Open a round, once: whoever does it again finds it open."""
        id, token, settings = round_id(spec.job, number), new_id(), self._settings
        self._budgets.begin_round(spec, number, last=asked.last)
        index, blocks = self._ledger.keys.staged(id, token)
        writer = ItemWriter(
            self._ledger.store,
            index,
            blocks,
            ttl_s=settings.result_ttl_s,
            max_item_bytes=settings.max_item_bytes,
        )
        source, n = self._ledger.store.call(lambda _: source_of(asked.items).write(writer))
        operation = registry.get(asked.operation)
        self._ledger.note_rounds(spec.job, number)
        child = msgspec.structs.replace(
            spec,
            job=id,
            operation=operation.name,
            version=operation.version,
            source=source,
            n=n,
            params=asked.params,
            shape=Shape("flat", min_chunk=spec.shape.min_chunk, target_ms=spec.shape.target_ms),
            kind="recursive",
            parent=spec.job,
            round=number,
            skip_if_empty=False,
            validate=False,
            early_termination_threshold=None,
            idempotency_key="",
            patient=False,
            emits={},
            continue_on_error=spec.continue_on_error and not asked.strict,
            error_threshold=None if asked.strict else spec.error_threshold,
            timeout_ms=max(1.0, deadline_ms - self._ledger.store.now_ms()) if deadline_ms else None,
        )
        [is_new] = self._ledger.open([(child, token)], settings.result_ttl_s)
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


def _ended(
    spec: JobSpec, facts: dict[str, str], rounds: Sequence[tuple[str, dict[str, str]]]
) -> Round:
    all_facts = [facts, *(told for _, told in rounds if told)]
    last = all_facts[-1]
    return Round(
        number=len(rounds),
        params=spec.params,
        total=int(last["n"]),
        done=int(last["done"]),
        stopped=last.get("stop", ""),
        short=any(int(each["done"]) < int(each["n"]) for each in all_facts),
    )
