"""A handle on one job: how far it is, why it waits, what came out.

Reads the ledger and waits on it, never on a Celery result; refuses to know how work is moved.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from resilience.errors import StoreUnavailable
from resilience.store import LOST
from rlm_tasks.errors import (
    InvalidRequest,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    JobNotFound,
    ResultTimeout,
    ResultTooLarge,
)
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.trace_ids import trace_id_of
from rlm_tasks.ledger.explain import explain
from rlm_tasks.ledger.partials import flattened, partials
from rlm_tasks.ledger.records import MERGE
from rlm_tasks.ledger.round_ids import opened
from rlm_tasks.operations import registry
from rlm_tasks.results import (
    CELERY_STATES,
    ItemFailure,
    JobEvent,
    JobResult,
    Metrics,
    Partial,
    Progress,
    QuarantinedItem,
    Receipt,
    Shaped,
    Status,
    SuccessfulItems,
    TreeNode,
)

if TYPE_CHECKING:
    from resilience.budget import Spending
    from rlm_tasks.client.client import Client
    from rlm_tasks.jobs.spec import JobSpec

_T = TypeVar("_T")
_BLOCK_MS = 1000
_ENDED: dict[Status, type[JobEnded]] = {
    Status.FAILED: JobFailed,
    Status.EXPIRED: JobExpired,
    Status.CANCELLED: JobCancelled,
}
_NODE_STATES = {
    "q": "queued",
    "r": "running",
    "p": "parked",
    "d": "done",
    "c": "cut",
    "k": "skipped",
}


class Job:
    """A job, wherever it was submitted.

    Celery's own words work too: ``state``, ``ready()``, ``successful()``, ``get(timeout)``,
    ``revoke()``."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.id = job_id
        self._client, self._ledger = client, client.ledger
        self._keys = client.ledger.keys.of(job_id)
        self._seen = b"0-0"

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    # --- how far it is -------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """Where the job stands.  Raises JobNotFound, StoreUnavailable."""
        return Status(self._facts()["state"])

    @property
    def state(self) -> str:
        """The status in Celery's words: PENDING, STARTED, SUCCESS, FAILURE or REVOKED."""
        return CELERY_STATES[self.status]

    def ready(self) -> bool:
        """Whether the job has ended."""
        return self.status.final

    def successful(self) -> bool:
        """Whether the job has ended with its answer."""
        return self.status is Status.SUCCEEDED

    def progress(self) -> Progress:
        """Return how far the whole tree is, running nodes included.  Raises JobNotFound,
        StoreUnavailable.
        """
        facts = self._facts()
        parts = [(self.id, facts), *self._rounds(facts)]
        status = Status(facts["state"])
        done, failed, skipped = (
            sum(each) for each in zip(*(self._counts(*part) for part in parts), strict=True)
        )
        began, ended = int(facts.get("started_ms", 0)), int(facts.get("closed_ms", 0))
        elapsed = max(0.0, ((ended or self._now_ms()) - began) / 1000) if began else 0.0
        worked, total = done + failed, _summed(parts, "n")
        rate = worked / elapsed if elapsed else 0.0
        left = total - worked - skipped
        eta = 0.0 if status.final else (left / rate if rate else None)
        return Progress(
            status=status,
            total=total,
            done=done,
            failed=failed,
            skipped=skipped,
            nodes=_summed(parts, "nodes"),
            pending=_summed(parts, "pending"),
            splits=_summed(parts, "splits"),
            elapsed_s=elapsed,
            rate=rate,
            eta_s=eta,
            phase=facts["phase"],
            round=len(parts) - 1,
        )

    def _counts(self, id: str, facts: dict[str, str]) -> tuple[int, int, int]:
        """Return done, failed and skipped of a job or a round, with what its running nodes have
        told.
        """
        done, failed, skipped = (int(facts[name]) for name in ("done", "failed", "skipped"))
        if facts["phase"] == "validate":
            done = int(facts["validated"]) - failed
        more = (0, 0, 0) if Status(facts["state"]).final else self._ledger.inflight(id)
        return done + more[0], failed + more[1], skipped + more[2]

    def _rounds(self, facts: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
        found = (
            self._reachable(lambda: opened(self._ledger, self.id)) if facts.get("rounds") else []
        )
        return [each for each in found if each[1]]

    def rounds(self) -> list[Job]:
        """Return the rounds that it has gone on in so far, each a job of its own.  Raises
        JobNotFound, StoreUnavailable.
        """
        return [Job(self._client, id) for id, _ in self._rounds(self._facts())]

    def spent(self) -> Spending | None:
        """Return what the job and its rounds have spent on calls to models, None for a job that
        makes none.

        Raises JobNotFound, StoreUnavailable.
        """
        return self._client.purse.spent(self._spec())

    def watch(self, interval_s: float = 0.2) -> Iterator[Progress]:
        """Yield the progress until the job has ended; the last one is final.  Rides through
        outages.

        `interval_s` is the longest time between two, in seconds; what happens to the job comes at
        once.  Raises JobNotFound."""
        while True:
            progress = self._patiently(self.progress, None)
            yield progress
            if progress.status.final:
                return
            self._wait(min(interval_s, _BLOCK_MS / 1000))

    def tree(self) -> list[TreeNode]:
        """Return every node, parents before their children, siblings in item order.  Empty for an
        unknown job.
        """
        records = sorted(
            self._ledger.all_records(self.id), key=lambda r: (r.depth, r.lo, -r.hi, r.id == MERGE)
        )
        return [
            TreeNode(
                id=r.id,
                parent=r.parent,
                lo=r.lo,
                hi=r.hi,
                worked=max(0, r.mid - r.lo) if r.state in "dck" else 0,
                depth=r.depth,
                state=_NODE_STATES[r.state],
                why=r.why,
                worker=r.worker,
                duration_ms=float(r.ms),
                attempts=r.epoch,
            )
            for r in records
        ]

    def events(self) -> list[JobEvent]:
        """Return what has happened to the job, the oldest first; of a long one the newest
        thousand.
        """
        return self._reachable(lambda: self._ledger.events(self.id))

    def explain(self) -> str:
        """Say in one sentence why the job is waiting, what it is doing, or how it ended.

        Raises JobNotFound, StoreUnavailable.
        """
        return explain(self._facts(), self._ledger.all_records(self.id), self._now_ms())

    @property
    def trace_id(self) -> str:
        """By which id its trace is found where workers trace, 32 hex digits.  Raises JobNotFound,
        StoreUnavailable.
        """
        return trace_id_of(self._spec())

    # --- what came out -------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end and return the result.

        `timeout` is in seconds; None waits for ever.  An outage of Redis is ridden through up to
        it. Raises ResultTimeout, JobFailed, JobExpired, JobCancelled, JobNotFound, and
        ResultTooLarge when the output exceeds RLM_MAX_RESULT_BYTES."""
        self.wait(timeout)
        facts = self._facts()
        status = Status(facts["state"])
        result = self._result(facts, status)
        if status in _ENDED:
            why = result.error.message if result.error else explain(facts, [], self._now_ms())
            raise _ENDED[status](result, why)
        return result

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the output, as Celery's ``AsyncResult.get`` does.  Raises as
        `result` does.
        """
        return self.result(timeout).output

    def wait(self, timeout: float | None = None) -> Status:
        """Wait for the end and return the final status.  Raises ResultTimeout, JobNotFound."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            facts = self._patiently(self._facts, until)
            if Status(facts["state"]).final:
                return Status(facts["state"])
            left = _BLOCK_MS / 1000 if until is None else until - time.monotonic()
            if left <= 0:
                raise ResultTimeout(self.id, timeout or 0.0)
            deadline = int(facts["deadline"])
            if deadline and (due_in := (deadline - self._now_ms()) / 1000) <= left:
                self._wait_until_expired(max(0.0, due_in), facts)
            else:
                self._wait(left)

    def partial(self) -> Partial:
        """Return the best answer so far, merged here from what is stored, and how much of the job
        it covers.

        Raises UnknownOperation when this process has not imported the job's operation.
        """
        spec = self._spec()
        facts = self._facts()
        if Status(facts["state"]) is Status.SUCCEEDED:
            n = int(facts["n"])
            ranges = self._ledger.ranges(self.id) if int(facts["skipped"]) else [(0, n)]
            return Partial(
                self._output(facts, spec), (n - int(facts["skipped"])) / n if n else 1.0, ranges
            )
        operation = registry.get(spec.operation)
        ranges = self._ledger.ranges(self.id)
        self._refuse_too_large()
        values = list(partials(self._ledger, self.id, 0, spec.n))
        if operation.merge is None:
            output: Any = list(flattened(iter(values)))
        else:
            output = operation.merge(iter(values)) if values else None
        covered = sum(hi - lo for lo, hi in ranges)
        return Partial(
            operation.shaped(output) if values else output,
            covered / spec.n if spec.n else 1.0,
            ranges,
        )

    def receipt(self) -> Receipt:
        """Return what pressure has made the job leave out so far; empty when nothing.  Raises
        JobNotFound, StoreUnavailable.
        """
        facts = self._facts()
        return _receipt([facts, *(told for _, told in self._rounds(facts))])

    def outputs(self) -> Iterator[Any]:
        """Yield the outputs of a job without a merge, in item order, a page at a time."""
        return flattened(partials(self._ledger, self.id, 0, self._spec().n))

    # --- what may be done about it -------------------------------------------------------------

    def cancel(self) -> Status:
        """End the job: waiting nodes are skipped now, running ones end after the item they are at.

        Returns its status, which stays as it is for a job that has ended.  Raises JobNotFound,
        StoreUnavailable."""
        state = self._reachable(lambda: self._ledger.stop(self.id, "cancelled"))
        if state == "unknown":
            raise JobNotFound(self.id)
        for each in self.rounds():
            each.cancel()
        if not Status(state).final:
            self._client.recall()
        return Status(state)

    def revoke(self, *_: Any, **__: Any) -> None:
        """Cancel, in Celery's word."""
        self.cancel()

    def retry_failed(self) -> Job:
        """Open a new job on the failed items only, with the same operation, params, options and
        strategy.

        Raises InvalidRequest when the job still runs or has no failed items.
        """
        spec, facts = self._spec(), self._facts()
        if not Status(facts["state"]).final:
            raise InvalidRequest("job", self.id, "still runs; wait for its end, or cancel it")
        failed = self._ledger.failed_items(self.id)
        if not failed:
            raise InvalidRequest("job", self.id, "has no failed items")
        return self._client.resubmit(spec, self._items(spec, failed))

    def quarantined(self) -> list[QuarantinedItem]:
        """Return the items that are not run again because their process died too often, in
        order.
        """
        return self._reachable(lambda: self._ledger.quarantined(self.id))

    def replay_quarantined(self, *indexes: int) -> Job:
        """Open a new job on quarantined items (all of them by default), and take them out of
        quarantine.

        Raises InvalidRequest for an index that is not in quarantine, JobNotFound when the job has
        expired."""
        chosen = self._in_quarantine(indexes)
        spec = self._spec()
        again = self._client.resubmit(spec, self._items(spec, chosen))
        self._reachable(lambda: self._ledger.drop_quarantined(self.id, chosen))
        return again

    def drop_quarantined(self, *indexes: int) -> list[int]:
        """Forget quarantined items, all of them by default; return their indexes.  Raises
        InvalidRequest.
        """
        chosen = self._in_quarantine(indexes)
        self._reachable(lambda: self._ledger.drop_quarantined(self.id, chosen))
        return chosen

    def _in_quarantine(self, indexes: tuple[int, ...]) -> list[int]:
        known = [item.index for item in self.quarantined()]
        if unknown := sorted(set(indexes) - set(known)):
            raise InvalidRequest(
                "index", unknown[0], f"is not in quarantine; in job {self.id} there are {known}"
            )
        if not known:
            raise InvalidRequest("job", self.id, "has no items in quarantine")
        return sorted(indexes) or known

    def _items(self, spec: JobSpec, indexes: list[int]) -> Iterator[Any]:
        for index in indexes:
            yield self._client.reader.read(
                source=spec.source,
                index=self._keys.items,
                blocks=self._keys.blocks,
                lo=index,
                hi=index + 1,
            )[0]

    # --- reading -------------------------------------------------------------------------------

    def _facts(self) -> dict[str, str]:
        facts = self._reachable(lambda: self._ledger.facts(self.id))
        if not facts:
            raise JobNotFound(self.id)
        return facts

    def _spec(self) -> JobSpec:
        spec = self._reachable(lambda: self._ledger.spec(self.id))
        if spec is None:
            raise JobNotFound(self.id)
        return spec

    def _now_ms(self) -> int:
        return self._reachable(self._ledger.store.now_ms)

    def _reachable(self, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except LOST as error:
            raise self._ledger.store.unavailable(error) from None

    def _patiently(self, ask: Callable[[], _T], until: float | None) -> _T:
        """Ask until Redis answers or the time is over."""
        pause = 0.05
        while True:
            try:
                return ask()
            except StoreUnavailable:
                if until is not None and time.monotonic() + pause > until:
                    raise
                time.sleep(pause)
                pause = min(1.0, pause * 2)

    def _wait(self, seconds: float) -> None:
        """Wait for the next event of the job's log; its end is one, and none is missed between two
        calls.
        """
        block = max(1, min(_BLOCK_MS, int(seconds * 1000)))
        try:
            answer: Any = self._ledger.store.client.xread(
                {self._keys.events: self._seen}, block=block
            )
        except LOST:
            time.sleep(min(0.2, seconds))
            return
        for _, entries in answer or ():
            self._seen = entries[-1][0]

    def _wait_until_expired(self, due_in_s: float, facts: dict[str, str]) -> None:
        """Wait for the deadline and let it fall, also when no worker lives to see it."""
        if due_in_s > 0:
            self._wait(due_in_s)
            return
        since = (self._now_ms() - int(facts.get("stop_ms", self._now_ms()))) / 1000
        for id in (self.id, *(id for id, _ in self._rounds(facts))):
            self._reachable(
                functools.partial(
                    self._ledger.stop,
                    id,
                    "expired",
                    force=since > self._client.settings.ledger.stop_grace_s,
                )
            )
        self._wait(0.1)

    def _result(self, facts: dict[str, str], status: Status) -> JobResult:
        spec, rounds = self._spec(), [facts, *(told for _, told in self._rounds(facts))]
        total, done, failed, skipped = (
            int(facts[name]) for name in ("n", "done", "failed", "skipped")
        )
        error = msgspec.json.decode(facts["error"]) if facts.get("error") else None
        left_out = (self._ledger.failed_items(self.id) if failed else []) + (
            self._ledger.empty_items(self.id) if skipped else []
        )
        ranges = (
            [(0, total)]
            if status is Status.SUCCEEDED and not skipped
            else self._ledger.ranges(self.id)
        )
        return JobResult(
            job_id=self.id,
            status=status,
            output=self._output(facts, spec) if status is Status.SUCCEEDED else None,
            total=total,
            done=done,
            failed_count=failed,
            skipped=skipped,
            failed=self.failures(),
            successful=SuccessfulItems(ranges, left_out),
            metrics=_metrics(rounds),
            stopped=next((each["stop"] for each in rounds if each.get("stop")), ""),
            error=ItemFailure(-1, error["type"], error["message"], error.get("traceback", ""))
            if error
            else None,
            receipt=_receipt(rounds),
            spent=self._client.purse.spent(spec),
        )

    def failures(self) -> list[ItemFailure]:
        """Return the first 1,000 failed items, of a job at work so far, in order."""
        return self._reachable(lambda: self._ledger.failures(self.id))

    def _output(self, facts: dict[str, str], spec: JobSpec) -> Any:
        packed = self._reachable(lambda: self._ledger.answer(self.id))
        if packed is not None:
            self._refuse_larger(len(packed))
            return codec.unpack(packed)
        if not self._ledger.ranges(self.id):
            return None if spec.n == 0 and spec.skip_if_empty else []
        self._refuse_too_large()
        return list(self.outputs())

    def _refuse_too_large(self) -> None:
        store, keys = self._ledger.store, self._keys
        names = [f"{lo}:{hi}" for lo, hi in self._ledger.ranges(self.id)]
        pipe = store.client.pipeline(transaction=False)
        for name in names:
            pipe.hstrlen(keys.blobs, name)
        self._refuse_larger(sum(self._reachable(pipe.execute)))

    def _refuse_larger(self, size: int) -> None:
        limit = self._client.settings.max_result_bytes
        if size > limit:
            raise ResultTooLarge(self.id, size, limit)


def _summed(parts: Sequence[tuple[str, dict[str, str]]], name: str) -> int:
    return sum(int(facts[name]) for _, facts in parts)


def _metrics(rounds: Sequence[dict[str, str]]) -> Metrics:
    """Return what a job and its rounds cost; times are the job's, which spans them."""
    facts = rounds[0]
    nodes, splits, yields, busy_us = (
        sum(int(each[name]) for each in rounds) for name in ("nodes", "splits", "yields", "busy_us")
    )
    opened, started, closed = (
        int(facts.get(name, 0)) for name in ("opened_ms", "started_ms", "closed_ms")
    )
    started = started or closed
    return Metrics(
        items=int(facts["n"]),
        nodes=nodes,
        splits=splits,
        yields=yields,
        max_depth=max(int(each["depth"]) for each in rounds),
        execution_time_ms=float(closed - started),
        busy_ms=busy_us / 1000,
        peak_memory_mb=max(int(each["peak_kb"]) for each in rounds) / 1024,
        waited_ms=float(started - opened),
    )


def _receipt(rounds: Sequence[dict[str, str]]) -> Receipt:
    told: Counter[tuple[str, str]] = Counter()
    for name, count in (
        each for facts in rounds for each in facts.items() if each[0].startswith("shaped:")
    ):
        _, strategy, level = name.split(":")
        told[strategy, level] += int(count)
    return Receipt(
        Shaped(strategy, level, items) for (strategy, level), items in sorted(told.items())
    )
