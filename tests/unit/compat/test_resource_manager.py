"""The hooks of source document 1, on real breakers and alerts; pressure and usage are in memory."""

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


class Stage:
    """A client whose pressure we set; what it counts and guards is real."""

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
def stage(world: World) -> Stage:
    return Stage(world)


def manager(stage: Stage, **options: Any) -> AdaptiveResourceManager:
    return AdaptiveResourceManager(client=stage, **options)


def run(executor: ResourceAwareExecutor, executor_id: str = "D3-Q3", **context: Any) -> Any:
    return asyncio.run(
        executor.execute_with_resource_management(executor_id=executor_id, context=context)
    )


def broken(_executor_id: str, _context: dict[str, Any]) -> None:
    raise ConnectionError("its service does not answer")


def fail(stage: Stage, times: int, executor_id: str = "D3-Q3") -> None:
    executor = wrap_method_executor(broken, manager(stage))
    for _ in range(times):
        with pytest.raises(ConnectionError):
            run(executor, executor_id)


# --- running ----------------------------------------------------------------------------------


def test_functions_coroutines_and_objects_with_execute_are_run(stage: Stage) -> None:
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
        assert run(wrap_method_executor(each, manager(stage)), text="t") == ("D3-Q3", "t")


def test_further_arguments_are_handed_on(stage: Stage) -> None:
    executor = wrap_method_executor(lambda _id, _context, *, factor: factor * 2, manager(stage))

    assert asyncio.run(executor.execute_with_resource_management("a", {}, factor=21)) == 42


def test_what_cannot_be_called_is_refused_at_once(stage: Stage) -> None:
    with pytest.raises(InvalidValue, match="method_executor=3: must be callable, or have execute"):
        wrap_method_executor(3, manager(stage))


@pytest.mark.parametrize(("enabled", "limit"), [(True, 500), (False, 1000)])
def test_the_pressure_reaches_constraints_by_a_copy_of_the_context(
    stage: Stage, enabled: bool, limit: int
) -> None:
    stage.pressed = Level.CRITICAL
    context = {"text": "t"}
    executor = wrap_method_executor(
        lambda _id, seen: ResourceConstraints.get_entity_limit(seen),
        manager(stage, enable_degradation=enabled),
    )

    assert asyncio.run(executor.execute_with_resource_management("a", context)) == limit
    assert context == {"text": "t"}, "the caller's own is as it was"


# --- breakers ---------------------------------------------------------------------------------


def test_after_five_failures_an_executor_is_blocked_for_a_minute_and_others_are_not(
    world: World, stage: Stage
) -> None:
    ours, ran = manager(stage), []
    executor = wrap_method_executor(lambda executor_id, _context: ran.append(executor_id), ours)
    fail(stage, 4)
    assert ours.can_execute("D3-Q3") == (True, "")
    fail(stage, 1)

    with pytest.raises(CircuitOpen) as blocked:
        run(executor)
    assert blocked.value.retry_after_s == pytest.approx(60, abs=1)
    can_execute, reason = ours.can_execute("D3-Q3")
    assert not can_execute
    assert "its circuit is open" in reason
    run(executor, "D4-Q2")
    world.sleep(61)
    run(executor)
    assert ran == ["D4-Q2", "D3-Q3"], "it was not run while it was open"


def test_three_probes_that_end_well_close_it(world: World, stage: Stage) -> None:
    ours = manager(stage)
    executor = wrap_method_executor(lambda *_: None, ours)
    fail(stage, 5)
    world.sleep(61)

    states = []
    for _ in range(3):
        run(executor)
        states.append(ours.get_executor_metrics("D3-Q3")["circuit_breaker_state"])

    assert states == ["half-open", "half-open", "closed"]


def test_a_breaker_is_read_and_reset_by_its_executor(stage: Stage) -> None:
    ours = manager(stage)
    fail(stage, 5)

    breaker = ours.circuit_breakers["D3-Q3"]
    assert (breaker.state, breaker.failure_count) == ("open", 5)
    assert breaker.last_failure_time is not None
    assert ours.reset_circuit_breaker("D3-Q3") is True
    assert (breaker.state, breaker.failure_count) == ("closed", 0)
    assert ours.reset_circuit_breaker("nobody") is False


def test_without_breakers_nothing_is_blocked(stage: Stage) -> None:
    ours = manager(stage, enable_circuit_breakers=False)
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
def test_what_turns_the_platforms_breakers_off_turns_these_off(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, enabled: str
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_ENABLED", enabled)
    monkeypatch.setattr(
        resource_manager, "store_settings", StoreSettings
    )  # read anew, and not kept
    ours = manager(stage)
    executor = wrap_method_executor(broken, ours)
    for _ in range(5):
        with pytest.raises(ConnectionError):
            run(executor)

    assert ours.can_execute("D3-Q3")[0] == (enabled == "false")


# --- metrics ----------------------------------------------------------------------------------


def test_metrics_are_those_of_source_document_1(world: World, stage: Stage) -> None:
    memory = iter([512.0, 1024.0, 256.0])
    ours = manager(stage, clock=world.time, memory_mb=lambda: next(memory))

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


def test_an_executor_that_never_ran_has_no_successes(stage: Stage) -> None:
    found = manager(stage).get_executor_metrics("new")

    assert (found["total_executions"], found["success_rate_percent"], found["avg_duration_ms"]) == (
        0,
        0.0,
        0.0,
    )


def test_what_is_blocked_or_cancelled_is_not_counted(stage: Stage) -> None:
    ours = manager(stage)
    fail(stage, 5)
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


def test_a_registered_policy_and_the_limits_bound_the_workers_under_pressure(stage: Stage) -> None:
    ours = manager(stage, resource_limits=ResourceLimits(max_memory_mb=5 * 1024, min_workers=8))
    ours.register_allocation_policy(
        ResourceAllocationPolicy(
            executor_id="D5-Q2", priority=ExecutorPriority.HIGH, is_memory_intensive=True
        )
    )

    budgets = {}
    for stage.pressed in Level:
        budgets[stage.pressed.label] = (ours.worker_budget("D5-Q2"), ours.worker_budget("other"))

    assert budgets == {
        "normal": (5, 32),
        "elevated": (5, 26),
        "high": (4, 20),
        "critical": (3, 14),
        "emergency": (2, 8),
    }


def test_the_status_has_all_that_source_document_1_lists(stage: Stage) -> None:
    ours = manager(stage)
    fail(stage, 5, "D4-Q2")
    run(wrap_method_executor(lambda *_: None, ours), "D3-Q3")
    stage.pressed = Level.HIGH

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


def test_a_change_of_pressure_is_told_once_to_alerts_and_callback(stage: Stage) -> None:
    told: list[ResourcePressureEvent] = []
    ours, alerts = create_resource_manager(alert_callback=told.append, client=stage)
    fail(stage, 5)
    fail(stage, 1, "D4-Q2")
    for stage.pressed in (Level.NORMAL, Level.CRITICAL, Level.CRITICAL, Level.NORMAL):
        run(wrap_method_executor(lambda *_: None, ours), "D1-Q1")

    assert [event.pressure_level for event in told] == ["critical", "normal"]
    worst = told[0]
    assert (worst.cpu_percent, worst.memory_mb, worst.worker_count, worst.message) == (
        70,
        3000,
        8,
        "pressure is critical",
    )
    assert worst.active_executors == 1, "the one that saw it"
    assert "use_simplified_methods" in worst.degradation_applied
    assert list(worst.circuit_breakers_open) == ["D3-Q3"]
    assert alerts is stage.alerts
    assert {alert.kind for alert in stage.alerts.history()} == {
        "pressure.changed",
        "breaker.opened",
        "degradation.started",
    }


def test_without_alerts_only_the_callback_is_told(stage: Stage) -> None:
    told: list[ResourcePressureEvent] = []
    ours, alerts = create_resource_manager(
        enable_alerts=False, alert_callback=told.append, client=stage
    )
    stage.pressed = Level.EMERGENCY

    assert ours.current_pressure == "emergency"
    assert alerts is None
    assert (len(told), stage.alerts.history()) == (1, [])


def test_a_callback_that_fails_fails_no_execution(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(_event: ResourcePressureEvent) -> None:
        raise RuntimeError("no pager")

    stage.pressed = Level.HIGH
    executor = wrap_method_executor(lambda *_: "done", manager(stage, alert_callback=callback))

    with caplog.at_level(logging.ERROR):
        assert run(executor) == "done"
    assert "the alert callback failed: pressure is high" in caplog.text


def test_a_change_while_redis_is_away_is_told_when_it_answers(stage: Stage) -> None:
    told: list[ResourcePressureEvent] = []
    ours = manager(stage, alert_callback=told.append)
    executor = wrap_method_executor(lambda *_: "done", ours)
    stage.pressed, stage.lost = Level.HIGH, True

    assert run(executor) == "done"
    assert told == []
    stage.lost = False
    assert run(executor) == "done"
    assert [event.pressure_level for event in told] == ["high"]


# --- orchestrators ----------------------------------------------------------------------------


def test_an_orchestrator_gets_manager_and_alerts_and_keeps_its_limits(stage: Stage) -> None:
    orchestrator = SimpleNamespace(resource_limits=ResourceLimits(max_workers=8))
    integrate_with_orchestrator(
        orchestrator,
        enable_circuit_breakers=True,
        enable_degradation=True,
        enable_alerts=True,
        client=stage,
    )

    assert orchestrator.alert_manager is stage.alerts
    assert orchestrator.resource_manager.worker_budget("any") == 8
    fail(stage, 5)
    status = get_resource_status(orchestrator)
    assert (status["current_pressure"], status["circuit_breakers"]["D3-Q3"]["state"]) == (
        "normal",
        "open",
    )
    assert reset_circuit_breakers(orchestrator) == {"D3-Q3": True}
    assert orchestrator.resource_manager.can_execute("D3-Q3") == (True, "")


@pytest.mark.parametrize("hook", [get_resource_status, reset_circuit_breakers])
def test_an_orchestrator_that_was_not_integrated_is_told_so(hook: Any) -> None:
    with pytest.raises(InvalidValue, match="call integrate_with_orchestrator first"):
        hook(SimpleNamespace())
