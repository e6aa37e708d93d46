"""Read one job from the ledger: its progress, its tree, why it waits, and its failed items.

`Job` extends it.  It never reads a Celery result.  Begin with `JobReader.progress`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from resilience.errors import refuse_unless_count
from rlm_tasks.client.session import Session
from rlm_tasks.errors import InvalidRequest, JobNotFound, JobUnreadable, RlmError
from rlm_tasks.jobs.endings import CELERY_STATES, named_item, raised_words, sentence
from rlm_tasks.jobs.item_failures import outline
from rlm_tasks.jobs.trace_ids import trace_id_of
from rlm_tasks.ledger.at_work import held_nodes
from rlm_tasks.ledger.explain import explain, last_begun_ms, without_message
from rlm_tasks.ledger.job_counters import JobCounters, JobReading, read_counters
from rlm_tasks.ledger.reader import first_failure
from rlm_tasks.ledger.records import MERGE
from rlm_tasks.ledger.round_ids import opened_rounds
from rlm_tasks.ledger.tree import read_tree
from rlm_tasks.results import (
    ItemFailure,
    JobEvent,
    Progress,
    QuarantinedItem,
    Receipt,
    Status,
    Tree,
    TreeNode,
    receipt_of,
)

if TYPE_CHECKING:
    from resilience.budget import Spending
    from rlm_tasks.jobs.spec import JobSpec

Facts = dict[str, str]
"""Every counter and state of a job, as the ledger keeps them."""
TREE_NODES = 10_000
"""`JobReader.tree` returns at most this many nodes, unless it is asked for more."""
NODE_STATES = {
    "q": "queued",
    "r": "running",
    "p": "parked",
    "d": "done",
    "c": "cut",
    "k": "skipped",
}


class JobReader:
    """The methods of a job that only read.

    Every method but `tree` raises JobNotFound and StoreUnavailable.
    """

    def __init__(self, session: Session, job_id: str) -> None:
        self.id = job_id
        self._session, self._ledger = session, session.ledger
        self._keys = session.keys.of(job_id)

    @property
    def status(self) -> Status:
        """The state of the job.  Raises JobNotFound, StoreUnavailable."""
        return Status(self._facts()["state"])

    @property
    def state(self) -> str:
        """The status under Celery's names: PENDING, STARTED, SUCCESS, FAILURE or REVOKED.

        Raises JobNotFound, StoreUnavailable.
        """
        return CELERY_STATES[self.status]

    def ready(self) -> bool:
        """Whether the job has ended.  Raises JobNotFound, StoreUnavailable."""
        return self.status.final

    def successful(self) -> bool:
        """Whether the job has ended with an answer.  Raises JobNotFound, StoreUnavailable."""
        return self.status is Status.SUCCEEDED

    def progress(self) -> Progress:
        """Return the progress of the job and its rounds, running nodes included.

        It takes one round trip, another if nodes run, and another if the job has rounds.  Raises
        JobNotFound, RecordUnreadable, StoreUnavailable.
        """
        [reading] = read_counters(self._ledger, [self.id])
        if isinstance(reading, RlmError):
            raise reading
        if not reading.parts[0].facts:
            raise JobNotFound(self.id)
        return progress_of(reading)

    def tree(self, limit: int = TREE_NODES, *, message: bool = True) -> Tree:
        """Return the nodes, parents before their children, siblings in item order.

        The list has at most `limit` nodes; its `note` names the part of a larger tree that it
        shows.  Nodes that ended long ago are only counted.  An unknown job has none.  Without
        `message` the reason of a node has no words of its operation, which may contain items.

        Raises InvalidRequest for a wrong `limit`, and StoreUnavailable.
        """
        refuse_unless_count("limit", limit, error=InvalidRequest)
        records, total = read_tree(self._ledger, self.id, limit)
        nodes = (
            TreeNode(
                id=record.id,
                parent=record.parent,
                lo=record.lo,
                hi=record.hi,
                worked=max(0, record.mid - record.lo) if record.state in "dck" else 0,
                depth=record.depth,
                state=NODE_STATES[record.state],
                why=record.why if message else outline(record.why),
                worker=record.worker,
                duration_ms=float(record.ms),
                attempts=record.epoch,
            )
            for record in sorted(records, key=lambda r: (r.depth, r.lo, -r.hi, r.id == MERGE))
        )
        return Tree(nodes, total=total)

    def events(self) -> list[JobEvent]:
        """Return the newest thousand events of the job, the oldest first.

        Raises StoreUnavailable.
        """
        return self._ledger.events(self.id)

    def explain(self, *, message: bool = True) -> str:
        """Return some sentences: why the job waits, what it does, or how it ended.

        They name what to do, where nobody works on the job.  While Redis takes no writes, another
        sentence says so.  Without `message` errors are named by their class, and an operation that
        asks to wait by its guard: their texts may contain items.

        Raises JobNotFound, StoreUnavailable.
        """
        facts = self._facts() if message else without_message(self._facts())
        if Status(facts["state"]).final:
            ended = sentence(facts, self._ledger.clock.now_ms())
            return f"{ended}{self._blamed(facts, message=message)}"
        if (refused := self._session.store.refusal()) is not None:
            return f"No job goes on: {refused}."
        at_work = held_nodes(self._ledger, self.id, facts)
        return explain(
            facts,
            at_work if message else at_work.without_texts(),
            self._now_ms(),
            self._readable_spec(),
            self._session.deployment(),
            sweep_s=self._session.settings.ledger.sweep_s,
        )

    @property
    def trace_id(self) -> str:
        """The id of the job's trace, 32 hex digits; the trace exists if workers have tracing on.

        Raises JobNotFound, JobUnreadable, StoreUnavailable.
        """
        return trace_id_of(self._spec())

    def spent(self) -> Spending | None:
        """Return the spending of the job and its rounds, None for a job that calls no models.

        Raises JobNotFound, JobUnreadable, StoreUnavailable.
        """
        return self._session.budgets.spent(self._spec())

    def receipt(self) -> Receipt:
        """Return the work that the job has left out so far under pressure; it may be empty.

        Raises JobNotFound, StoreUnavailable.
        """
        facts = self._facts()
        return receipt_of([facts, *(each for _, each in self._rounds(facts))])

    def failures(self) -> list[ItemFailure]:
        """Return the first 1,000 failed items in order; for a running job, those so far.

        The `where` of each one is found here: it is not stored with the failure.  Raises
        StoreUnavailable.
        """
        return self._placed(self._ledger.failures(self.id))

    def quarantined(self) -> list[QuarantinedItem]:
        """Return the quarantined items in order: their process died too often to run them again.

        Raises StoreUnavailable.
        """
        return self._ledger.quarantine.items(self.id)

    # --- reading -------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        facts = self._ledger.facts(self.id)
        if not facts:
            raise JobNotFound(self.id)
        return facts

    def _spec(self) -> JobSpec:
        spec = self._ledger.spec(self.id)
        if spec is None:
            raise JobNotFound(self.id)
        return spec

    def _placed(self, failures: list[ItemFailure]) -> list[ItemFailure]:
        """Return failures with the places of their items, if these can be read."""
        spec = self._readable_spec() if failures else None
        if spec is None:
            return failures
        reader, keys = self._session.reader, self._keys
        place = partial(reader.place, spec.source, keys.items, keys.blocks)
        return [replace(each, where=place(each.index)) for each in failures]

    def _blamed(self, facts: Facts, *, message: bool) -> str:
        """Return a sentence that names the first failed item of a failed job; '' without one."""
        if facts["state"] != Status.FAILED or facts["failed"] == "0" or facts.get("error"):
            return ""
        first = first_failure(self._ledger, self.id)
        if first is None:
            return ""
        [placed] = self._placed([first])
        return f" First failure: {named_item(placed)}: {raised_words(placed, message=message)}."

    def _readable_spec(self) -> JobSpec | None:
        """Return the specification, None if it cannot be read or has expired."""
        try:
            return self._spec()
        except (JobNotFound, JobUnreadable):
            return None

    def _now_ms(self) -> int:
        now_ms: int = self._session.store.call(lambda _: self._session.store.now_ms())
        return now_ms

    def _rounds(self, facts: Facts) -> list[tuple[str, Facts]]:
        found = opened_rounds(self._ledger, self.id) if facts.get("rounds") else []
        return [each for each in found if each[1]]


def progress_of(reading: JobReading) -> Progress:
    """Return the progress of a job from its counters and those of its rounds."""
    parts = [each.facts for each in reading.parts]
    facts = parts[0]
    status = Status(facts["state"])
    done, failed, skipped = (sum(each) for each in zip(*map(_counts, reading.parts), strict=True))
    began, ended = int(facts.get("started_ms", 0)), int(facts.get("closed_ms", 0))
    elapsed_s = max(0.0, ((ended or reading.now_ms) - began) / 1000) if began else 0.0
    worked, total = done + failed, _summed(parts, "n")
    rate = worked / elapsed_s if elapsed_s else 0.0
    left, running = total - worked - skipped, reading.running
    began_ms = max(map(last_begun_ms, parts))
    idle_s = 0.0 if running or status.final else max(0.0, (reading.now_ms - began_ms) / 1000)
    return Progress(
        status=status,
        total=total,
        done=done,
        failed=failed,
        skipped=skipped,
        nodes=_summed(parts, "nodes"),
        pending=_summed(parts, "pending"),
        splits=_summed(parts, "splits"),
        elapsed_s=elapsed_s,
        rate=rate,
        eta_s=0.0 if status.final else (left / rate if rate and running else None),
        phase=facts["phase"],
        round=len(parts) - 1,
        submitted_at=int(facts.get("opened_ms", 0)) / 1000,
        running=running,
        idle_s=idle_s,
    )


def _counts(counters: JobCounters) -> tuple[int, int, int]:
    """Return done, failed and skipped of a job or a round, including its running nodes."""
    facts = counters.facts
    done, failed, skipped = (int(facts[name]) for name in ("done", "failed", "skipped"))
    if facts["phase"] == "validate":
        done = int(facts["validated"]) - failed
    more = (0, 0, 0) if Status(facts["state"]).final else counters.inflight
    return done + more[0], failed + more[1], skipped + more[2]


def _summed(parts: Sequence[Facts], name: str) -> int:
    return sum(int(facts[name]) for facts in parts)
