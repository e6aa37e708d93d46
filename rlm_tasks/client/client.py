"""The client: submit jobs, and find them again.

Users, the command line and Flower each hold a `Client`.  `submission`, `planning`, `job` and
`platform` do the work; all of them share the client's `Session`.  Begin with `Client.submit`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Unpack

from celery import Celery

from resilience.errors import refuse_unless_seconds
from resilience.faults import Fault, classify
from resilience.retry import RetryPolicy
from resilience.store import Store
from rlm_tasks.celery import default_app
from rlm_tasks.client import job_search
from rlm_tasks.client.job import Job
from rlm_tasks.client.platform import Platform
from rlm_tasks.client.session import Session
from rlm_tasks.client.submission import Submission
from rlm_tasks.errors import (
    InvalidRequest,
    JobEnded,
    Overloaded,
    QueueFull,
)
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.operations import registry
from rlm_tasks.operations.protection import retry_policy
from rlm_tasks.requests import JobRequest, Options, RequestFields, SubmitFields
from rlm_tasks.results import JobResult, Progress, QuarantinedItem, Status
from rlm_tasks.settings.model import Settings

if TYPE_CHECKING:
    from rlm_tasks.client.planning import Plan

Request = JobRequest | Mapping[str, Any]


class Client(Platform):
    """Submit jobs and find them again.

    One client serves a whole process and may be used as a context manager.  Construction does not
    connect; an unreachable Redis is reported by the first call, within 2 s, as StoreUnavailable.
    """

    def __init__(self, app: Celery | None = None) -> None:
        """Send with an app that the platform is installed in.

        By default it is the only such app of this process, else the platform's own.  Raises
        InvalidRequest when there are several, and for an app without the platform.
        """
        super().__init__(Session(app or default_app()))
        self._submission = Submission(self.session)
        registry.import_operations(self.settings.operations)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, and stop the listener of `on`."""
        if self._listener is not None:
            self._listener.close()
        self.session.close()

    def check(self) -> None:
        """Raise StoreUnavailable, naming the URL without its password, unless Redis answers."""
        self.session.store.check()

    @property
    def app(self) -> Celery:
        """The Celery app that this client sends with."""
        return self.session.app

    @property
    def settings(self) -> Settings:
        """The settings of the app."""
        return self.session.settings

    @property
    def ledger(self) -> Ledger:
        """The ledger of all jobs."""
        return self.session.ledger

    @property
    def store(self) -> Store:
        """The store of the guards, as in workers.  Use it for a breaker or bucket of your own."""
        return self.session.shared

    # --- submitting ----------------------------------------------------------------------------

    def plan(self, request: Request | None = None, /, **fields: Unpack[SubmitFields]) -> Plan:
        """Return an estimate of a request under today's limits, at p50 and p90.

        It estimates nodes, calls, tokens, money and time.  Takes the arguments of `submit`, opens
        no job and calls no provider.  It samples up to a thousand items, so the items must not be
        an iterator.  Raises InvalidRequest as `submit` does, and StoreUnavailable.
        """
        from rlm_tasks.client import planning

        given = _parsed(request, fields)
        checked = self._submission.check(given)
        return planning.plan(self.session, given, checked, self._submission.queue_of(given))

    def submit(self, request: Request | None = None, /, **fields: Unpack[SubmitFields]) -> Job:
        """Open a job and return its handle.

        Takes a JobRequest, a plain dict in snake_case or camelCase, or the fields themselves;
        fields of Options and Conditions may be given directly (``priority="high"``).  Two
        submissions with one `idempotency_key` give one job while its result is kept, also when the
        client or Redis dies between them.  Raises InvalidRequest, Overloaded and QueueFull before
        anything is enqueued, and StoreUnavailable.
        """
        wanted = _parsed(request, fields)
        return Job(self.session, self._submission.open([wanted])[0])

    def execute(
        self,
        request: Request | None = None,
        /,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> JobResult:
        """Submit and wait: `submit` followed by `Job.result`.

        `timeout` is the time to wait, in seconds; the job's own limit is ``timeout`` of its
        options.  Raises as those two do.
        """
        refuse_unless_seconds("timeout", timeout, InvalidRequest)
        return self.submit(request, **fields).result(timeout=timeout)

    def execute_with_monitoring(
        self,
        request: Request | None = None,
        /,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> tuple[JobResult, dict[str, Any]]:
        """Execute, and return the result with its cost: `JobResult.metrics` as a dict.

        The dict has ``execution_time_ms``, ``busy_ms``, ``waited_ms``, ``items``, ``nodes``, and
        ``memory_usage_mb``, which is that of the largest worker process seen.
        """
        result = self.execute(request, timeout=timeout, **fields)
        return result, {
            **asdict(result.metrics),
            "memory_usage_mb": result.metrics.peak_memory_mb,
        }

    def execute_with_retry(
        self,
        request: Request | None = None,
        /,
        policy: RetryPolicy | Mapping[str, Any] | int | None = None,
        *,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> JobResult:
        """Execute a request, and repeat it if job or items failed with an error worth a retry.

        A policy may be a number of attempts, or a dict, in camelCase, too (``maxRetries``,
        ``initialDelayMs``, ``retryableErrors``).  Each attempt reads the items again, so they must
        not be an iterator, and has an idempotency key of its own.  A refused job is submitted again
        at its retry time, which costs no attempt, for up to ``max_refused_s`` (300 s).  Raises the
        error of the last attempt.  A policy on the *operation* retries single items; prefer it
        where one item of many may fail.
        """
        from resilience.retry import retrying

        wanted = _parsed(request, fields)
        if isinstance(wanted.items, Iterator):
            advice = "a retry would find an empty iterator; pass a list, or Lines(...)"
            raise InvalidRequest("items", wanted.items, advice)
        settled = RetryPolicy() if policy is None else retry_policy(policy)
        retried = (*settled.retry_on, Overloaded, QueueFull)
        retry = retrying(settled.model_copy(update={"retry_on": retried}))
        state = retry.begin()
        while True:
            try:
                return self.execute(_attempt(wanted, state.failures), timeout=timeout)
            except (Overloaded, QueueFull) as refused:
                retry.sleep(state.wait_s(refused))
            except JobEnded as ended:
                retry.sleep(state.wait_s(ended, _fault_of(ended, retry.policy)))

    def batch_submit(self, requests: Iterable[Request]) -> list[Job]:
        """Open several independent jobs; their ledger calls and messages are pipelined.

        The number of jobs in one pipeline follows the load.  All are checked before the first is
        opened.  Raises as `submit` does.
        """
        if not isinstance(requests, Iterable):
            raise InvalidRequest("requests", requests, "must be a list of requests")
        opened = self._submission.open([JobRequest.parse(request) for request in requests])
        return [Job(self.session, job) for job in opened]

    def batch_execute(
        self, requests: Iterable[Request], *, timeout: float | None = None
    ) -> list[JobResult]:
        """Submit several jobs and wait for all; results come in the order of the requests.

        A job that fails, expires or is cancelled has its result in the list too, with its `status`,
        `failed` and counts.  `timeout` is the time to wait for all jobs, in seconds; the result of
        a job that still runs then says so.  Raises as `submit` does, before any job is opened.
        """
        refuse_unless_seconds("timeout", timeout, InvalidRequest)
        until = None if timeout is None else time.monotonic() + timeout
        return [
            job.result(
                timeout=None if until is None else max(0.0, until - time.monotonic()),
                propagate=False,
            )
            for job in self.batch_submit(requests)
        ]

    def recall(self) -> None:
        """Make running nodes of all workers ask the ledger at once, not at their next pulse."""
        self.session.recall()

    # --- finding again -------------------------------------------------------------------------

    def job(self, job_id: str) -> Job:
        """Return the handle of a job that any client submitted, by its id or the beginning of it.

        Lists show the first 8 characters; 4 are enough where no other id begins so.  Raises
        JobNotFound, and InvalidRequest that lists the jobs when several ids begin so.
        """
        return Job(self.session, job_search.full_id(self.ledger, job_id))

    def jobs(
        self,
        limit: int = 100,
        *,
        operation: str | None = None,
        status: Status | str | Iterable[Status | str] | None = None,
        since: float | timedelta | datetime | None = None,
    ) -> list[Job]:
        """Return the newest jobs of this platform, the newest first.

        Each given filter must match.  `operation` is a name, `status` one status or several.
        `since` is a datetime, a timedelta or seconds: ``since=3600`` returns the jobs of the last
        hour.  Raises InvalidRequest, StoreUnavailable.
        """
        found = job_search.newest(self.ledger, limit, operation, status, since)
        return [Job(self.session, id) for id in found]

    def listed(
        self,
        limit: int = 100,
        *,
        operation: str | None = None,
        status: Status | str | Iterable[Status | str] | None = None,
        since: float | timedelta | datetime | None = None,
    ) -> list[tuple[JobSpec, Progress]]:
        """Return specification and progress of the newest jobs, with the filters of `jobs`.

        Jobs that expire during the call are left out.  A job whose specification cannot be read has
        the operation ``(cannot be read)``.  Raises InvalidRequest, StoreUnavailable.
        """
        found = job_search.newest(self.ledger, limit, operation, status, since)
        return job_search.listed(self.ledger, found)

    def quarantine(self) -> list[QuarantinedItem]:
        """Return the quarantined items of all jobs, the newest job first.

        Raises StoreUnavailable.
        """
        jobs = self.ledger.quarantine.jobs()
        return [item for job in jobs for item in self.ledger.quarantine.items(job)]

    def resubmit(self, spec: JobSpec, items: Iterable[Any]) -> Job:
        """Open a job with the specification of another, on other items.

        Raises as `submit` does.
        """
        return Job(self.session, self._submission.open_like(spec, items))


def _parsed(request: Request | None, fields: Mapping[str, Any]) -> JobRequest:
    """Return the request of a call; an idempotency key may stand beside a complete request."""
    if request is None:
        return JobRequest.parse(fields)
    key = fields.get("idempotency_key", "")
    if beside := sorted(fields.keys() - {"idempotency_key"}):
        raise InvalidRequest("fields", beside, "give a request or fields, not both")
    parsed = JobRequest.parse(request)
    if not key:
        return parsed
    options = Options(**{**dict(parsed.options), "idempotency_key": key})
    return parsed.model_copy(update={"options": options})


def _attempt(request: JobRequest, failures: int) -> JobRequest:
    """Return a request for another attempt: under its own key it would find the failed job."""
    if not failures or not (key := request.options.idempotency_key):
        return request
    options = request.options.model_copy(
        update={"idempotency_key": f"{key}, attempt {failures + 1}"}
    )
    return request.model_copy(update={"options": options})


def _fault_of(ended: JobEnded, policy: RetryPolicy) -> Fault:
    """Return the fault of an ended job; if an item's fault is worth a retry, return that one."""
    every = (ended.code, *(each.code for each in ended.failures))
    codes = [code for code in every if code in policy.retryable_errors]
    return replace(classify(ended), code=codes[0] if codes else ended.code)


_default: dict[tuple[int, Celery], Client] = {}


def default_client() -> Client:
    """Return the client behind ``operation.submit``, of the app that `Client()` uses.

    A process has one for each app; a forked process makes its own.  Raises InvalidRequest when the
    platform is installed in several apps.
    """
    owner = os.getpid(), default_app()
    return _default.get(owner) or _default.setdefault(owner, Client(owner[1]))
