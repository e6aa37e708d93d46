"""A handle on one job: wait for it, take its answer, cancel it, run its failed items again.

`Client` gives it out.  It waits on the ledger's event stream, never on a Celery result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from resilience.errors import StoreUnavailable
from resilience.store import LOST
from rlm_tasks.client.job_reader import Facts, JobReader
from rlm_tasks.client.session import Session
from rlm_tasks.client.submission import Submission
from rlm_tasks.errors import (
    InvalidRequest,
    JobNotFound,
    ResultTimeout,
    ResultTooLarge,
)
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.endings import ENDINGS, sentence
from rlm_tasks.ledger.partials import flattened, partials
from rlm_tasks.operations import registry
from rlm_tasks.results import (
    ItemFailure,
    JobResult,
    Partial,
    Progress,
    Status,
    SuccessfulItems,
    metrics_of,
    receipt_of,
)

if TYPE_CHECKING:
    from rlm_tasks.jobs.spec import JobSpec

_T = TypeVar("_T")
_BLOCK_MS = 1000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class Job(JobReader):
    """A job, wherever it was submitted.

    Celery's own words work too: ``state``, ``ready()``, ``successful()``, ``get(timeout)``,
    ``revoke()``.
    """

    def __init__(self, session: Session, job_id: str) -> None:
        super().__init__(session, job_id)
        self._last_event = b"0-0"

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def rounds(self) -> list[Job]:
        """Return the rounds that the job has gone on in so far, each a job of its own.

        Raises JobNotFound, StoreUnavailable.
        """
        return [Job(self._session, id) for id, _ in self._rounds(self._facts())]

    # --- waiting -------------------------------------------------------------------------------

    def watch(self, interval_s: float = 0.2) -> Iterator[Progress]:
        """Yield the progress until the job has ended; the last one is final.

        `interval_s` is the longest time between two, in seconds; an event of the job yields one at
        once.  Outages of Redis are waited for.  Raises JobNotFound.
        """
        while True:
            progress = self._through_outages(self.progress, None)
            yield progress
            if progress.status.final:
                return
            self._wait_for_event(min(interval_s, _BLOCK_MS / 1000))

    def wait(self, timeout: float | None = None) -> Status:
        """Wait for the end and return the final status.  Raises ResultTimeout, JobNotFound."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            facts = self._through_outages(self._facts, until)
            if Status(facts["state"]).final:
                return Status(facts["state"])
            left_s = _BLOCK_MS / 1000 if until is None else until - time.monotonic()
            if left_s <= 0:
                raise ResultTimeout(self.id, timeout or 0.0)
            deadline = int(facts["deadline"])
            if deadline and (due_in_s := (deadline - self._now_ms()) / 1000) <= left_s:
                self._wait_until_expired(max(0.0, due_in_s), facts)
            else:
                self._wait_for_event(left_s)

    def _through_outages(self, read: Callable[[], _T], until: float | None) -> _T:
        """Read until Redis answers or the time is over."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return read()
            except StoreUnavailable:
                if until is not None and time.monotonic() + pause_s > until:
                    raise
                time.sleep(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    def _wait_for_event(self, seconds: float) -> None:
        """Wait for the next event of the job; none is missed between two calls."""
        block_ms = max(1, min(_BLOCK_MS, int(seconds * 1000)))
        streams: Any = {self._keys.events: self._last_event}
        try:
            answer: Any = self._session.store.client.xread(streams, block=block_ms)
        except LOST:
            time.sleep(min(0.2, seconds))
            return
        for _, entries in answer or ():
            self._last_event = entries[-1][0]

    def _wait_until_expired(self, due_in_s: float, facts: Facts) -> None:
        """Wait for the deadline, and let the job expire also when no worker lives to see it."""
        if due_in_s > 0:
            self._wait_for_event(due_in_s)
            return
        now_ms = self._now_ms()
        since_s = (now_ms - int(facts.get("stop_ms", now_ms))) / 1000
        force = since_s > self._session.settings.ledger.stop_grace_s
        for id in (self.id, *(id for id, _ in self._rounds(facts))):
            self._ledger.stop(id, "expired", force=force)
        self._wait_for_event(0.1)

    # --- the answer ----------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end and return the result.

        `timeout` is in seconds; None waits for ever.  Outages of Redis are waited for as long.
        Raises ResultTimeout, JobFailed, JobExpired, JobCancelled, JobNotFound, and ResultTooLarge
        when the output exceeds RLM_MAX_RESULT_BYTES.
        """
        self.wait(timeout)
        facts = self._facts()
        status = Status(facts["state"])
        result = self._result(facts, status)
        if (error := ENDINGS[status].error) is not None:
            raise error(result, result.error.message if result.error else sentence(facts))
        return result

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the output, as Celery's ``AsyncResult.get`` does.

        Raises as `result` does.
        """
        return self.result(timeout).output

    def partial(self) -> Partial:
        """Return the best answer so far, merged here from what is stored, and its coverage.

        Raises UnknownOperation when this process has not imported the job's operation, JobNotFound,
        StoreUnavailable.
        """
        spec, facts = self._spec(), self._facts()
        if Status(facts["state"]) is Status.SUCCEEDED:
            n, skipped = int(facts["n"]), int(facts["skipped"])
            ranges = self._ledger.ranges(self.id) if skipped else [(0, n)]
            coverage = (n - skipped) / n if n else 1.0
            return Partial(self._output(facts, spec), coverage, ranges)
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
            output=operation.shaped(output) if values else output,
            coverage=covered / spec.n if spec.n else 1.0,
            ranges=ranges,
        )

    def outputs(self) -> Iterator[Any]:
        """Yield the outputs of a job without a merge, in item order, a page at a time."""
        return flattened(partials(self._ledger, self.id, 0, self._spec().n))

    def _result(self, facts: Facts, status: Status) -> JobResult:
        spec, rounds = self._spec(), [facts, *(each for _, each in self._rounds(facts))]
        total, done, failed, skipped = (
            int(facts[name]) for name in ("n", "done", "failed", "skipped")
        )
        error = msgspec.json.decode(facts["error"]) if facts.get("error") else None
        succeeded = status is Status.SUCCEEDED
        return JobResult(
            job_id=self.id,
            status=status,
            output=self._output(facts, spec) if succeeded else None,
            total=total,
            done=done,
            failed_count=failed,
            skipped=skipped,
            failed=self.failures(),
            successful=SuccessfulItems(
                [(0, total)] if succeeded and not skipped else self._ledger.ranges(self.id),
                (self._ledger.failed_items(self.id) if failed else [])
                + (self._ledger.empty_items(self.id) if skipped else []),
            ),
            metrics=metrics_of(rounds),
            stopped=next((each["stop"] for each in rounds if each.get("stop")), ""),
            error=ItemFailure(
                index=-1,
                type=error["type"],
                message=error["message"],
                traceback=error.get("traceback", ""),
            )
            if error
            else None,
            receipt=receipt_of(rounds),
            spent=self._session.budgets.spent(spec),
        )

    def _output(self, facts: Facts, spec: JobSpec) -> Any:
        packed = self._ledger.answer(self.id)
        if packed is not None:
            self._refuse_larger(len(packed))
            return codec.unpack(packed)
        if not self._ledger.ranges(self.id):
            return None if spec.n == 0 and spec.skip_if_empty else []
        self._refuse_too_large()
        return list(self.outputs())

    def _refuse_too_large(self) -> None:
        """Raise ResultTooLarge when the stored partials are larger than a result may be."""
        names = [f"{lo}:{hi}" for lo, hi in self._ledger.ranges(self.id)]

        def sizes(client: Any) -> list[int]:
            pipe = client.pipeline(transaction=False)
            for name in names:
                pipe.hstrlen(self._keys.blobs, name)
            found: list[int] = pipe.execute()
            return found

        self._refuse_larger(sum(self._session.store.call(sizes)))

    def _refuse_larger(self, size: int) -> None:
        limit = self._session.settings.max_result_bytes
        if size > limit:
            raise ResultTooLarge(self.id, size, limit)

    # --- actions -------------------------------------------------------------------------------

    def cancel(self) -> Status:
        """End the job: waiting nodes are skipped now, running ones end after their current item.

        Returns its status, which stays as it is for a job that has ended.  Raises JobNotFound,
        StoreUnavailable.
        """
        state = self._ledger.stop(self.id, "cancelled")
        if state == "unknown":
            raise JobNotFound(self.id)
        for each in self.rounds():
            each.cancel()
        if not Status(state).final:
            self._session.recall()
        return Status(state)

    def revoke(self, *_: Any, **__: Any) -> None:
        """Cancel, in Celery's word."""
        self.cancel()

    def retry_failed(self) -> Job:
        """Open a new job on the failed items, with the same operation, params, options and strategy.

        Raises InvalidRequest when the job still runs or has no failed items.
        """
        spec, facts = self._spec(), self._facts()
        if not Status(facts["state"]).final:
            raise InvalidRequest("job", self.id, "still runs; wait for its end, or cancel it")
        failed = self._ledger.failed_items(self.id)
        if not failed:
            raise InvalidRequest("job", self.id, "has no failed items")
        return self._again(spec, failed)

    def replay_quarantined(self, *indexes: int) -> Job:
        """Open a new job on quarantined items (by default all), and take them out of quarantine.

        Raises InvalidRequest for an index that is not in quarantine, JobNotFound when the job has
        expired.
        """
        chosen = self._in_quarantine(indexes)
        again = self._again(self._spec(), chosen)
        self._ledger.drop_quarantined(self.id, chosen)
        return again

    def drop_quarantined(self, *indexes: int) -> list[int]:
        """Forget quarantined items, by default all; return their indexes.  Raises InvalidRequest."""
        chosen = self._in_quarantine(indexes)
        self._ledger.drop_quarantined(self.id, chosen)
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

    def _again(self, spec: JobSpec, indexes: list[int]) -> Job:
        """Open a job like this one on some of its items."""
        opened = Submission(self._session).open_like(spec, self._items(spec, indexes))
        return Job(self._session, opened)

    def _items(self, spec: JobSpec, indexes: list[int]) -> Iterator[Any]:
        for index in indexes:
            yield self._session.reader.read(
                source=spec.source,
                index=self._keys.items,
                blocks=self._keys.blocks,
                lo=index,
                hi=index + 1,
            )[0]
