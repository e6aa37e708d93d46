"""A client's reports on the whole platform: pressure, breakers, limits, queues, usage, events.

`Client` extends it.  Each method returns one report; the records are in `platform_status` and in
the modules that make them.  Begin with `Platform.status`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from resilience.errors import refuse_unless_count, refuse_unless_name
from resilience.fault_log import FaultLog, Pattern
from rlm_tasks.client.session import Session
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.ledger.at_work import jobs_at_work
from rlm_tasks.ledger.records import JobNodes

if TYPE_CHECKING:
    from resilience.breaker import CircuitBreaker, CircuitBreakers
    from rlm_tasks.client.platform_status import PlatformStatus, Pressure
    from rlm_tasks.llm.reports import EndpointReport
    from rlm_tasks.telemetry.limit_reports import LimitReport
    from scheduler.alerts import Alerts
    from scheduler.events import Event, Events, Listener
    from scheduler.queues import QueueReport
    from scheduler.snapshots import Snapshot
    from scheduler.usage import Usage


class Platform:
    """The platform as one client sees it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._listener: Listener | None = None

    @property
    def breakers(self) -> CircuitBreakers:
        """All breakers: `can_execute(name)`, `status()`, `reset(name)` or `reset()` for all."""
        return self.session.breakers

    def create_circuit_breaker(
        self, name: str | Mapping[str, Any] = "client", /, config: Any = None, **fields: Any
    ) -> CircuitBreaker:
        """Return the breaker of a service, shared by all clients and workers that name it.

        ``create_circuit_breaker("llm", failure_threshold=5)``: fields go by name.  The second
        argument may be a preset's name or a BreakerConfig; the default is the preset ``client`` (5
        failures, 30 s, 3 probes).  A plain dict of fields works alone, too.  Raises InvalidValue.
        """
        from resilience.breaker_storage import configured

        if isinstance(name, Mapping):
            fields, name = {**name, **fields}, "client"
        return self.breakers.get(name, configured(config or "client", **fields))

    @functools.cached_property
    def pressure(self) -> Pressure:
        """The platform's pressure: `level()`, `history()`.

        `force(level)` and `release()` begin and end a drill.
        """
        from rlm_tasks.client.platform_status import Pressure

        return Pressure(self.session)

    def status(self) -> PlatformStatus:
        """Return the present status of the platform.

        It has level, hosts, usage, active work, operations, breakers, events and trend.  Raises
        StoreUnavailable.
        """
        return self.pressure.status()

    def health_check(self, detailed: bool | Mapping[str, Any] = False) -> dict[str, Any]:
        """Return the platform's health: ``status``, ``why``, ``latency_ms``.

        The status is ok, degraded or failing; the latency is that of Redis.  With `detailed` the
        dict also has the parts of a worker's ``/health``, for all workers.  They are ``pressure``,
        ``slots``, ``memory_mb``, ``workers``, ``queues``, ``quotas`` (limits that operations
        declare) and ``circuit_breakers``.  Breakers and queues then count for the status, too.
        ``health_check({"detailed": True})`` works as well.  It raises nothing while Redis or the
        broker is away.
        """
        from rlm_tasks.client.platform_health import of_platform

        wanted = detailed.get("detailed") if isinstance(detailed, Mapping) else detailed
        return of_platform(self.session, detailed=bool(wanted))

    def get_optimization_stats(self) -> dict[str, Any]:
        """Return the platform's performance under the names that other orchestrators use.

        - ``memory``: ``usage_mb`` of all hosts that report, ``pressure_level``,
          ``object_pool_utilization`` (busy share of pool processes, 0 to 1)
        - ``cache``: ``hit_rate`` and ``lookups``, both 0: there is no result cache, as ``note``
          says
        - ``execution``: ``avg_time_ms`` of an item and ``executions`` since operations were first
          seen, ``concurrency_level`` (nodes that run now)
        - ``errors``: ``error_rate`` of items, 0 to 1; ``recovery_success_rate`` of retries, None
          before the first; ``circuit_breakers``: name -> state

        Raises StoreUnavailable.
        """
        from rlm_tasks.client.performance_stats import stats

        return stats(self.status(), self.recovery_success_rate())

    @property
    def usage(self) -> Usage:
        """The cost of operations so far: `of(operation)` and `all()`."""
        return self.session.usage

    def snapshots(self, operation: str) -> list[Snapshot]:
        """Return an operation's figures minute by minute, the newest first.

        Each has `at`, `executions`, `failures`, `avg_ms` and `version`.  The monitor takes them
        (``RLM_SNAPSHOTS__EVERY_S``), so beat must run.  Raises InvalidRequest, StoreUnavailable.
        """
        refuse_unless_name("operation", operation, InvalidRequest)
        from scheduler.snapshots import Snapshots

        session = self.session
        return Snapshots(session.store, session.keys, session.settings.snapshots).of(operation)

    @property
    def events(self) -> Events:
        """The events of the platform: `recent(limit)`; `on` calls a function with each."""
        return self.session.events

    @property
    def alerts(self) -> Alerts:
        """The alerts so far: `history()`, `summary()`."""
        return self.session.alerts

    def at_work(self, limit: int = 200) -> list[JobNodes]:
        """Return the nodes of open jobs by state: queued, running, parked.

        Raises InvalidRequest, StoreUnavailable.
        """
        refuse_unless_count("limit", limit, error=InvalidRequest)
        return jobs_at_work(self.session.ledger, limit)

    def limits(self) -> list[LimitReport]:
        """Return the use of each rate limit and bulkhead, of operations and of models.

        They are those of live workers and of this process.  Raises StoreUnavailable.
        """
        from rlm_tasks.telemetry.limit_reports import limit_reports

        return limit_reports(self.session.guards, self.session.board.hosts())

    def release_limit(self, name: str) -> float:
        """End the pause of a limit that its provider asked for with a 429, for all workers.

        `name` is the service of a rate limit in `limits`.  Work that waits for it goes on.  Returns
        the seconds that were left of the pause, 0 if there was none.  Raises InvalidRequest for an
        unknown name, and StoreUnavailable.
        """
        from rlm_tasks.telemetry.limit_reports import bucket_of

        refuse_unless_name("name", name, InvalidRequest)
        bucket = bucket_of(self.session.guards, name, self.session.board.hosts())
        return bucket.release(self.session.delivery.wake)

    def endpoints(self) -> list[EndpointReport]:
        """Return the state of each endpoint of models, as the workers' checks have found it.

        They are the endpoints of live workers and of this process.  Raises StoreUnavailable.
        """
        from rlm_tasks.llm.reports import endpoint_reports

        session = self.session
        return endpoint_reports(
            session.store, session.settings.llm, session.breakers, session.board.hosts()
        )

    def queues(self) -> dict[str, QueueReport]:
        """Return the number of messages that wait in each queue, and the age of the oldest.

        Raises BrokerUnavailable.
        """
        return self.session.queues()

    def on(self, name: str, callback: Callable[[Event], object]) -> None:
        """Call a function with each event of a name from now on, such as ``execution.slow``.

        A name may end in ``*``: ``pressure.*``.  The function runs in a thread of this client,
        until `close`.  Raises InvalidValue.
        """
        from scheduler.events import Listener

        if self._listener is None:
            self._listener = Listener(self.events).on(name, callback).start()
        else:
            self._listener.on(name, callback)

    def fault_patterns(self) -> list[Pattern]:
        """Return the recurring faults of all workers, the latest first.

        Raises StoreUnavailable.
        """
        return FaultLog(self.session.shared).patterns()

    def recovery_success_rate(self) -> float | None:
        """Return the share of retried items that succeeded, 0 to 1; None before the first retry.

        Raises StoreUnavailable.
        """
        return FaultLog(self.session.shared).recovery_success_rate()
