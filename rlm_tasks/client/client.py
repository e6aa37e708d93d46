"""The door for users: check a request, store its items, open the job, send its first message.

Decides when a request becomes a job; refuses to know how the job runs.
"""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import msgspec
from celery import Celery
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from resilience.errors import StoreUnavailable
from resilience.fault_log import FaultLog, Pattern
from resilience.faults import Fault, classify
from resilience.keys import Keys
from resilience.retry import RetryPolicy
from resilience.store import Store, guard_store, masked
from rlm_tasks.celery import app as default_app
from rlm_tasks.celery import queue_name
from rlm_tasks.client.admission import AdmissionCheck
from rlm_tasks.client.job import Job
from rlm_tasks.errors import (
    BrokerUnavailable,
    InvalidRequest,
    JobEnded,
    JobNotFound,
    Overloaded,
    QueueFull,
)
from rlm_tasks.jobs import spec as specs
from rlm_tasks.jobs.items import ItemReader, ItemWriter, Source
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.trace_ids import current_traceparent
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import PROCESS, ROOT, JobNodes, Report
from rlm_tasks.messaging.broker import AWAY
from rlm_tasks.messaging.delivery import making_room, wake
from rlm_tasks.messaging.dispatch import Dispatcher, mint
from rlm_tasks.operations import registry
from rlm_tasks.operations.policies import policies, priority_for
from rlm_tasks.requests import Budget, JobRequest, Options, Priority
from rlm_tasks.results import JobResult, Progress, QuarantinedItem, Status
from rlm_tasks.settings.model import Settings
from scheduler.admission import WaitingRoom
from scheduler.preemption import Preemption
from scheduler.slots import SlotBoard
from scheduler.usage import Usage

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreaker, CircuitBreakers
    from rlm_tasks.client.planning import Plan
    from rlm_tasks.client.platform_status import PlatformStatus, Pressure
    from rlm_tasks.ledger.budgets import JobBudgets
    from rlm_tasks.llm.reports import EndpointReport
    from rlm_tasks.telemetry.limit_reports import LimitReport
    from scheduler.alerts import Alerts
    from scheduler.events import Event, Events, Listener
    from scheduler.queues import QueueReport
    from scheduler.snapshots import Snapshot

logger = logging.getLogger(__name__)

_KEYED = uuid.UUID("6f1c1c0e-7a5b-5c55-9d0a-2f0a54d7c1a3")
"""Namespace of the ids of jobs with an idempotency key (RFC 4122, name-based)."""

Request = JobRequest | Mapping[str, Any]


class Client:
    """Submit jobs and find them again.

    One client serves a whole process and may be used as a context manager.  Construction does not
    connect; an unreachable Redis is reported by the first call, within 2 s, as StoreUnavailable.
    """

    def __init__(self, app: Celery | None = None) -> None:
        self._app = app or default_app
        self.settings: Settings = self._app.rlm_settings
        self._store = Store(self.settings.address, namespace=self.settings.namespace)
        self.ledger = Ledger(self._store, Keys(self.settings.namespace), self.settings.ledger)
        self._dispatcher = Dispatcher(self._app, self.ledger)
        self._listener: Listener | None = None
        self._policies = policies(self.settings)
        self._intake = AdmissionCheck(self._app, self._store, self.settings)
        self._waiting_room = WaitingRoom(
            self._store, self.ledger.keys, self.settings.admission.max_jobs
        )
        self._preemption = Preemption(
            self._store, self.ledger.keys, SlotBoard(self._store, self.ledger.keys)
        )
        self.reader = ItemReader(self._store)
        registry.import_operations(self.settings.operations)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back, and listen no more."""
        if self._listener is not None:
            self._listener.close()
        self._intake.gauge.close()
        self._store.close()
        if "store" in vars(self):  # it is made when it is first asked for
            self.store.close()

    def check(self) -> None:
        """Raise StoreUnavailable, naming the URL without its password, unless Redis answers."""
        self._store.check()

    # --- what all workers share ----------------------------------------------------------------

    @property
    def app(self) -> Celery:
        """The Celery app that this client sends with."""
        return self._app

    @functools.cached_property
    def store(self) -> Store:
        """The store of the guards that workers use: for a breaker or bucket of one's own beside
        theirs.
        """
        return guard_store(self.settings)

    @functools.cached_property
    def breakers(self) -> CircuitBreakers:
        """All breakers: `can_execute(name)`, `status()`, `reset(name)` or `reset()` for all."""
        from rlm_tasks.engine.guards import breakers_of

        return breakers_of(
            self.store, self.settings, lambda waiters: wake(self.ledger, self._dispatcher, waiters)
        )

    def create_circuit_breaker(
        self, name: str | Mapping[str, Any] = "client", /, config: Any = None, **fields: Any
    ) -> CircuitBreaker:
        """Return the breaker of a service, shared by all clients and workers that name it.

        ``create_circuit_breaker("llm", failure_threshold=5)``; a preset's name or a BreakerConfig
        may come second, the preset ``client`` (5 failures, 30 s, 3 probes) is the default.  A plain
        dict of fields works alone, too. Raises InvalidValue."""
        from resilience.breaker_storage import configured

        if isinstance(name, Mapping):
            fields, name = {**name, **fields}, "client"
        return self.breakers.get(name, configured(config or "client", **fields))

    @functools.cached_property
    def pressure(self) -> Pressure:
        """The platform's pressure: `level()`, `history()`, and `force(level)` and `release()` for a
        drill.
        """
        from rlm_tasks.client.platform_status import Pressure

        return Pressure(self)

    def status(self) -> PlatformStatus:
        """Return one picture of the platform: level, hosts, usage, active work, operations,
        breakers, events, trend.

        Raises StoreUnavailable.
        """
        return self.pressure.status()

    def health_check(self, detailed: bool | Mapping[str, Any] = False) -> dict[str, Any]:
        """Return how the platform is: ``status`` (ok, degraded, failing), ``why``, and Redis's
        ``latency_ms``.

        Detailed it has the parts of a worker's ``/health`` for all workers: ``pressure``,
        ``slots``, ``memory_mb``, ``workers``, ``queues``, ``quotas`` (limits that operations
        declare) and ``circuit_breakers``, which count for the status as well.
        ``health_check({"detailed": True})`` works as in source document 0.  Raises nothing for what
        is away."""
        from rlm_tasks.client.platform_health import of_platform

        return of_platform(
            self,
            detailed=bool(detailed.get("detailed") if isinstance(detailed, Mapping) else detailed),
        )

    def get_optimization_stats(self) -> dict[str, Any]:
        """Return what is known of the platform's performance, in the words of source document 2.

        - ``memory``: ``usage_mb`` of all hosts that report, ``pressure_level``,
          ``object_pool_utilization`` (busy share of pool processes, 0 to 1)
        - ``cache``: ``hit_rate`` and ``lookups``, both 0 for there is no result cache, as ``note``
          says
        - ``execution``: ``avg_time_ms`` of an item and ``executions`` since operations were first
          seen, ``concurrency_level`` (nodes that run now)
        - ``errors``: ``error_rate`` of items, 0 to 1; ``recovery_success_rate`` of retries, None
          before there was one; ``circuit_breakers``: name -> state

        Raises StoreUnavailable.
        """
        from rlm_tasks.client.performance_stats import stats

        return stats(self.status(), self.recovery_success_rate())

    @functools.cached_property
    def purse(self) -> JobBudgets:
        """What jobs that call models may spend, and have spent."""
        from rlm_tasks.ledger.budgets import JobBudgets

        return JobBudgets(self._store, self.settings)

    @functools.cached_property
    def usage(self) -> Usage:
        """What operations have cost: `of(operation)` and `all()`."""
        return Usage(self._store, self.ledger.keys)

    def snapshots(self, operation: str) -> list[Snapshot]:
        """Return what an operation did minute by minute, the newest first: `at`, `executions`,
        `failures`, `avg_ms`, `version`.

        The monitor takes them (``RLM_SNAPSHOTS__EVERY_S``), so beat must run.  Raises
        StoreUnavailable."""
        from scheduler.snapshots import Snapshots

        return Snapshots(self._store, self.ledger.keys, self.settings.snapshots).of(operation)

    @functools.cached_property
    def events(self) -> Events:
        """What has happened on the platform: `recent(limit)`; to be told of it, see `on`."""
        from scheduler.events import Events

        return Events(self._store, self.settings.alerts.history)

    @functools.cached_property
    def alerts(self) -> Alerts:
        """What has been alerted: `history()`, `summary()`."""
        from scheduler.alerts import Alerts

        return Alerts(self._store, self.settings.alerts, self.events)

    def at_work(self, limit: int = 200) -> list[JobNodes]:
        """Return how the nodes of open jobs stand: queued, running, parked.  Raises
        StoreUnavailable.
        """
        found: list[JobNodes] = self._reachable(lambda: self.ledger.at_work(limit))
        return found

    def limits(self) -> list[LimitReport]:
        """Return how full the rate limits and bulkheads are that operations declare, and the limits
        of models.

        Raises StoreUnavailable.
        """
        from rlm_tasks.engine.guards import Guards
        from rlm_tasks.telemetry.limit_reports import reports

        return reports(
            Guards(
                self.store,
                self.settings,
                lambda waiters: wake(self.ledger, self._dispatcher, waiters),
            )
        )

    def endpoints(self) -> list[EndpointReport]:
        """Return how the endpoints of models are, as workers have seen them; none where none is
        configured.

        Raises StoreUnavailable.
        """
        from rlm_tasks.llm.reports import reports

        return reports(self)

    def queues(self) -> dict[str, QueueReport]:
        """Return how many messages wait in each queue of the platform, and for how long.  Raises
        BrokerUnavailable.
        """
        names = [queue_name(self.settings.namespace, each) for each in Priority]
        try:
            return self._intake.gauge.read(names)
        except AWAY as error:
            url = masked(str(self._app.conf.broker_url))
            raise BrokerUnavailable(url, f"{type(error).__name__}: {error}"[:200]) from None

    def on(self, name: str, callback: Callable[[Event], object]) -> None:
        """Call a function with each event of a name from now on: ``execution.slow``,
        ``breaker.opened``, ``pressure.*``.

        It runs in a thread of this client, until `close`.  Raises InvalidValue.
        """
        from scheduler.events import Listener

        if self._listener is None:
            self._listener = Listener(self.events).on(name, callback).start()
        else:
            self._listener.on(name, callback)

    def fault_patterns(self) -> list[Pattern]:
        """Return the recurring faults of all workers, the latest first.  Raises
        StoreUnavailable.
        """
        return FaultLog(self.store).patterns()

    def recovery_success_rate(self) -> float | None:
        """Return the share of retried items that ended well, 0 to 1; None while nothing was
        retried.

        Raises StoreUnavailable.
        """
        return FaultLog(self.store).recovery_success_rate()

    # --- submitting ----------------------------------------------------------------------------

    def plan(self, request: Request | None = None, /, **fields: Any) -> Plan:
        """Return what a request would take under today's limits: nodes, calls, tokens, money and
        time, at p50 and p90.

        Takes what `submit` does, opens no job and calls no provider.  Of many items it looks at a
        thousand, so the items must be there to look at: not an iterator.  Raises InvalidRequest as
        `submit` does, and StoreUnavailable."""
        from rlm_tasks.client import planning

        asked = self._request(request, fields)
        settled = self._checked(asked)
        return planning.plan(
            self, asked, settled, queue_name(self.settings.namespace, self._priority(asked))
        )

    def submit(
        self, request: Request | None = None, /, *, idempotency_key: str = "", **fields: Any
    ) -> Job:
        """Open a job and return its handle.

        Takes a JobRequest, a plain dict in snake_case or camelCase, or the fields themselves;
        fields of Options and Conditions may be given flat (``priority="high"``).  Submitting twice
        with one `idempotency_key` gives one job, for as long as its result lives, whatever dies in
        between. Raises InvalidRequest, Overloaded and QueueFull before anything is enqueued, and
        StoreUnavailable."""
        return self._open([_keyed(self._request(request, fields), idempotency_key)])[0]

    def execute(
        self, request: Request | None = None, /, *, timeout: float | None = None, **fields: Any
    ) -> JobResult:
        """Submit and wait: `submit` followed by `Job.result`.

        `timeout` is how long to wait, in seconds; the job's own limit is ``timeout`` of its
        options.  Raises as those two do."""
        return self.submit(request, **fields).result(timeout=timeout)

    def execute_with_monitoring(
        self, request: Request | None = None, /, *, timeout: float | None = None, **fields: Any
    ) -> tuple[JobResult, dict[str, Any]]:
        """Execute, and return beside the result what it cost: `JobResult.metrics` as a dict.

        In it are ``execution_time_ms``, ``busy_ms``, ``waited_ms``, ``items``, ``nodes``, and
        ``memory_usage_mb`` (source document 2's name): the largest worker process seen."""
        result = self.execute(request, timeout=timeout, **fields)
        return result, {**asdict(result.metrics), "memory_usage_mb": result.metrics.peak_memory_mb}

    def execute_with_retry(
        self,
        request: Request | None = None,
        /,
        policy: RetryPolicy | Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> JobResult:
        """Execute, and again when the job or its items failed of something that a retry may help.

        A policy may be a dict in camelCase, too (``maxRetries``, ``initialDelayMs``,
        ``retryableErrors``).  A job that is not taken in is tried when there may be room, which
        costs no attempt. Raises what the last attempt raised.  A policy on the *operation* tries
        again by item, and is the better choice where one item of many may fail."""
        from resilience.retry import retrying

        settled = RetryPolicy(**policy) if isinstance(policy, Mapping) else policy or RetryPolicy()
        retry = retrying(
            settled.model_copy(update={"retry_on": (*settled.retry_on, Overloaded, QueueFull)})
        )
        course = retry.begin()
        while True:
            try:
                return self.execute(request, **fields)
            except (Overloaded, QueueFull) as refused:
                retry.sleep(course.wait_s(refused))
            except JobEnded as ended:
                retry.sleep(course.wait_s(ended, _fault_of(ended, retry.policy)))

    def batch_submit(self, requests: Iterable[Request]) -> list[Job]:
        """Open several independent jobs; their ledger calls and messages are pipelined, for as many
        as load allows.

        All are checked before the first is opened.  Raises as `submit` does.
        """
        return self._open([JobRequest.parse(request) for request in requests])

    def batch_execute(
        self, requests: Iterable[Request], *, timeout: float | None = None
    ) -> list[JobResult]:
        """Submit several jobs and wait for all; results come in the order of the requests.

        `timeout` is in seconds, for each.  Raises as `submit` and `Job.result` do, for the first
        that ends without an answer."""
        return [job.result(timeout=timeout) for job in self.batch_submit(requests)]

    def recall(self) -> None:
        """Make running nodes of all workers look at the ledger at once, instead of at their next
        pulse.
        """
        try:
            self._dispatcher.tell("rlm_recall")
        except AWAY as error:
            logger.info("Workers were not told, they will see it at their next pulse: %s", error)

    # --- finding again -------------------------------------------------------------------------

    def job(self, job_id: str) -> Job:
        """Return the handle of a job submitted anywhere.  Raises JobNotFound."""
        if not self._reachable(lambda: self.ledger.facts(job_id)):
            raise JobNotFound(job_id)
        return Job(self, job_id)

    def jobs(self, limit: int = 100) -> list[Job]:
        """Return the newest jobs of this platform, the newest first.  Raises StoreUnavailable."""
        return [Job(self, id) for id, _ in self._reachable(lambda: self.ledger.jobs(limit))]

    def listed(self, limit: int = 100) -> list[tuple[JobSpec, Progress]]:
        """Return what the newest jobs are and how far, but for those that expire meanwhile.  Raises
        StoreUnavailable.
        """
        found = []
        for job in self.jobs(limit):
            spec = self._reachable(functools.partial(self.ledger.spec, job.id))
            with suppress(JobNotFound):
                found += [(spec, job.progress())] if spec is not None else []
        return found

    def quarantine(self) -> list[QuarantinedItem]:
        """Return the quarantined items of all jobs, the newest job first.  Raises
        StoreUnavailable.
        """
        jobs = self._reachable(self.ledger.quarantined_jobs)
        return [
            item
            for job in jobs
            for item in self._reachable(functools.partial(self.ledger.quarantined, job))
        ]

    # --- how a request becomes a job -----------------------------------------------------------

    def _request(self, request: Request | None, fields: dict[str, Any]) -> JobRequest:
        if request is None:
            return JobRequest.parse(fields)
        if fields:
            raise InvalidRequest("fields", sorted(fields), "give a request or fields, not both")
        return JobRequest.parse(request)

    def _open(self, requests: Sequence[JobRequest]) -> list[Job]:
        requests = [self._checked(request) for request in requests]
        self._store.check()
        named = [(request, self._id_for(request.options.idempotency_key)) for request in requests]
        try:
            delays = [
                self._delay_of(*each) for each in named
            ]  # all are asked for before any is stored
            size = self._intake.batch_size()
            parts = [slice(at, at + size) for at in range(0, len(requests), size)]
            return [job for part in parts for job in self._open_part(named[part], delays[part])]
        except BaseException:  # also when it is interrupted: nobody else would give the places back
            self._leave([job for _, job in named])
            raise

    def _leave(self, jobs: Sequence[str]) -> None:
        """Give back the places of jobs that were not opened; those of a client that has died are
        free again by their time.
        """
        if self.settings.admission.max_jobs:
            with suppress(StoreUnavailable):
                self._waiting_room.leave(
                    [
                        job
                        for job in jobs
                        if not self._reachable(functools.partial(self.ledger.facts, job))
                    ]
                )

    def _open_part(
        self, named: Sequence[tuple[JobRequest, str]], delays: Sequence[tuple[int, str] | None]
    ) -> list[Job]:
        stored = [self._reachable(functools.partial(self._stored, *each)) for each in named]
        waits = {
            spec.job: delay
            for (spec, _), delay in zip(stored, delays, strict=True)
            if delay and not spec.empty
        }
        return self._start(stored, waits)

    def _delay_of(self, request: JobRequest, job: str) -> tuple[int, str] | None:
        """Return how long a job has to wait to be taken in, in ms, and why.  Raises Overloaded,
        QueueFull.
        """
        priority = self._priority(request)
        refused = self._intake.refusal(queue_name(self.settings.namespace, priority), priority)
        if (refused or self.settings.admission.max_jobs) and self._is_open(
            request.options.idempotency_key
        ):
            return None
        refused = refused or self._waiting_room.crowded(job, priority)
        if refused is None:
            return None
        if not self._is_patient(request):
            raise refused
        return int(refused.retry_after_s * 1000), refused.why

    def _is_open(self, idempotency_key: str) -> bool:
        """Whether a key names a job already: to submit that again adds no load."""
        return bool(
            idempotency_key
            and self._reachable(lambda: self.ledger.facts(self._id_for(idempotency_key)))
        )

    def _priority(self, request: JobRequest) -> str:
        return priority_for(
            registry.get(request.operation), self._policies, request.options.priority
        )

    def _is_patient(self, request: JobRequest) -> bool:
        return (request.options.overload or self.settings.admission.overload) == "delay"

    def _start(
        self,
        stored: Sequence[tuple[JobSpec, str]],
        waits: Mapping[str, tuple[int, str]] | None = None,
    ) -> list[Job]:
        opened = self._reachable(
            lambda: self.ledger.open(stored, self.settings.result_ttl_s, waits)
        )
        waiting, known = [], []
        for (spec, _), is_new in zip(stored, opened, strict=True):
            if not is_new:
                known.append(spec)
            elif spec.empty:
                self._close_empty(spec)
            elif spec.job not in (waits or {}):
                waiting.append(spec)
        self._let_wait(
            [
                spec
                for (spec, _), is_new in zip(stored, opened, strict=True)
                if is_new and spec.job in (waits or {})
            ]
        )
        if waiting:
            self._send(waiting)
        for spec in known:
            # What is open has its message by now: one mistaken key delays no other job of a batch.
            self._refuse_another(spec)
        return [Job(self, spec.job) for spec, _ in stored]

    def _let_wait(self, specs: Sequence[JobSpec]) -> None:
        """Have jobs that are not taken in yet called as soon as there is room."""
        for spec in specs:
            try:
                now_ms = self._reachable(self._store.now_ms)
                self._waiting_room.enter(spec.queue, {f"{spec.job} {ROOT}": now_ms})
            except StoreUnavailable as error:
                logger.info(
                    "Job %s is not called when there is room, its own time wakes it: %s",
                    spec.job,
                    error,
                )

    def _send(self, specs: Sequence[JobSpec]) -> None:
        """Send first messages, and have less urgent work make room for those that may ask for
        it.
        """
        urgent: dict[str, list[str]] = {}
        for spec in specs:
            if spec.preempts:
                urgent.setdefault(spec.queue, []).append(f"{spec.job} {ROOT}")
        with ExitStack() as stack:
            for queue, nodes in urgent.items():
                stack.enter_context(making_room(self._preemption, self._dispatcher, queue, nodes))
            self._dispatcher.send_root(specs, ROOT)

    def _refuse_another(self, spec: JobSpec) -> None:
        """A key names one request; what else it is used for is a mistake."""
        first = self._reachable(lambda: self.ledger.spec(spec.job))
        asked = specs.load(specs.dump(spec))
        differs = [
            name
            for name in ("operation", "source", "n", "params")
            if getattr(first, name, None) != getattr(asked, name)
        ]
        if first is not None and differs:
            raise InvalidRequest(
                "idempotency_key",
                spec.idempotency_key,
                f"names job {spec.job}, which differs in {', '.join(differs)}; use another",
            )

    def _checked(self, request: JobRequest) -> JobRequest:
        """Return a request as its operation wants it.  Raises InvalidRequest."""
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
        return request if operation.prepare is None else operation.prepare(request, self.settings)

    def _stored(self, request: JobRequest, job: str = "") -> tuple[JobSpec, str]:
        """Store the items whole, then settle the request: a generator that raises leaves no job
        behind.
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
            shape=request.shape(self.settings.node.target_ms),
            queue=queue_name(self.settings.namespace, priority),
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
            description=request.description,
            complexity=request.complexity,
            idempotency_key=options.idempotency_key,
            emits=options.emit_metrics,
            preempts=options.preempts(priority),
            patient=self._is_patient(request),
            trace=self._trace(options),
            budget=(options.budget or Budget()).limits if spends else None,
            cache_ttl_s=options.cache_ttl_seconds if options.cache_results else 0.0,
        )
        self.purse.open(spec, last=operation.then is None)
        return spec, staged

    def _trace(self, options: Options) -> str:
        if options.trace_context is not None:
            return options.trace_context.traceparent
        return current_traceparent() if self.settings.tracing.enabled else ""

    def _id_for(self, idempotency_key: str) -> str:
        """Return the id of a new job; the same key gives the same id, so OPEN sees that it is open
        already.
        """
        if not idempotency_key:
            return str(uuid.uuid4())
        return str(uuid.uuid5(_KEYED, f"{self.settings.namespace}:{idempotency_key}"))

    def _write_items(self, job: str, items: Any) -> tuple[Source, int, str]:
        """Store items under keys that only this call knows; OPEN gives them to the job."""
        token, settings = mint(), self.settings
        index, blocks = self.ledger.keys.staged(job, token)
        writer = ItemWriter(
            self._store,
            index,
            blocks,
            ttl_s=settings.result_ttl_s,
            max_item_bytes=settings.max_item_bytes,
        )
        try:
            return (*writer.write(items), token)
        except BaseException:
            self._forget(index, blocks)
            raise

    def resubmit(self, spec: JobSpec, items: Iterable[Any]) -> Job:
        """Open a job like another one on other items."""
        job = self._id_for("")
        source, n, staged = self._write_items(job, items)
        again = msgspec.structs.replace(
            spec, job=job, source=source, n=n, idempotency_key="", parent="", round=0
        )
        self.purse.open(again, last=registry.get(spec.operation).then is None)
        return self._start([(again, staged)])[0]

    def _forget(self, *keys: str) -> None:
        try:
            self._store.client.delete(*keys)
        except (RedisConnectionError, RedisTimeoutError):
            return  # the keys carry an expiry

    def _close_empty(self, spec: JobSpec) -> None:
        """A job without items that asked to be skipped ends here: no message is sent."""
        claim = self.ledger.claim(spec.job, ROOT, "client", "client")
        finished = self.ledger.finish(claim, Report(mid=0), b"")
        if finished.outcome == PROCESS:
            self._dispatcher.send_root([spec], PROCESS)
        else:
            self.ledger.close(spec.job, claim.token, Status.SUCCEEDED)

    def _reachable(self, ask: Any) -> Any:
        try:
            return ask()
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise self._store.unavailable(error) from None


def _fault_of(ended: JobEnded, policy: RetryPolicy) -> Fault:
    """Return what a job's end means: that of its items which is worth another try, if there is
    one.
    """
    codes = [
        code
        for code in (ended.code, *(each.code for each in ended.failures))
        if code in policy.retryable_errors
    ]
    return replace(classify(ended), code=codes[0] if codes else ended.code)


def _keyed(request: JobRequest, idempotency_key: str) -> JobRequest:
    if not idempotency_key:
        return request
    options = Options(**{**dict(request.options), "idempotency_key": idempotency_key})
    return request.model_copy(update={"options": options})


@functools.cache
def default_client() -> Client:
    """Return the client behind ``operation.submit``, configured by the environment."""
    return Client()
