"""The adaptive resource manager, on real breakers and alerts; pressure and usage are in memory."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.breaker import CircuitBreakers, CircuitOpen
from resilience.degradation import Level, ResourceConstraints
from resilience.errors import InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.settings import StoreSettings
from rlm_tasks.compat import resource_manager
from rlm_tasks.compat.resource_manager import (
    AdaptiveResourceManager,
    ResourceAwareExecutor,
    create_resource_manager,
    get_resource_status,
    integrate_with_orchestrator,
    reset_circuit_breakers,
    wrap_method_executor,
)
from scheduler.alerts import Alerts, ResourcePressureEvent
from scheduler.allocation import ExecutorPriority, ResourceAllocationPolicy, ResourceLimits
from scheduler.usage import Usage
from tests.unit.world import World, world

__all__ = ["world"]

EVENTS = [
    {"timestamp": "2027-01-15T08:00:00+00:00", "level": "high", "message": "pressure is high"}
]


LOAD = {"cpu_percent": 70.0, "memory_mb": 3000.0, "memory_percent": 72.0, "worker_count": 8}


class FakeClient:
    """A client with a pressure level of the test; its breakers, usage and alerts are real."""

    def __init__(self, world: World) -> None:
        self.breakers, self.usage = (
            CircuitBreakers(world.store()),
            Usage(world.store(), Keys("unit")),
        )
        self.alerts = Alerts(world.store(), clock=world.time)
        self.pressed, self.lost = Level.NORMAL, False
        self.pressure = SimpleNamespace(level=lambda: self.pressed)

    def status(self) -> Any:
        if self.lost:
            raise StoreUnavailable("redis://fake", "cut off by the test")
        picture = {"resource_usage": LOAD, "recent_pressure_events": EVENTS}
        return SimpleNamespace(**picture, to_dict=lambda: picture)


@pytest.fixture
def client(world: World) -> FakeClient:
    return FakeClient(world)


def manager(client: FakeClient, **options: Any) -> AdaptiveResourceManager:
    return AdaptiveResourceManager(client=client, **options)


def run(executor: ResourceAwareExecutor, executor_id: str = "D3-Q3", **context: Any) -> Any:
    return asyncio.run(
        executor.execute_with_resource_management(executor_id=executor_id, context=context)
    )


def broken(_executor_id: str, _context: dict[str, Any]) -> None:
    raise ConnectionError("its service does not answer")


def fail(client: FakeClient, times: int, executor_id: str = "D3-Q3") -> None:
    executor = wrap_method_executor(broken, manager(client))
    for _ in range(times):
        with pytest.raises(ConnectionError):
            run(executor, executor_id)


# --- running ----------------------------------------------------------------------------------


def test_functions_coroutines_and_objects_with_execute_can_be_run(client: FakeClient) -> None:
    def plain(executor_id: str, context: dict[str, Any]) -> Any:
        return executor_id, context["text"]

    async def awaiting(executor_id: str, context: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return plain(executor_id, context)

    for each in (
        plain,
        awaiting,
        SimpleNamespace(execute=plain),
        SimpleNamespace(execute=awaiting),
    ):
        assert run(wrap_method_executor(each, manager(client)), text="t") == ("D3-Q3", "t")


def test_further_arguments_are_passed_on(client: FakeClient) -> None:
    executor = wrap_method_executor(lambda _id, _context, *, factor: factor * 2, manager(client))

    assert asyncio.run(executor.execute_with_resource_management("a", {}, factor=21)) == 42


def test_an_executor_that_is_not_callable_is_refused_at_once(client: FakeClient) -> None:
    with pytest.raises(InvalidValue, match="method_executor=3: must be callable, or have execute"):
        wrap_method_executor(3, manager(client))


@pytest.mark.parametrize(("enabled", "limit"), [(True, 500), (False, 1000)])
def test_the_pressure_level_is_passed_in_a_copy_of_the_context(
    client: FakeClient, enabled: bool, limit: int
) -> None:
    client.pressed = Level.CRITICAL
    context = {"text": "t"}
    executor = wrap_method_executor(
        lambda _id, seen: ResourceConstraints.get_entity_limit(seen),
        manager(client, enable_degradation=enabled),
    )

    assert asyncio.run(executor.execute_with_resource_management("a", context)) == limit
    assert context == {"text": "t"}, "the caller's context is unchanged"


# --- breakers ---------------------------------------------------------------------------------


def test_five_failures_block_an_executor_for_a_minute_and_no_other(
    world: World, client: FakeClient
) -> None:
    ours, ran = manager(client), []
    executor = wrap_method_executor(lambda executor_id, _context: ran.append(executor_id), ours)
    fail(client, 4)
    assert ours.can_execute("D3-Q3") == (True, "")
    fail(client, 1)

    with pytest.raises(CircuitOpen) as blocked:
        run(executor)
    assert blocked.value.retry_after_s == pytest.approx(60, abs=1)
    can_execute, reason = ours.can_execute("D3-Q3")
    assert not can_execute
    assert "its circuit is open" in reason
    run(executor, "D4-Q2")
    world.sleep(61)
    run(executor)
    assert ran == ["D4-Q2", "D3-Q3"], "it does not run while the breaker is open"


def test_three_successful_probes_close_the_breaker(world: World, client: FakeClient) -> None:
    ours = manager(client)
    executor = wrap_method_executor(lambda *_: None, ours)
    fail(client, 5)
    world.sleep(61)

    states = []
    for _ in range(3):
        run(executor)
        states.append(ours.get_executor_metrics("D3-Q3")["circuit_breaker_state"])

    assert states == ["half-open", "half-open", "closed"]


def test_a_breaker_is_read_and_reset_by_the_name_of_its_executor(client: FakeClient) -> None:
    ours = manager(client)
    fail(client, 5)

    breaker = ours.circuit_breakers["D3-Q3"]
    assert (breaker.state, breaker.failure_count) == ("open", 5)
    assert breaker.last_failure_time is not None
    assert ours.reset_circuit_breaker("D3-Q3") is True
    assert (breaker.state, breaker.failure_count) == ("closed", 0)
    assert ours.reset_circuit_breaker("nobody") is False


def test_without_breakers_nothing_is_blocked(client: FakeClient) -> None:
    ours = manager(client, enable_circuit_breakers=False)
    executor = wrap_method_executor(broken, ours)
    for _ in range(6):
        with pytest.raises(ConnectionError):
            run(executor)

    assert ours.can_execute("D3-Q3") == (True, "")
    assert ours.get_executor_metrics("D3-Q3")["circuit_breaker_state"] == "closed"
    assert (
        ours.circuit_breakers,
        ours.reset_circuit_breaker("D3-Q3"),
        ours.reset_all_circuit_breakers(),
    ) == ({}, False, {})
    assert ours.get_resource_status()["circuit_breakers"] == {}


@pytest.mark.parametrize("enabled", ["false", "true"])
def test_the_variable_that_disables_breakers_holds_here(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, enabled: str
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_ENABLED", enabled)
    monkeypatch.setattr(
        resource_manager, "store_settings", StoreSettings
    )  # read again and not cached
    ours = manager(client)
    executor = wrap_method_executor(broken, ours)
    for _ in range(5):
        with pytest.raises(ConnectionError):
            run(executor)

    assert ours.can_execute("D3-Q3")[0] == (enabled == "false")


# --- metrics ----------------------------------------------------------------------------------


def test_the_metrics_of_an_executor(world: World, client: FakeClient) -> None:
    memory = iter([512.0, 1024.0, 256.0])
    ours = manager(client, clock=world.time, memory_mb=lambda: next(memory))

    def takes(_id: str, context: dict[str, Any]) -> None:
        world.sleep(context["seconds"])
        if context.get("fails"):
            raise ConnectionError

    executor = wrap_method_executor(takes, ours)
    run(executor, seconds=1.0)
    run(executor, seconds=2.0)
    with pytest.raises(ConnectionError):
        run(executor, seconds=3.0, fails=True)

    assert ours.get_executor_metrics("D3-Q3") == {
        "executor_id": "D3-Q3",
        "total_executions": 3,
        "successful_executions": 2,
        "failed_executions": 1,
        "success_rate_percent": 66.67,
        "avg_memory_mb": 597.3,
        "peak_memory_mb": 1024.0,
        "avg_duration_ms": pytest.approx(2000),
        "circuit_breaker_state": "closed",
    }


def test_an_executor_that_never_ran_has_no_successes(client: FakeClient) -> None:
    found = manager(client).get_executor_metrics("new")

    assert (found["total_executions"], found["success_rate_percent"], found["avg_duration_ms"]) == (
        0,
        0.0,
        0.0,
    )


def test_blocked_and_cancelled_executions_are_not_counted(client: FakeClient) -> None:
    ours = manager(client)
    fail(client, 5)
    with pytest.raises(CircuitOpen):
        run(wrap_method_executor(lambda *_: None, ours))

    async def cancelled() -> None:
        waiting = wrap_method_executor(lambda *_: asyncio.sleep(60), ours)
        task = asyncio.create_task(waiting.execute_with_resource_management("slow", {}))
        await asyncio.sleep(0)
        assert ours.get_resource_status()["active_executors"] == ["slow"]
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(cancelled())
    assert ours.get_executor_metrics("D3-Q3")["total_executions"] == 5
    assert ours.get_executor_metrics("slow")["total_executions"] == 0
    assert ours.get_resource_status()["active_executors"] == []


# --- allocation and status --------------------------------------------------------------------


def test_policy_and_limits_bound_the_workers_under_pressure(client: FakeClient) -> None:
    ours = manager(client, resource_limits=ResourceLimits(max_memory_mb=5 * 1024, min_workers=8))
    ours.register_allocation_policy(
        ResourceAllocationPolicy(
            executor_id="D5-Q2", priority=ExecutorPriority.HIGH, is_memory_intensive=True
        )
    )

    budgets = {}
    for client.pressed in Level:
        budgets[client.pressed.label] = (ours.worker_budget("D5-Q2"), ours.worker_budget("other"))

    assert budgets == {
        "normal": (5, 32),
        "elevated": (5, 26),
        "high": (4, 20),
        "critical": (3, 14),
        "emergency": (2, 8),
    }


def test_the_resource_status(client: FakeClient) -> None:
    ours = manager(client)
    fail(client, 5, "D4-Q2")
    run(wrap_method_executor(lambda *_: None, ours), "D3-Q3")
    client.pressed = Level.HIGH

    status = ours.get_resource_status()

    assert ours.current_pressure == status["current_pressure"] == "high"
    assert status["resource_usage"]["worker_count"] == 8
    assert status["recent_pressure_events"] == EVENTS
    assert status["active_executors"] == []
    assert status["executor_metrics"]["D3-Q3"]["successful_executions"] == 1
    assert status["active_degradation_strategies"] == [
        "reduce_entity_limits",
        "skip_optional_analysis",
        "disable_expensive_computations",
    ]
    assert [
        name for name, breaker in status["circuit_breakers"].items() if breaker["state"] == "open"
    ] == ["D4-Q2"]
    assert status["worker_budgets"] == {"D3-Q3": 18}
    assert status["resource_limits"]["max_cpu_percent"] == 85


# --- alerts -----------------------------------------------------------------------------------


def test_a_change_of_pressure_goes_to_alerts_and_callback_once(client: FakeClient) -> None:
    events: list[ResourcePressureEvent] = []
    ours, alerts = create_resource_manager(alert_callback=events.append, client=client)
    fail(client, 5)
    fail(client, 1, "D4-Q2")
    for client.pressed in (Level.NORMAL, Level.CRITICAL, Level.CRITICAL, Level.NORMAL):
        run(wrap_method_executor(lambda *_: None, ours), "D1-Q1")

    assert [event.pressure_level for event in events] == ["critical", "normal"]
    worst = events[0]
    assert (worst.cpu_percent, worst.memory_mb, worst.worker_count, worst.message) == (
        70,
        3000,
        8,
        "pressure is critical",
    )
    assert worst.active_executors == 1, "the executor that ran at that time"
    assert "use_simplified_methods" in worst.degradation_applied
    assert list(worst.circuit_breakers_open) == ["D3-Q3"]
    assert alerts is client.alerts
    assert {alert.kind for alert in client.alerts.history()} == {
        "pressure.changed",
        "breaker.opened",
        "degradation.started",
    }


def test_without_alerts_only_the_callback_is_called(client: FakeClient) -> None:
    events: list[ResourcePressureEvent] = []
    ours, alerts = create_resource_manager(
        enable_alerts=False, alert_callback=events.append, client=client
    )
    client.pressed = Level.EMERGENCY

    assert ours.current_pressure == "emergency"
    assert alerts is None
    assert (len(events), client.alerts.history()) == (1, [])


def test_a_failing_callback_fails_no_execution(
    client: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(_event: ResourcePressureEvent) -> None:
        raise RuntimeError("no pager")

    client.pressed = Level.HIGH
    executor = wrap_method_executor(lambda *_: "done", manager(client, alert_callback=callback))

    with caplog.at_level(logging.ERROR):
        assert run(executor) == "done"
    assert "The alert callback failed: pressure is high" in caplog.text


def test_a_change_without_redis_is_reported_when_it_answers(client: FakeClient) -> None:
    events: list[ResourcePressureEvent] = []
    ours = manager(client, alert_callback=events.append)
    executor = wrap_method_executor(lambda *_: "done", ours)
    client.pressed, client.lost = Level.HIGH, True

    assert run(executor) == "done"
    assert events == []
    client.lost = False
    assert run(executor) == "done"
    assert [event.pressure_level for event in events] == ["high"]


# --- orchestrators ----------------------------------------------------------------------------


def test_an_orchestrator_gets_manager_and_alerts_and_keeps_its_limits(client: FakeClient) -> None:
    orchestrator = SimpleNamespace(resource_limits=ResourceLimits(max_workers=8))
    integrate_with_orchestrator(
        orchestrator,
        enable_circuit_breakers=True,
        enable_degradation=True,
        enable_alerts=True,
        client=client,
    )

    assert orchestrator.alert_manager is client.alerts
    assert orchestrator.resource_manager.worker_budget("any") == 8
    fail(client, 5)
    status = get_resource_status(orchestrator)
    assert (status["current_pressure"], status["circuit_breakers"]["D3-Q3"]["state"]) == (
        "normal",
        "open",
    )
    assert reset_circuit_breakers(orchestrator) == {"D3-Q3": True}
    assert orchestrator.resource_manager.can_execute("D3-Q3") == (True, "")


@pytest.mark.parametrize("hook", [get_resource_status, reset_circuit_breakers])
def test_an_orchestrator_without_a_manager_is_refused(hook: Any) -> None:
    with pytest.raises(InvalidValue, match="call integrate_with_orchestrator first"):
        hook(SimpleNamespace())
