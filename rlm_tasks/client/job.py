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
    ItemError,
    ItemsUnreadable,
    JobNotFound,
    ResultTimeout,
    ResultTooLarge,
    RlmError,
)
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.endings import ENDINGS, Blamed, how_it_ended
from rlm_tasks.jobs.file_roots import FilesRoot
from rlm_tasks.jobs.index_ranges import IndexRanges
from rlm_tasks.jobs.rounds import ROUND_FAILED
from rlm_tasks.jobs.stored_items import LineSource, Unreadable
from rlm_tasks.jobs.text_files import TextFile
from rlm_tasks.ledger.partials import flattened, partials
from rlm_tasks.ledger.reader import reading
from rlm_tasks.ledger.round_ids import expire_rounds
from rlm_tasks.operations import registry
from rlm_tasks.results import (
    ItemFailure,
    JobResult,
    Outputs,
    Partial,
    Status,
    SuccessfulItems,
    metrics_of,
    receipt_of,
)
from rlm_tasks.settings.environment import own_name

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session
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

    def result(self, timeout: float | None = None, *, propagate: bool = True) -> JobResult:
        """Wait for the end and return the result.

        `timeout` is in seconds; None waits for ever.  During it the method waits through outages of
        Redis.  Raises JobNotFound, and ResultTooLarge when the output exceeds RLM_MAX_RESULT_BYTES.

        A job without a full answer raises JobFailed, JobExpired or JobCancelled, whose `__cause__`
        is the first failure as an ItemError; a job that has not ended in time raises ResultTimeout.
        With ``propagate=False``, Celery's word, the method
        returns the result of such a job instead: `status`, counts and `failed` as they are then.
        """
        try:
            self.wait(timeout)
        except ResultTimeout:
            if propagate:
                raise
        facts = self._facts()
        status = Status(facts["state"])
        try:
            result = self._result(facts, status, self._output(facts))
        except ResultTooLarge as too_large:
            if propagate:
                raise
            return self._result(facts, status, None, _failure_of(too_large))
        if propagate and (error := ENDINGS[status].error) is not None:
            blamed = _blamed(self, result)
            texts = (how_it_ended(facts, blamed, message=shown) for shown in (True, False))
            raise error(result, *texts) from (ItemError(blamed.failure) if blamed else None)
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
            return Partial(self._output(facts), coverage, ranges)
        operation = registry.get(spec.operation)
        ranges = self._ledger.ranges(self.id)
        values = list(self._partials(spec))
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
        """Yield the outputs of a job without a merge, in item order, loading a page at a time.

        Failed and skipped items have no output; `rows` yields the indexes too.  Raises
        InvalidRequest for a job that has a merge; JobNotFound, StoreUnavailable.
        """
        spec = self._spec()
        if self._ledger.answer(self.id) is not None or _merges(spec):
            raise InvalidRequest(
                "job", self.id, "has a merge, so no output for each item; read result().output"
            )
        return flattened(partials(self._ledger, self.id, 0, spec.n))

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield the index of each item that succeeded, with its output, loading a page at a time.

        The job has no merge; it may have ended in any way.  Raises InvalidRequest for a job that
        still runs, or that has a merge; JobNotFound, StoreUnavailable.
        """
        facts = self._facts()
        if not Status(facts["state"]).final:
            raise InvalidRequest("job", self.id, "still runs; wait for its end, or cancel it")
        return zip(self._successful(facts), self.outputs(), strict=True)

    def _result(
        self, facts: Facts, status: Status, output: Any, error: ItemFailure | None = None
    ) -> JobResult:
        spec, rounds = self._spec(), [facts, *(each for _, each in self._rounds(facts))]
        return JobResult(
            job_id=self.id,
            status=status,
            output=output,
            total=int(facts["n"]),
            done=int(facts["done"]),
            failed_count=int(facts["failed"]),
            skipped=int(facts["skipped"]),
            failed=output.failed if isinstance(output, Outputs) else self._failures(facts),
            successful=self._successful(facts),
            metrics=metrics_of(rounds),
            stopped=next((each["stop"] for each in rounds if each.get("stop")), ""),
            error=error or _error_of(facts),
            receipt=receipt_of(rounds),
            spent=self._session.budgets.spent(spec),
        )

    def _failures(self, facts: Facts) -> list[ItemFailure]:
        return self.failures() if int(facts["failed"]) else []

    def _successful(self, facts: Facts) -> SuccessfulItems:
        failed, skipped = int(facts["failed"]), int(facts["skipped"])
        whole = Status(facts["state"]) is Status.SUCCEEDED and not skipped
        bad = self._ledger.failed_ranges(self.id) if failed else IndexRanges()
        ranges = [(0, int(facts["n"]))] if whole else self._ledger.ranges(self.id)
        return SuccessfulItems(
            [gap for lo, hi in ranges for gap in bad.gaps(lo, hi)],
            self._ledger.empty_items(self.id) if skipped else [],
        )

    def _output(self, facts: Facts) -> Any:
        """Return the output of a job that has succeeded, None for any other."""
        if Status(facts["state"]) is not Status.SUCCEEDED:
            return None
        spec = self._spec()
        packed = self._ledger.answer(self.id)
        if packed is not None:
            with reading(self.id, "the answer"):
                self._refuse_larger(codec.unpacked_bytes(packed), "make its merge return less")
                return codec.unpack(packed)
        if spec.empty and _merges(spec):
            return None
        rate = int(facts["failed"]) / spec.n if spec.n else 0.0
        return Outputs(
            flattened(self._partials(spec)), failed=self._failures(facts), failure_rate=rate
        )

    def _partials(self, spec: JobSpec) -> Iterator[Any]:
        """Yield the partials; raise ResultTooLarge before they exceed the limit, unpacked."""
        unpacked = 0

        def add(size: int) -> None:
            nonlocal unpacked
            unpacked += size
            self._refuse_larger(unpacked, "iterate over job.outputs()")

        return partials(self._ledger, self.id, 0, spec.n, measure=add)

    def _refuse_larger(self, size: int, advice: str) -> None:
        limit = self._session.settings.max_result_bytes
        if size > limit:
            raise ResultTooLarge(self.id, size, limit, advice)

    # --- actions -------------------------------------------------------------------------------

    def cancel(self, *, by: str = "") -> Status:
        """End the job: waiting nodes are skipped now, running ones end after their current item.

        The job keeps the name of its canceller: `by`, or else user and host of this process.  The
        name is not verified.  Returns its status, which stays as it is for a job that has ended.

        Raises JobNotFound, StoreUnavailable.
        """
        by = by or own_name()
        state = self._ledger.stop(self.id, "cancelled", by=by)
        if state == "unknown":
            raise JobNotFound(self.id)
        rounds = self.rounds()
        for each in rounds:
            each.cancel(by=by)
        if rounds and Status(state).final:
            expire_rounds(self._ledger, self.id, self._session.settings.result_ttl_s)
        if not Status(state).final:
            self._session.recall()
        return Status(state)

    def revoke(self, *_: Any, **__: Any) -> None:
        """Cancel the job, under Celery's name.  Raises JobNotFound, StoreUnavailable."""
        self.cancel()

    def retry_failed(self, *, reread: bool = False) -> Job:
        """Open a new job on the failed items.

        It has the same operation, params, options and strategy.  With `reread` it reads the failed
        lines of a file by their numbers from the file as it is now: use it after the file was
        mended.  Raises InvalidRequest when the job still runs or has no failed items, and
        ItemsUnreadable when an item cannot be read, for example because its file has changed;
        JobNotFound, StoreUnavailable.
        """
        spec, facts = self._spec(), self._facts()
        if not Status(facts["state"]).final:
            raise InvalidRequest("job", self.id, "still runs; wait for its end, or cancel it")
        failed = self._ledger.failed_items(self.id)
        if not failed:
            raise InvalidRequest(
                "job", self.id, "has no failed items, so there is nothing to retry"
            )
        return self._again(spec, failed, reread=reread)

    def replay_quarantined(self, *indexes: int) -> Job:
        """Open a new job on quarantined items (by default all), and take them out of quarantine.

        Raises InvalidRequest for an index that is not in quarantine, JobNotFound when the job has
        expired, StoreUnavailable.
        """
        chosen = self._in_quarantine(indexes)
        again = self._again(self._spec(), chosen)
        self._ledger.quarantine.drop(self.id, chosen)
        return again

    def drop_quarantined(self, *indexes: int) -> list[int]:
        """Delete quarantined items, by default all, and return their indexes.

        Raises InvalidRequest, StoreUnavailable.
        """
        chosen = self._in_quarantine(indexes)
        self._ledger.quarantine.drop(self.id, chosen)
        return chosen

    def _in_quarantine(self, indexes: tuple[int, ...]) -> list[int]:
        known = [item.index for item in self.quarantined()]
        if unknown := [each for each in indexes if each not in known]:
            raise InvalidRequest(
                "index", unknown[0], f"is not in quarantine; in job {self.id} there are {known}"
            )
        if not known:
            raise InvalidRequest(
                "job",
                self.id,
                "has no items in quarantine; client.quarantine() lists those of all jobs",
            )
        return sorted(indexes) or known

    def _again(self, spec: JobSpec, indexes: list[int], *, reread: bool = False) -> Job:
        """Open a job with the specification of this one, on some of its items."""
        items = _reread(self._session, spec, indexes) if reread else self._items(spec, indexes)
        return Job(self._session, Submission(self._session).open_like(spec, items))

    def _items(self, spec: JobSpec, indexes: list[int]) -> Iterator[Any]:
        """Yield some items of the job.  Raises ItemsUnreadable."""
        for index in indexes:
            try:
                [item] = self._session.reader.read(
                    source=spec.source,
                    index=self._keys.items,
                    blocks=self._keys.blocks,
                    lo=index,
                    hi=index + 1,
                )
            except Unreadable as unreadable:
                if isinstance(unreadable.error, RlmError):
                    raise unreadable.error from None
                raise ItemsUnreadable(
                    spec.source.describe(index),
                    f"cannot be read ({type(unreadable.error).__name__})",
                    "mend the file, then call retry_failed(reread=True)",
                ) from None
            yield item


def _reread(session: Session, spec: JobSpec, indexes: list[int]) -> list[str]:
    """Return lines of a file as it is now.  Raises InvalidRequest and ItemsUnreadable."""
    source = spec.source
    if not isinstance(source, LineSource):
        raise InvalidRequest("reread", True, "the items are no lines of a file; leave it out")
    root = FilesRoot(session.settings.files_root)
    with TextFile.opened(source.path, source.encoding, root) as text:
        return text.lines_at(indexes)


def _error_of(facts: Facts) -> ItemFailure | None:
    """Return the error that ended a job, such as the exception of its merge."""
    if not facts.get("error"):
        return None
    error = msgspec.json.decode(facts["error"])
    return ItemFailure(
        index=-1,
        type=error["type"],
        message=error["message"],
        traceback=error.get("traceback", ""),
        code=error.get("code", ""),
    )


def _blamed(job: Job, result: JobResult) -> Blamed | None:
    """Return the failure that ended a job, else its first one; None when nothing has failed."""
    counts, error = (result.failed_count, result.total), result.error
    if error is None:
        return Blamed(result.failed[0], *counts) if result.failed else None
    rounds = job.rounds() if error.code == ROUND_FAILED else []
    if not rounds:
        return Blamed(error, *counts)
    last = rounds[-1].result(0, propagate=False)
    failure = last.error or next(iter(last.failed), error)
    return Blamed(failure, last.failed_count, last.total, len(rounds))


def _failure_of(error: RlmError) -> ItemFailure:
    return ItemFailure(index=-1, type=type(error).__name__, message=str(error), code=error.code)


def _merges(spec: JobSpec) -> bool:
    """Whether the operation has a merge; False when this process does not know it."""
    known = spec.operation in registry.names()
    return known and registry.get(spec.operation).merge is not None
