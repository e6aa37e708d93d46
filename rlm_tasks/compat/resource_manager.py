"""Hooks for an orchestrator that runs executors in its own process.

Users who migrate call `create_resource_manager` or `integrate_with_orchestrator`; the names are
those of other orchestrators.  Breakers, pressure, policies, metrics and alerts are the platform's,
shared with its workers.  An executor's id is the name of its breaker and of its metrics.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from resilience.breaker import CircuitBreaker
from resilience.breaker_storage import CLOSED, OPEN, BreakerConfig
from resilience.degradation import CONSTRAINTS, Level
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.settings import store_settings
from rlm_tasks.compat.own_process import OwnProcess
from rlm_tasks.compat.worker_budget import ExecutorPolicies, Turns
from scheduler.alerts import ResourcePressureEvent
from scheduler.allocation import ResourceAllocationPolicy, ResourceLimits, workers_for

if TYPE_CHECKING:
    from rlm_tasks.client.client import Client
    from scheduler.alerts import Alerts

logger = logging.getLogger(__name__)

AlertCallback = Callable[[ResourcePressureEvent], object]


# --- the manager ------------------------------------------------------------------------------


class AdaptiveResourceManager:
    """Pressure, breakers and metrics for an orchestrator that runs executors."""

    def __init__(
        self,
        resource_limits: ResourceLimits | None = None,
        enable_circuit_breakers: bool = True,
        enable_degradation: bool = True,
        alert_callback: AlertCallback | None = None,
        *,
        client: Client | None = None,
        alerts: Alerts | None = None,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        circuit_breaker_config: BreakerConfig | None = None,
        process: OwnProcess | None = None,
    ) -> None:
        """Without a `client`, the environment names the platform.

        `resource_limits` may be changed while the manager runs.  `alerts` and `alert_callback`
        receive an event when the pressure of this manager changes.  `circuit_breaker_config` has
        the rules of the executors' breakers.  `process` measures the process of the executors.
        """
        self.resource_limits = resource_limits or ResourceLimits()
        self._client = client or default_platform()
        self._guards = enable_circuit_breakers and store_settings().breakers.enabled
        self._degrades, self._callback, self._alerts = enable_degradation, alert_callback, alerts
        self._clock, self._now, self._process = clock, now, process or OwnProcess()
        self._breaker = partial(self._client.breakers.get, config=circuit_breaker_config)
        self._policies = ExecutorPolicies(self._client.settings.allocation.policies)
        self._turns = Turns(self.worker_budget)
        self._known: set[str] = set()  # executors that have run here
        self._reported = Level.NORMAL

    # --- pressure and allocation ---------------------------------------------------------------

    @property
    def current_pressure(self) -> str:
        """The name of the pressure level to act on, such as ``high``."""
        return self._report_level().label

    def register_allocation_policy(self, policy: ResourceAllocationPolicy) -> None:
        """Set the policy of an executor, in place of the one in RLM_ALLOCATION__POLICIES."""
        self._policies.register(policy)

    def worker_budget(self, executor_id: str) -> int:
        """Return the number of an executor's runs allowed at once, by pressure and limits."""
        return self._budget(executor_id, self._report_level())

    def _budget(self, executor_id: str, level: Level) -> int:
        limits = self.resource_limits
        policy = self._policies.of(executor_id, limits)
        return workers_for(
            policy,
            level,
            slots=limits.max_workers,
            available_mb=limits.max_memory_mb,
            priority=policy.priority,
        )

    def constrained(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy of a context with the pressure level, which `ResourceConstraints` reads."""
        if not self._degrades:
            return dict(context)
        return {**context, "pressure_level": self._report_level().label}

    # --- breakers ------------------------------------------------------------------------------

    @property
    def circuit_breakers(self) -> dict[str, CircuitBreaker]:
        """The breakers of the platform by name: state, failure_count, last_failure_time.

        Raises StoreUnavailable.
        """
        breakers = self._client.breakers
        return {name: breakers.get(name) for name in breakers.names()} if self._guards else {}

    def can_execute(self, executor_id: str) -> tuple[bool, str]:
        """Return whether an executor may run now, and the reason if not."""
        return self._client.breakers.can_execute(executor_id) if self._guards else (True, "")

    def reset_circuit_breaker(self, executor_id: str) -> bool:
        """Close the breaker of an executor; return False without one.  Raises StoreUnavailable."""
        known = self._guards and executor_id in self._client.breakers.names()
        return known and bool(self._client.breakers.reset(executor_id))

    def reset_all_circuit_breakers(self) -> dict[str, bool]:
        """Close all breakers of the platform, also those of its services.

        Raises StoreUnavailable.
        """
        return dict.fromkeys(self._client.breakers.reset(), True) if self._guards else {}

    # --- executions ----------------------------------------------------------------------------

    @contextmanager
    def executing(self, executor_id: str) -> Generator[None, None, None]:
        """Guard and measure one execution of a block of code.

        A thread waits here while `worker_budget` executions run.  In an event loop nothing may
        wait, so there BulkheadFull is raised; `ResourceAwareExecutor` waits in an event loop, too.
        Its memory is the size of this process at its end.  A cancelled execution is not counted.
        Raises CircuitOpen.
        """
        with self._turns.turn(executor_id), self._measured(executor_id):
            yield

    @asynccontextmanager
    async def executing_async(self, executor_id: str) -> AsyncGenerator[None, None]:
        """As `executing`, but a coroutine waits for its turn.  Raises CircuitOpen."""
        async with self._turns.turn_async(executor_id):
            with self._measured(executor_id):
                yield

    @contextmanager
    def _measured(self, executor_id: str) -> Generator[None, None, None]:
        self._known.add(executor_id)
        with self._breaker(executor_id).calling() if self._guards else nullcontext():
            began = self._clock()
            try:
                yield
            except Exception:
                self._record(executor_id, began, ok=False)
                raise
            self._record(executor_id, began, ok=True)

    def _record(self, executor_id: str, began: float, *, ok: bool) -> None:
        self._client.usage.record(
            executor_id,
            ok=ok,
            duration_s=self._clock() - began,
            memory_mb=self._process.memory_mb(),
        )

    def get_executor_metrics(self, executor_id: str) -> dict[str, Any]:
        """Return counts, times and memory of an executor, with its breaker's state.

        The keys are those that other orchestrators use.  Raises StoreUnavailable.
        """
        breaker = str(self._breaker(executor_id).state) if self._guards else CLOSED
        return {**self._client.usage.of(executor_id).to_dict(), "circuit_breaker_state": breaker}

    # --- status --------------------------------------------------------------------------------

    def get_resource_status(self) -> dict[str, Any]:
        """Return the platform's status, and the metrics of executors that have run here.

        Raises StoreUnavailable.
        """
        level, known = self._report_level(), sorted(self._known)
        status = self._client.status()
        return {
            **status.to_dict(),
            "resource_usage": self._process.unless(status.resource_usage, self.resource_limits),
            "current_pressure": level.label,
            "resource_limits": self.resource_limits.model_dump(),
            "active_executors": self._turns.running(),
            "worker_budgets": {each: self._budget(each, level) for each in known},
            "executor_metrics": {each: self.get_executor_metrics(each) for each in known},
            "active_degradation_strategies": self._strategies(level),
            "circuit_breakers": self._client.breakers.status() if self._guards else {},
        }

    def _strategies(self, level: Level) -> list[str]:
        return [str(each) for each in CONSTRAINTS[level].strategies] if self._degrades else []

    # --- alerts --------------------------------------------------------------------------------

    def _report_level(self) -> Level:
        """Return the pressure level; publish an event if it has changed since the last call."""
        level, before = self._level(), self._reported
        if level != before and (self._alerts or self._callback):
            self._reported = level
            try:
                self._publish(self._event(level))
            except StoreUnavailable:
                self._reported = before  # the event follows when Redis answers
        return level

    def _level(self) -> Level:
        """Return the pressure of the platform or of this process, whichever is worse."""
        try:
            of_platform = self._client.pressure.level()
        except StoreUnavailable:
            of_platform = Level.ELEVATED  # as on a host that cannot be measured
        return max(of_platform, self._process.level(self.resource_limits))

    def _event(self, level: Level) -> ResourcePressureEvent:
        load = self._process.unless(self._client.status().resource_usage, self.resource_limits)
        breakers = self._client.breakers.status() if self._guards else {}
        return ResourcePressureEvent(
            timestamp=self._now(),
            pressure_level=level.label,
            cpu_percent=load["cpu_percent"],
            memory_mb=load["memory_mb"],
            memory_percent=load["memory_percent"],
            worker_count=int(load["worker_count"]),
            active_executors=self._turns.total(),
            degradation_applied=self._strategies(level),
            circuit_breakers_open=[
                name for name, each in breakers.items() if each["state"] == OPEN
            ],
            message=f"pressure is {level.label}",
        )

    def _publish(self, event: ResourcePressureEvent) -> None:
        if self._alerts:
            self._alerts.process_event(event)
        if self._callback:
            try:
                self._callback(event)
            except Exception:
                logger.exception("The alert callback failed: %s", event.message)


class ResourceAwareExecutor:
    """A method executor with the platform's breakers, pressure and measurements."""

    def __init__(self, method_executor: Any, resource_manager: AdaptiveResourceManager) -> None:
        run = getattr(method_executor, "execute", method_executor)
        if not callable(run):
            raise InvalidValue(
                "method_executor",
                method_executor,
                "must be callable, or have execute(executor_id, context)",
            )
        self._run, self._manager = run, resource_manager

    async def execute_with_resource_management(
        self, executor_id: str, context: Mapping[str, Any], **kwargs: Any
    ) -> Any:
        """Run an executor and return its result; a plain function runs in the caller's thread.

        It waits while `worker_budget` runs of the executor are at work.  Raises the executor's
        errors, or CircuitOpen without running it.
        """
        async with self._manager.executing_async(executor_id):
            result = self._run(executor_id, self._manager.constrained(context), **kwargs)
            return await result if inspect.isawaitable(result) else result


# --- the hooks --------------------------------------------------------------------------------


def create_resource_manager(
    resource_limits: ResourceLimits | None = None,
    enable_circuit_breakers: bool = True,
    enable_degradation: bool = True,
    enable_alerts: bool = True,
    alert_callback: AlertCallback | None = None,
    client: Client | None = None,
    circuit_breaker_config: BreakerConfig | None = None,
) -> tuple[AdaptiveResourceManager, Alerts | None]:
    """Return a manager and the platform's alerts, or None without `enable_alerts`.

    `alert_callback` receives a ResourcePressureEvent when the pressure changes.  Without a
    `client`, the environment names the platform.
    """
    client = client or default_platform()
    alerts = client.alerts if enable_alerts else None
    manager = AdaptiveResourceManager(
        resource_limits,
        enable_circuit_breakers,
        enable_degradation,
        alert_callback,
        client=client,
        alerts=alerts,
        circuit_breaker_config=circuit_breaker_config,
    )
    return manager, alerts


def integrate_with_orchestrator(orchestrator: Any, **options: Any) -> None:
    """Set `resource_manager` and `alert_manager` of an orchestrator.

    `options` are those of `create_resource_manager`; `resource_limits` are by default the
    orchestrator's own.
    """
    options.setdefault("resource_limits", getattr(orchestrator, "resource_limits", None))
    orchestrator.resource_manager, orchestrator.alert_manager = create_resource_manager(**options)


def wrap_method_executor(
    method_executor: Any, resource_manager: AdaptiveResourceManager
) -> ResourceAwareExecutor:
    """Return a method executor that runs under a manager.

    It may be a function, or an object with ``execute(executor_id, context)``.  Raises InvalidValue
    for anything else.
    """
    return ResourceAwareExecutor(method_executor, resource_manager)


def get_resource_status(orchestrator: Any) -> dict[str, Any]:
    """Return the answer of `AdaptiveResourceManager.get_resource_status` for an orchestrator.

    Raises InvalidValue, StoreUnavailable.
    """
    return _manager_of(orchestrator).get_resource_status()


def reset_circuit_breakers(orchestrator: Any) -> dict[str, bool]:
    """Close all breakers; return name -> whether it was closed.

    Raises InvalidValue, StoreUnavailable.
    """
    return _manager_of(orchestrator).reset_all_circuit_breakers()


def _manager_of(orchestrator: Any) -> AdaptiveResourceManager:
    manager = getattr(orchestrator, "resource_manager", None)
    if not isinstance(manager, AdaptiveResourceManager):
        raise InvalidValue(
            "orchestrator",
            orchestrator,
            "has no resource manager; call integrate_with_orchestrator first",
        )
    return manager


def default_platform() -> Client:
    """Return the client of the platform that the environment names."""
    from rlm_tasks.client.client import default_client

    return default_client()
