"""How a request becomes a job: check it, store its items, open it, send its first message.

`Client` submits through it; `Job` uses it to open a job on failed items.  Begin with
`Submission.open`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import msgspec

from resilience.errors import StoreUnavailable
from rlm_tasks.client.intake import Intake
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.file_roots import FilesRoot
from rlm_tasks.jobs.items import source_of
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.stored_items import (
    STAGED_S,
    BlockSource,
    ItemWriter,
    RangeSource,
    StoredItems,
    renew_staged,
)
from rlm_tasks.jobs.trace_ids import current_traceparent
from rlm_tasks.ledger.records import PROCESS, ROOT, Report
from rlm_tasks.messaging.dispatch import new_id
from rlm_tasks.messaging.queue_names import queue_name
from rlm_tasks.operations import registry
from rlm_tasks.operations.policies import policies, priority_for
from rlm_tasks.requests import Budget, JobRequest, Options
from rlm_tasks.results import Status
from rlm_tasks.settings.model import Settings
from scheduler.settings import AdmissionSettings

if TYPE_CHECKING:
    from rlm_tasks.client.session import Session

logger = logging.getLogger(__name__)

_KEYED = uuid.UUID("6f1c1c0e-7a5b-5c55-9d0a-2f0a54d7c1a3")
"""Namespace of the job ids that are made from idempotency keys (RFC 4122, name-based)."""
_IDENTITY = ("operation", "source", "n")
"""Requests with the same idempotency key must agree in these fields, and in their params."""


class Submission:
    """The submissions of one client."""

    def __init__(self, session: Session) -> None:
        self._session, self._settings, self._ledger = session, session.settings, session.ledger
        self._policies = policies(session.settings)

    # --- requests ------------------------------------------------------------------------------

    def check(self, request: JobRequest) -> JobRequest:
        """Return a request that its operation has checked and completed.  Raises InvalidRequest."""
        operation = registry.get(request.operation)
        if request.conditions.validate_before_process and operation.validate is None:
            raise InvalidRequest(
                "validate_before_process",
                True,
                f"operation {operation.name!r} has no validate; give it one, or leave this out",
            )
        for name in ("budget", "cache_results"):
            if operation.gate is None and (value := getattr(request.options, name)):
                raise InvalidRequest(
                    name, value, f"operation {operation.name!r} calls no models; leave it out"
                )
        if operation.prepare is not None:
            request = operation.prepare(request, self._settings)
        request.check_params()
        return request

    def queue_of(self, request: JobRequest) -> str:
        """Return the queue that a request's nodes wait in."""
        return queue_name(self._settings.namespace, self._priority(request))

    def open(self, requests: Sequence[JobRequest]) -> list[str]:
        """Open jobs for checked or unchecked requests, and return their ids.

        A batch is opened in parts, no faster than workers take them in (see `Intake`).  Raises
        InvalidRequest, Overloaded and QueueFull before anything is stored, and StoreUnavailable.
        """
        requests = [self.check(request) for request in requests]
        self._session.store.check()
        for name, queue in {(each.operation, self.queue_of(each)) for each in requests}:
            self._session.admission.check_known(registry.get(name), queue)
        named = [(request, self._id_for(request.options.idempotency_key)) for request in requests]
        try:
            # All are admitted before any is stored.
            delays = [self._delay_of(*each) for each in named]
            intake, opened = Intake(self._session, map(self.queue_of, requests)), list[str]()
            while left := len(named) - len(opened):
                part = slice(len(opened), len(opened) + intake.room(left))
                jobs = self._open_part(named[part], delays[part])
                sent = zip(jobs, delays[part], strict=True)
                intake.opened(job for job, delay in sent if delay is None)
                opened += jobs
            return opened
        except BaseException:  # an interrupt too: no other code returns the places
            self._leave([job for _, job in named])
            raise

    def open_like(self, spec: JobSpec, items: Iterable[Any]) -> str:
        """Open a job with the specification of another, on other items, and return its id."""
        job = self._id_for("")
        source, n, staged = self._write_items(job, items)
        if isinstance(source, BlockSource) and isinstance(spec.source, BlockSource):
            source = spec.source  # so that failed files keep their places
        again = msgspec.structs.replace(
            spec,
            job=job,
            source=source,
            n=n,
            schema=specs.SCHEMA,
            idempotency_key="",
            parent="",
            round=0,
        )
        self._session.budgets.open(again, last=registry.get(spec.operation).then is None)
        return self.start([(again, staged)])[0]

    # --- admission -----------------------------------------------------------------------------

    def _delay_of(self, request: JobRequest, job: str) -> tuple[int, str] | None:
        """Return the ms that a job waits before admission, and the reason; None: it is admitted.

        Raises Overloaded or QueueFull for a job that must not wait.
        """
        priority, session = self._priority(request), self._session
        refused = session.admission.refusal(self.queue_of(request), priority)
        counted = refused or self._settings.admission.max_jobs
        if counted and self._is_open(request.options.idempotency_key):
            return None
        refused = refused or session.waiting_room.crowded(job, priority)
        if refused is None:
            return None
        if not self._is_patient(request):
            raise refused
        return int(refused.retry_after_s * 1000), refused.why

    def _leave(self, jobs: Sequence[str]) -> None:
        """Give back the places of jobs that were not opened; a dead client's places expire."""
        if self._settings.admission.max_jobs:
            with suppress(StoreUnavailable):
                unopened = [job for job in jobs if not self._ledger.facts(job)]
                self._session.waiting_room.leave(unopened)

    def _is_open(self, idempotency_key: str) -> bool:
        """Whether a key names an open job; to submit that job again adds no load."""
        return bool(idempotency_key and self._ledger.facts(self._id_for(idempotency_key)))

    def _is_patient(self, request: JobRequest) -> bool:
        return (request.options.overload or self._settings.admission.overload) == "delay"

    def _priority(self, request: JobRequest) -> str:
        operation = registry.get(request.operation)
        return priority_for(operation, self._policies, request.options.priority)

    # --- opening -------------------------------------------------------------------------------

    def _open_part(
        self,
        named: Sequence[tuple[JobRequest, str]],
        delays: Sequence[tuple[int, str] | None],
    ) -> list[str]:
        stored: list[tuple[JobSpec, str]] = []
        renewed_at = time.monotonic()
        for each in named:
            stored.append(self.store_items(*each))
            if time.monotonic() - renewed_at > STAGED_S / 4:
                for spec, token in stored:
                    if spec.n and not isinstance(spec.source, RangeSource):
                        self._renew(spec.job, token)
                renewed_at = time.monotonic()
        waits = {
            spec.job: delay
            for (spec, _), delay in zip(stored, delays, strict=True)
            if delay and not spec.empty
        }
        return self.start(stored, waits)

    def _renew(self, job: str, token: str) -> None:
        """Keep stored items of a job while those of others are stored.

        Raises InvalidRequest when they have been deleted.
        """
        store, keys = self._session.store, self._session.keys.staged(job, token)
        renew_staged(store, *keys)

    def store_items(self, request: JobRequest, job: str = "") -> tuple[JobSpec, str]:
        """Store all items, then return the job's specification and the token of the items.

        A generator that raises leaves no job behind.
        """
        options, conditions, priority = request.options, request.conditions, self._priority(request)
        job = job or self._id_for(options.idempotency_key)
        source, n, staged = self._write_items(job, request.items)
        operation = registry.get(request.operation)
        spends = operation.gate is not None
        spec = JobSpec(
            job=job,
            operation=request.operation,
            source=source,
            n=n,
            shape=request.shape(self._settings.node.target_ms),
            queue=self.queue_of(request),
            schema=specs.SCHEMA,
            version=operation.version,
            params=request.params,
            priority=priority,
            kind=request.kind,
            continue_on_error=options.continue_on_error,
            error_threshold=options.error_threshold,
            skip_if_empty=conditions.skip_if_empty,
            validate=conditions.validate_before_process,
            early_termination_threshold=conditions.early_termination_threshold,
            timeout_ms=options.timeout_ms,
            queue_timeout_ms=_queue_timeout_ms(self._settings, options, priority),
            description=request.description,
            complexity=request.complexity,
            estimate_s=request.estimated_duration_s,
            idempotency_key=options.idempotency_key,
            emits=options.emit_metrics,
            preempts=options.preempts(priority),
            patient=self._is_patient(request),
            trace=self._trace(options),
            budget=(options.budget or Budget()).limits if spends else None,
            cache_ttl_s=options.cache_ttl_seconds if options.cache_results else 0.0,
        )
        self._session.budgets.open(spec, last=operation.then is None)
        return spec, staged

    def start(
        self,
        stored: Sequence[tuple[JobSpec, str]],
        waits: Mapping[str, tuple[int, str]] | None = None,
    ) -> list[str]:
        """Open jobs whose items are stored, send their first messages, and return their ids.

        `waits` has, by job, the ms that its first node is parked, and the reason.
        """
        delayed = waits or {}
        opened = self._ledger.open(stored, self._settings.result_ttl_s, waits)
        new = [spec for (spec, _), is_new in zip(stored, opened, strict=True) if is_new]
        known = [spec for (spec, _), is_new in zip(stored, opened, strict=True) if not is_new]
        for spec in new:
            if spec.empty:
                self._close_empty(spec)
        self.enter_waiting_room([spec for spec in new if spec.job in delayed])
        if sending := [spec for spec in new if not spec.empty and spec.job not in delayed]:
            self._send(sending)
        for spec in known:
            # All new jobs have their message by now, so a wrong key delays no other job of a batch.
            self._refuse_another(spec)
        return [spec.job for spec, _ in stored]

    def enter_waiting_room(self, jobs: Sequence[JobSpec]) -> None:
        """Enter jobs into the waiting room, which wakes them when the platform has room."""
        for spec in jobs:
            try:
                now_ms = self._session.store.call(lambda _: self._session.store.now_ms())
                self._session.waiting_room.enter(spec.queue, {f"{spec.job} {ROOT}": now_ms})
            except StoreUnavailable as error:
                logger.info(
                    "Job %s could not enter the waiting room; it wakes at its own time: %s",
                    spec.job,
                    error,
                )

    def _send(self, jobs: Sequence[JobSpec]) -> None:
        """Send first messages; less urgent work yields to the jobs that may preempt it."""
        urgent: dict[str, list[str]] = {}
        for spec in jobs:
            if spec.preempts:
                urgent.setdefault(spec.queue, []).append(f"{spec.job} {ROOT}")
        with ExitStack() as stack:
            for queue, nodes in urgent.items():
                stack.enter_context(self._session.delivery.making_room(queue, nodes))
            self._session.dispatcher.send_root(jobs, ROOT)

    def _close_empty(self, spec: JobSpec) -> None:
        """End a job without items whose request skips empty jobs.

        It needs no message, unless its items are validated first.
        """
        claim = self._ledger.claim(spec.job, ROOT, "client", "client")
        finished = self._ledger.finish(claim, Report(mid=0), b"")
        if finished.outcome == PROCESS:
            self._session.dispatcher.send_root([spec], PROCESS)
        else:
            self._ledger.close(spec.job, claim.token, Status.SUCCEEDED)

    def _refuse_another(self, spec: JobSpec) -> None:
        """Raise InvalidRequest when the key names a job of another request."""
        if (first := self._ledger.spec(spec.job)) is None:
            return
        new = specs.load(specs.dump(spec), spec.job)
        differs = [name for name in _IDENTITY if getattr(first, name) != getattr(new, name)]
        if not _same_params(first, new):
            differs.append("params")
        if differs:
            raise InvalidRequest(
                "idempotency_key",
                spec.idempotency_key,
                f"names job {spec.job}, which differs in {', '.join(differs)}; use another",
            )

    # --- ids and items -------------------------------------------------------------------------

    def _id_for(self, idempotency_key: str) -> str:
        """Return the id of a new job; the same key gives the same id, so OPEN finds that job."""
        if not idempotency_key:
            return str(uuid.uuid4())
        return str(uuid.uuid5(_KEYED, f"{self._settings.namespace}:{idempotency_key}"))

    def _trace(self, options: Options) -> str:
        if options.trace_context is not None:
            return options.trace_context.traceparent
        return current_traceparent() if self._settings.tracing.enabled else ""

    def _write_items(self, job: str, items: Any) -> tuple[StoredItems, int, str]:
        """Store items under keys that only this call knows; OPEN moves them to the job."""
        token, settings, store = new_id(), self._settings, self._session.store
        index, blocks = self._session.keys.staged(job, token)
        writer = ItemWriter(
            store,
            index,
            blocks,
            max_item_bytes=settings.max_item_bytes,
            root=FilesRoot(settings.files_root),
        )
        try:
            return (*source_of(items).write(writer), token)
        except BaseException:
            with suppress(StoreUnavailable):  # the keys carry an expiry
                store.call(lambda client: client.delete(index, blocks))
            raise


def _same_params(first: JobSpec, new: JobSpec) -> bool:
    """Whether two jobs have the same params.  NaN is the same as NaN."""
    if first.schema == 1:  # its params have passed through JSON
        with suppress(TypeError):
            return bool(msgspec.json.decode(msgspec.json.encode(new.params)) == first.params)
    return first.params == new.params or first.packed_params == new.packed_params


def _queue_timeout_ms(settings: Settings, options: Options, priority: str) -> float | None:
    """Return the ms within which a worker must begin a job; None: no limit."""
    seconds = options.queue_timeout
    if seconds == "priority":
        # A bound of 0 only switches the admission check off.
        seconds = settings.admission.wait_s(priority) or AdmissionSettings().wait_s(priority)
    return 1000 * float(seconds) if seconds else None
