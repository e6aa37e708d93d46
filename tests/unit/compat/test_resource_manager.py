"""The adaptive resource manager, on real breakers and alerts; pressure and usage are in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.breaker import CircuitBreakers, CircuitOpen
from resilience.degradation import Level, ResourceConstraints
from resilience.errors import BulkheadFull, InvalidValue, StoreUnavailable
from resilience.keys import Keys
from resilience.settings import StoreSettings
from rlm_tasks import (
    AlertChannel,
    CircuitBreakerConfig,
    ResourceAlertManager,
    ResourcePressureLevel,
)
from rlm_tasks.compat import resource_manager
from rlm_tasks.compat.own_process import OwnProcess
from rlm_tasks.compat.resource_manager import (
    AdaptiveResourceManager,
    ResourceAwareExecutor,
    create_resource_manager,
    get_resource_status,
    integrate_with_orchestrator,
    reset_circuit_breakers,
    wrap_method_executor,
)
from rlm_tasks.settings.model import Settings
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
        self.settings = Settings(namespace="unit")
        self.session = SimpleNamespace(store=world.store(), events=None)
        self.workers = 8
        self.pressed, self.lost = Level.NORMAL, False
        self.pressure = SimpleNamespace(level=lambda: self.pressed)

    def status(self) -> Any:
        if self.lost:
            raise StoreUnavailable("redis://fake", "cut off by the test")
        load = {**LOAD, "worker_count": self.workers}
        picture = {"resource_usage": load, "recent_pressure_events": EVENTS}
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
    process = OwnProcess(memory_mb=lambda: next(memory))
    ours = manager(client, clock=world.time, process=process, enable_degradation=False)

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


def test_the_documents_executors_have_their_priorities_in_the_manager(client: FakeClient) -> None:
    ours, client.pressed = manager(client), Level.EMERGENCY

    budgets = {each: ours.worker_budget(each) for each in ("D3-Q3", "D4-Q2", "D3-Q2", "D1-Q1")}

    assert budgets == {"D3-Q3": 32, "D4-Q2": 32, "D3-Q2": 11, "D1-Q1": 4}


def test_the_file_of_policies_acts_in_the_manager(client: FakeClient, tmp_path: Path) -> None:
    file = tmp_path / "policies.json"
    file.write_text(
        json.dumps([{"operation": "D3-Q3", "priority": "low", "minWorkers": 1, "maxWorkers": 2}])
    )
    client.settings = Settings(namespace="unit", allocation={"policies": str(file)})
    ours, client.pressed = manager(client), Level.CRITICAL

    assert ours.worker_budget("D3-Q3") == 1


def test_limits_may_be_changed_and_act_at_once(client: FakeClient) -> None:
    limits = ResourceLimits(max_memory_mb=100.0)
    ours = manager(client, resource_limits=limits, process=OwnProcess(memory_mb=lambda: 96.0))
    assert ours.current_pressure == "emergency"

    limits.max_memory_mb = 16384.0
    limits.max_workers = 7

    assert (ours.current_pressure, ours.worker_budget("any")) == ("normal", 7)
    with pytest.raises(InvalidValue, match="min_workers=4: must be at most max_workers=3"):
        limits.max_workers = 3
    with pytest.raises(InvalidValue, match="max_memory_mb=-1"):
        limits.max_memory_mb = -1
    assert limits.max_workers == 7, "a refused change changes nothing"


@pytest.mark.parametrize(
    ("memory_mb", "cpu_s", "level"),
    [
        (64.0, 0.0, "normal"),
        (66.0, 0.0, "elevated"),
        (90.0, 0.0, "critical"),
        (99.0, 0.0, "emergency"),
        (0.0, 10 * 0.5, "elevated"),  # 50 % of two CPUs, of at most 70 %
        (0.0, 10 * 2.0, "high"),  # CPU alone reaches no further
    ],
)
def test_the_manager_measures_its_own_process(
    client: FakeClient, memory_mb: float, cpu_s: float, level: str
) -> None:
    times, used = iter([0.0, 10.0, 10.0, 10.0]), iter([0.0, cpu_s * 2])
    process = OwnProcess(
        memory_mb=lambda: memory_mb, cpu_s=lambda: next(used), clock=lambda: next(times), cpus=2
    )
    limits = ResourceLimits(max_memory_mb=100.0, max_cpu_percent=70.0)

    assert manager(client, resource_limits=limits, process=process).current_pressure == level


def test_without_a_worker_the_status_has_the_load_of_this_process(client: FakeClient) -> None:
    client.workers = 0
    process = OwnProcess(memory_mb=lambda: 300.0)

    usage = manager(client, process=process).get_resource_status()["resource_usage"]

    assert (usage["memory_mb"], usage["memory_percent"], usage["worker_count"]) == (300.0, 7.3, 0)


def test_no_more_runs_of_an_executor_than_its_budget_are_at_work(client: FakeClient) -> None:
    ours = manager(client)
    ours.register_allocation_policy(
        ResourceAllocationPolicy(executor_id="one", min_workers=1, max_workers=1)
    )
    most: list[int] = []

    async def busy(_id: str, _context: dict[str, Any]) -> None:
        most.append(len(ours.get_resource_status()["active_executors"]))
        assert ours._turns.total() == 1
        await asyncio.sleep(0)

    async def all_at_once() -> None:
        executor = wrap_method_executor(busy, ours)
        each = (executor.execute_with_resource_management("one", {}) for _ in range(5))
        await asyncio.gather(*each)

    asyncio.run(all_at_once())
    assert most == [1] * 5


def test_a_thread_waits_for_its_turn_and_a_cancelled_coroutine_leaves_the_line(
    client: FakeClient,
) -> None:
    ours = manager(client)
    ours.register_allocation_policy(
        ResourceAllocationPolicy(executor_id="one", min_workers=1, max_workers=1)
    )
    order: list[str] = []

    def second() -> None:
        with ours.executing("one"):
            order.append("second")

    async def impatient() -> None:
        waiting = wrap_method_executor(lambda *_: order.append("never"), ours)
        task = asyncio.create_task(waiting.execute_with_resource_management("one", {}))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(BulkheadFull, match="one: its worker budget is used up"):
            second()

    with ours.executing("one"):
        asyncio.run(impatient())
        thread = threading.Thread(target=second)
        thread.start()
        order.append("first")
    thread.join(10)

    assert order == ["first", "second"]


def test_the_breakers_of_executors_have_the_configuration_of_the_document(
    client: FakeClient,
) -> None:
    config = CircuitBreakerConfig(
        failure_threshold=2,
        timeout_seconds=60.0,
        half_open_timeout=30.0,
        memory_threshold_mb=2048.0,
        success_threshold=3,
    )
    ours = manager(client, circuit_breaker_config=config)

    for _ in range(2):
        with pytest.raises(ConnectionError):
            run(wrap_method_executor(broken, ours))

    assert ours.circuit_breakers["D3-Q3"].state == "open"


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
    assert status["worker_budgets"] == {"D3-Q3": 32}, "critical work keeps its share"
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


def test_an_alert_manager_has_channels_and_a_webhook(client: FakeClient) -> None:
    alerts = ResourceAlertManager(
        channels=[AlertChannel.LOG, AlertChannel.WEBHOOK],
        webhook_url="https://alerts.example.com/webhook",
        client=client,
    )
    event = ResourcePressureEvent(
        timestamp=datetime(2027, 1, 15, tzinfo=UTC),
        pressure_level=ResourcePressureLevel.CRITICAL,
        cpu_percent=10.0,
        memory_mb=3500.0,
        memory_percent=20.0,
        worker_count=8,
        active_executors=5,
    )

    assert (alerts.channels, alerts.webhook_url) == (
        ("log", "webhook"),
        "https://alerts.example.com",
    )
    called: list[Any] = []
    signal = ResourceAlertManager(["signal"], signal_callback=called.append, client=client)
    assert signal.process_event(event) == called != []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": ["pager"]}, "channels='pager': must be one of log, webhook, signal, stdout"),
        ({"channels": ["webhook"]}, "webhook"),
        ({"channels": ["signal"]}, "signal_callback=None"),
    ],
)
def test_an_alert_manager_refuses_what_it_cannot_use(
    client: FakeClient, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValue, match=message):
        ResourceAlertManager(**options, client=client)
