"""A handle on one job: wait for it, get its answer, cancel it, run its failed items again.

`Client.submit` and `Client.job` return it.  It waits on the ledger's event stream, never on a
Celery result.  Begin with `Job.result`; `job_reader` has the methods that only read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from rlm_tasks.client.job_reader import Facts
from rlm_tasks.client.job_waiter import JobWaiter
from rlm_tasks.client.submission import Submission
from rlm_tasks.errors import (
    InvalidRequest,
    JobNotFound,
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
    Status,
    SuccessfulItems,
    metrics_of,
    receipt_of,
)

if TYPE_CHECKING:
    from rlm_tasks.jobs.spec import JobSpec


class Job(JobWaiter):
    """The handle of a job, which any client may have submitted.

    The names of Celery's ``AsyncResult`` work too: ``state``, ``ready()``, ``successful()``,
    ``get(timeout)``, ``revoke()``.
    """

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def rounds(self) -> list[Job]:
        """Return the rounds that the job has opened so far; each round is a job, too.

        Raises JobNotFound, StoreUnavailable.
        """
        return [Job(self._session, id) for id, _ in self._rounds(self._facts())]

    # --- the answer ----------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the end and return the result.

        `timeout` is in seconds; None waits for ever.  During it the method waits through outages of
        Redis.  Raises ResultTimeout, JobFailed, JobExpired, JobCancelled, JobNotFound, and
        ResultTooLarge when the output exceeds RLM_MAX_RESULT_BYTES.
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
        """Return the best answer so far, merged here from the stored partials, and its coverage.

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
        """Yield the outputs of a job without a merge, in item order, loading a page at a time."""
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
        """Cancel the job, under Celery's name."""
        self.cancel()

    def retry_failed(self) -> Job:
        """Open a new job on the failed items.

        It has the same operation, params, options and strategy.  Raises InvalidRequest when the job
        still runs or has no failed items.
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
        self._ledger.quarantine.drop(self.id, chosen)
        return again

    def drop_quarantined(self, *indexes: int) -> list[int]:
        """Delete quarantined items, by default all, and return their indexes.

        Raises InvalidRequest.
        """
        chosen = self._in_quarantine(indexes)
        self._ledger.quarantine.drop(self.id, chosen)
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
        """Open a job with the specification of this one, on some of its items."""
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
