"""The errors of requests and jobs, all under `resilience.errors.RlmError`.

Clients and the command line raise them; docs/reference/errors.md says what to do about each.

RlmError
├── InvalidRequest          an InvalidValue (resilience): a field, its value, and what to do
│   ├── InvalidSettings     all mistakes of the configuration
│   ├── FileOutsideRoot     a file that RLM_FILES_ROOT does not allow
│   └── UnknownOperation    names the nearest known one; also one that no live worker knows
├── BrokerUnavailable       a StoreUnavailable (resilience): the broker does not answer
├── RecordUnreadable        (resilience) a shared record in Redis has another type than expected
├── JobNotFound             no such job, its results have expired, or Redis lost them
├── JobUnreadable           another release wrote one of its records, or it is damaged
├── JobEnded                a job without a full answer; carries its result
│   ├── JobFailed
│   ├── JobExpired
│   └── JobCancelled
├── ItemError               the failure of an item, merge or round: the cause of a JobEnded
├── ItemsUnreadable         items whose file or stored block has changed, or is gone
├── Quarantined             an item, or a merge, that kills its process every time
├── Overloaded              refused for now, because of its priority; has `retry_after_s`
├── QueueFull               refused for now, because its queue is full; has `retry_after_s`
├── ResultTimeout           the wait is over, the job goes on (also a TimeoutError)
├── OutputTooLarge          an output or a merge is larger than RLM_MAX_OUTPUT_BYTES
└── ResultTooLarge          iterate, or raise RLM_MAX_RESULT_BYTES
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from resilience.connections import RecordUnreadable, outage_of, told
from resilience.errors import (
    Category,
    InvalidValue,
    RlmError,
    Severity,
    StoreFull,
    StoreReadOnly,
    StoreUnauthorised,
    StoreUnavailable,
    figure,
)
from resilience.faults import shows_outage
from resilience.store import masked
from scheduler.admission import Overloaded, QueueFull

if TYPE_CHECKING:
    from rlm_tasks.results import ItemFailure, JobResult

__all__ = [
    "BrokerUnavailable",
    "FileOutsideRoot",
    "InvalidRequest",
    "InvalidSettings",
    "ItemError",
    "ItemsUnreadable",
    "JobCancelled",
    "JobEnded",
    "JobExpired",
    "JobFailed",
    "JobNotFound",
    "JobUnreadable",
    "OutputTooLarge",
    "Overloaded",
    "Quarantined",
    "QueueFull",
    "RecordUnreadable",
    "ResultTimeout",
    "ResultTooLarge",
    "RlmError",
    "StoreFull",
    "StoreReadOnly",
    "StoreUnauthorised",
    "StoreUnavailable",
    "UnknownOperation",
]


MOST_LISTED = 10
"""An error lists this many names, the nearest first."""


class InvalidRequest(InvalidValue):
    """A request that cannot be carried out; nothing was enqueued."""

    code = "INVALID_REQUEST"
    when = "A field has a wrong name or value, or an action does not fit the job."
    remedy = "Correct the field that the message names."


class InvalidSettings(InvalidRequest):
    """A configuration that cannot be used: `issues` has a sentence for each mistake."""

    code = "INVALID_SETTINGS"
    http_status = 500
    when = "An environment variable has a wrong name or value."
    remedy = "Correct the variables that the message names."

    def __init__(self, issues: Sequence[str]) -> None:
        self.issues = list(issues)
        super().__init__("configuration", "", "")
        self.args = ("\n".join(self.issues),)


class FileOutsideRoot(InvalidRequest):
    """A file that is not below `RLM_FILES_ROOT`, after its links are followed."""

    code = "FILE_OUTSIDE_ROOT"
    http_status = 403
    when = "The operator allows files of one folder only."
    remedy = "Move the file below `RLM_FILES_ROOT`."

    def __init__(self, path: str, root: str) -> None:
        super().__init__(
            "items",
            path,
            f"is not below RLM_FILES_ROOT={root}; move the file there, or change the setting",
        )


class UnknownOperation(InvalidRequest):
    """An operation that is not registered in this process."""

    code = "UNKNOWN_OPERATION"
    when = "The name is misspelt, or the module of the operation was not imported."
    remedy = "Correct the name, or add the module to `RLM_OPERATIONS`."

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        if name.startswith("llm.") and not any(each.startswith("llm.") for each in known):
            hint = "it needs pip install 'rlm-tasks[llm]'."
        super().__init__(
            "operation", name, f"unknown; {hint} Set RLM_OPERATIONS to the modules of your own ones"
        )


class UnknownToWorkers(UnknownOperation):
    """An operation that is registered in this process, but in no live worker of its queue."""

    http_status = 503
    when = "The workers run without the operation's module, or another release of it."
    remedy = "Set `RLM_OPERATIONS` of the workers, and restart them."

    def __init__(self, name: str, queue: str, known: Iterable[str], *, module: str) -> None:
        named = sorted(each for each in known if not each.startswith("#"))
        near = difflib.get_close_matches(name, named, n=len(named) or 1, cutoff=0.0)[:MOST_LISTED]
        more = f" and {len(named) - len(near)} more" if len(named) > len(near) else ""
        listed = f"; they know {', '.join(near)}{more}" if near else ""
        move = (
            "it is defined in __main__, which workers cannot import: put it in a module, and "
            if module == "__main__"
            else ""
        )
        super().__init__(name, ())
        self.args = (
            f"operation={name!r}: no live worker of queue {queue} knows it{listed}; {move}set "
            f"RLM_OPERATIONS of the workers to its module, and restart them",
        )


class BrokerUnavailable(StoreUnavailable):
    """The broker does not answer, or refuses; it may be another server than the ledger's Redis."""

    when = "The broker is down or unreachable, or refuses the login."
    remedy = "Start the broker, or correct `RLM_BROKER_URL`."

    def __init__(self, url: str, cause: str, *, what: str = "", advice: str = "") -> None:
        super().__init__(
            url,
            cause,
            what=what,
            advice=advice,
            server="the broker",
            variable="RLM_BROKER_URL",
        )

    @classmethod
    def of(cls, url: str, error: Exception) -> BrokerUnavailable:
        """Return the error for a URL, which may contain a password, and an error of kombu."""
        outage = outage_of(error.__cause__ or error)
        what, advice = outage.what or outage.kind.what, outage.advice or outage.kind.advice
        return cls(masked(url), told(error), what=what, advice=advice)


class JobNotFound(RlmError):
    """The ledger has no such job.  Has its `job_id`."""

    code = "JOB_NOT_FOUND"
    http_status = 404
    when = "The id is wrong, the namespace is another, or the results have expired."
    remedy = "Check the id and `RLM_NAMESPACE`; keep results longer with `RLM_RESULT_TTL_S`."

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        short = "; a short id has at least 4 characters" if len(job_id) < 4 else ""
        super().__init__(
            f"job {job_id} is unknown: a wrong id, another namespace, its results have expired, or "
            f"Redis has lost its data{short}; `rlm jobs` and client.jobs() list the known jobs"
        )


class JobUnreadable(RlmError):
    """A job with a record that this release cannot read, such as its specification.

    Has its `job_id`, `what` cannot be read, and `why`.
    """

    code = "JOB_UNREADABLE"
    http_status = 500
    when = "Another release wrote the job, or the record is damaged."
    remedy = "Use the release that submitted the job, or submit it again."

    def __init__(self, job_id: str, why: str, what: str = "the specification") -> None:
        self.job_id, self.why, self.what = job_id, why, what
        super().__init__(
            f"{what} of job {job_id} cannot be read ({why}): another release wrote it, "
            "or it is damaged; use the release that submitted it, or submit it again"
        )


class JobEnded(RlmError):
    """A job that ended without its full answer.

    Its `result` has the counts; `failures` is the result's list `failed`.  Its `__cause__` is the
    first failure as an ItemError, or the error of its merge.  Its text has the message of that
    failure, which may contain an item; `outline` is the same text without the message.
    """

    code = "JOB_ENDED"
    http_status = 500
    when = "The job failed, expired or was cancelled."
    remedy = "Look at `error.failures` and `error.result`."

    def __init__(self, result: JobResult, why: str, outline: str = "") -> None:
        """`why` and `outline` follow the id of the job: "failed at item 7: ..."."""
        self.result = result
        self.failures = result.failed
        self.outline = f"job {result.job_id} {outline or result.status}"
        super().__init__(f"job {result.job_id} {why}")


class JobFailed(JobEnded):
    """More items failed than its request tolerates, or its merge or a round failed.

    A breaker counts it if a failure has the code of an outage: TIMEOUT, SERVICE_UNAVAILABLE,
    OPERATION_FAILED, RETRY_BUDGET_EXHAUSTED.
    """

    code = "JOB_FAILED"
    when = "An item, the merge or a round raised an error."
    remedy = "Look at `error.failures`; then call `job.retry_failed()`, or set `continue_on_error`."

    def __init__(self, result: JobResult, why: str, outline: str = "") -> None:
        super().__init__(result, why, outline)
        causes = [*result.failed, *([result.error] if result.error is not None else [])]
        self.trips = any(shows_outage(each.code) for each in causes)


class JobExpired(JobEnded):
    """Its timeout passed; `Job.partial` has the answer so far."""

    code = "TIMEOUT"
    category = Category.TIMEOUT
    trips = True
    http_status = 504
    when = "The job's `timeout` or `queue_timeout` was shorter than its work."
    remedy = "Take `job.partial()`, allow more time, or add workers."


class JobCancelled(JobEnded):
    """The job was cancelled or revoked."""

    code = "JOB_CANCELLED"
    http_status = 409
    when = "A person or a program cancelled the job."
    remedy = "Submit it again, if it is still wanted."


class ItemError(RlmError):
    """The failure of an item, a merge or a round in a worker: the cause of a JobEnded.

    The class of the original exception is not rebuilt here.  Has its name as `type`, its `message`
    and its `traceback` as text, the `code` of the failure, the `index` of the item (-1: a merge)
    and its place in the input, `where`.
    """

    code = "ITEM_FAILED"
    http_status = 500
    when = "The operation raised an exception for an item."
    remedy = "See the codes of failures below."

    def __init__(self, failure: ItemFailure) -> None:
        self.type, self.message = failure.type, failure.message
        self.index, self.where = failure.index, failure.where
        self.code, self.traceback = failure.code, failure.traceback
        super().__init__(f"{self.type}: {self.message}" if self.message else self.type)
        if self.traceback:
            self.add_note(
                f"Traceback in the worker (most recent call last):\n{self.traceback.rstrip()}"
            )


class ItemsUnreadable(RlmError):
    """Items that cannot be read any more: their file or their stored block has changed, or is gone.

    Has `where`: the path of the file, or the numbers of the items.
    """

    code = "ITEMS_UNREADABLE"
    category = Category.VALIDATION
    http_status = 409
    when = "The file of the job was changed, moved or deleted."
    remedy = "Restore the file, or call `job.retry_failed(reread=True)`."

    def __init__(self, where: str, why: str, advice: str) -> None:
        self.where = where
        super().__init__(f"{where} {why}; {advice}")


class Quarantined(RlmError):
    """Work that is not tried again, because its process died too often while it ran.

    Has `what`, the number of `deaths`, and the last cause of death, `by`.
    """

    code = "QUARANTINED"
    category = Category.POISON
    severity = Severity.HIGH
    http_status = 500
    when = "The item ends its process: a crash, or too much memory."
    remedy = "Mend the item or the operation, then replay the item."

    def __init__(self, what: str, deaths: int, by: str) -> None:
        self.what, self.deaths, self.by = what, deaths, by
        times = "once" if deaths == 1 else f"{deaths} times"
        super().__init__(
            f"{what}: its process died {times} while it ran, the last time of {by}; "
            "it is not tried again; mend it, then replay it"
        )


class ResultTimeout(RlmError, TimeoutError):
    """The job has not ended within the caller's timeout; it goes on.

    Has `job_id` and `waited_s`, in seconds.
    """

    code = "RESULT_TIMEOUT"
    category = Category.TIMEOUT
    retryable = True
    trips = True
    http_status = 202
    when = "The job needs more time than the caller waits."
    remedy = "Ask again with the job's id."

    def __init__(self, job_id: str, waited_s: float) -> None:
        self.job_id, self.waited_s = job_id, waited_s
        super().__init__(
            f"job {job_id} has not ended within {figure(waited_s)} s; it goes on, "
            "call again with its id"
        )


class OutputTooLarge(RlmError):
    """An output, partial or answer too large to be stored.

    Has `what` it is, and its `size` and the `limit` in packed bytes.
    """

    code = "OUTPUT_TOO_LARGE"
    category = Category.VALIDATION
    http_status = 500
    when = "The operation returned more than `RLM_MAX_OUTPUT_BYTES`."
    remedy = "Store the output as a file and return its path, or raise the limit."

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.what, self.size, self.limit = what, size, limit
        super().__init__(
            f"{what} has {size} packed bytes, more than the limit of {limit}; store it as a file "
            "and return its path, or raise RLM_MAX_OUTPUT_BYTES and proto-max-bulk-len of Redis"
        )


class ResultTooLarge(RlmError):
    """An answer too large to be built in memory.  Has `job_id`, and `size` and `limit` in bytes."""

    code = "RESULT_TOO_LARGE"
    http_status = 500
    when = "The outputs together exceed `RLM_MAX_RESULT_BYTES`."
    remedy = "Iterate over `job.outputs()`, or raise the limit."

    def __init__(
        self, job_id: str, size: int, limit: int, advice: str = "iterate over job.outputs()"
    ) -> None:
        self.job_id, self.size, self.limit = job_id, size, limit
        super().__init__(
            f"job {job_id} has {size} bytes of output, more than RLM_MAX_RESULT_BYTES={limit}; "
            f"{advice}, or raise the limit"
        )
