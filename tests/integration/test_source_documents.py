"""The blocks of the documents about resource management, as they are written there.

`test_source_examples` has the blocks of the first document.  `NOT_RUN` lists the other blocks, with
the reason.  Only the module of the imports differs, and each manager gets the client of the tests.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

import rlm_tasks
from resilience import with_circuit_breaker, with_retry
from rlm_tasks import (
    AlertChannel,
    CircuitBreakerConfig,
    Client,
    ExecutorPriority,
    OptimizationConfig,
    ResourceAllocationPolicy,
    ResourceConstraints,
    ResourceLimits,
    ResourcePressureEvent,
    ResourcePressureLevel,
    get_resource_status,
    integrate_with_orchestrator,
    reset_circuit_breakers,
    wrap_method_executor,
)

NOT_RUN = {
    "0: connection pooling; distributed tracing": "keys of clients and their pools are to come; "
    "tracing is configured by variables (docs/tracing.md)",
    "0: caching strategies": "a cache of results is to come",
    "0: pre-warming": "client.prewarm is to come",
    "0: dynamic resource allocation; resource quotas": "sessions are to come",
    "0: input sanitization; audit logging; encryption": "security is to come",
    "0: organisations; policies; compliance": "enterprise features are to come",
    "1: pytest tests/test_resource_manager.py": "it names the document's own test file",
    "2: ExecutorCore": "the document's executor; jobs of this platform take its place "
    "(docs/optimization.md)",
    "3: ResourceProfile, ScalingPlan, LoadBalancing, ColdStartStrategy": "tables of numbers, not "
    "code; docs/pressure.md and docs/deployment.md have them as settings",
    "4: start_enterprise_worker.sh, test_enterprise_scale.py": "scripts of the document's project; "
    "projects are to come",
}
"""Blocks that do not run here, with the reason."""


@pytest.fixture
def create_resource_manager(client: Client) -> Any:
    return functools.partial(rlm_tasks.create_resource_manager, client=client)


@pytest.fixture
def resource_limits() -> ResourceLimits:
    return ResourceLimits(max_memory_mb=4096.0, max_cpu_percent=85.0, max_workers=32)


@pytest.fixture
def orchestrator(client: Client, resource_limits: ResourceLimits) -> Any:
    orchestrator = SimpleNamespace(resource_limits=resource_limits)
    integrate_with_orchestrator(
        orchestrator,
        enable_circuit_breakers=True,
        enable_degradation=True,
        enable_alerts=True,
        client=client,
    )
    yield orchestrator
    reset_circuit_breakers(orchestrator)


def test_document_1_basic_setup(
    create_resource_manager: Any, resource_limits: ResourceLimits, orchestrator: Any
) -> None:
    resource_manager, alert_manager = create_resource_manager(
        resource_limits=resource_limits,
        enable_circuit_breakers=True,
        enable_degradation=True,
        enable_alerts=True,
    )

    assert resource_manager.resource_limits is resource_limits
    assert alert_manager.channels == ("log",)
    assert orchestrator.resource_manager.resource_limits is resource_limits


def test_document_1_using_resource_aware_executor(orchestrator: Any) -> None:
    async def method_executor(executor_id: str, context: dict[str, Any]) -> Any:
        return executor_id, context["pressure_level"], context["tables"]

    async def run() -> Any:
        resource_aware_executor = wrap_method_executor(
            method_executor=method_executor,
            resource_manager=orchestrator.resource_manager,
        )
        return await resource_aware_executor.execute_with_resource_management(
            executor_id="D3-Q3",
            context={"document_text": "...", "tables": []},
        )

    assert asyncio.run(run()) == ("D3-Q3", "normal", [])


class Executor:
    """The document's executor that does less under pressure."""

    def _simplified_execution(self, context: dict[str, Any]) -> str:
        return "simplified"

    def _simple_method(self, context: dict[str, Any], max_entities: int) -> str:
        return f"simple, {max_entities}"

    def _complex_method(self, context: dict[str, Any], max_entities: int) -> str:
        return f"complex, {max_entities}"

    def execute(self, context: dict[str, Any]) -> Any:
        # Check if expensive computations should be skipped
        if ResourceConstraints.should_skip_expensive_computation(context):
            return self._simplified_execution(context)

        # Get entity limit with degradation applied
        max_entities = ResourceConstraints.get_entity_limit(context, default=1000)

        # Check if simplified methods should be used
        if ResourceConstraints.should_use_simplified_methods(context):
            method = self._simple_method
        else:
            method = self._complex_method

        return method(context, max_entities=max_entities)

    def analyze_document(self, context: dict[str, Any]) -> Any:
        constraints = ResourceConstraints.get_constraints(context)

        if constraints["use_simplified_methods"]:
            return ["simple"]

        max_chunks = ResourceConstraints.get_entity_limit(context, default=1000)

        results = [max_chunks]

        if not constraints["skip_optional_analysis"]:
            results.append("insights")

        return results


@pytest.mark.parametrize(
    ("level", "executed", "analysed"),
    [
        ("normal", "complex, 1000", [1000, "insights"]),
        ("elevated", "complex, 800", [800, "insights"]),
        ("high", "simplified", [800]),
        ("critical", "simplified", ["simple"]),
        ("emergency", "simplified", ["simple"]),
    ],
)
def test_document_1_applying_degradation(level: str, executed: str, analysed: list[Any]) -> None:
    context = {"pressure_level": level}

    assert Executor().execute(context) == executed
    assert Executor().analyze_document(context) == analysed


def test_document_1_custom_allocation_policies(orchestrator: Any) -> None:
    resource_manager = orchestrator.resource_manager
    policy = ResourceAllocationPolicy(
        executor_id="D5-Q2",
        priority=ExecutorPriority.HIGH,
        min_memory_mb=256.0,
        max_memory_mb=1024.0,
        min_workers=2,
        max_workers=6,
        is_memory_intensive=True,
    )
    resource_manager.register_allocation_policy(policy)
    resource_manager.register_allocation_policy(
        ResourceAllocationPolicy(
            executor_id="D1-Q3",  # Budget allocation
            priority=ExecutorPriority.HIGH,
            min_memory_mb=256.0,
            max_memory_mb=768.0,
            min_workers=2,
            max_workers=6,
        )
    )

    budgets = [resource_manager.worker_budget(each) for each in ("D5-Q2", "D1-Q3")]
    assert budgets == [4, 5], "as many as fit into 4096 MB"


def test_document_1_monitoring_and_alerts(
    client: Client, orchestrator: Any, resource_limits: ResourceLimits
) -> None:
    status = get_resource_status(orchestrator)
    assert status["current_pressure"] == "normal"
    assert status["active_executors"] == []
    assert isinstance(status["circuit_breakers"], dict)

    alert_manager = rlm_tasks.ResourceAlertManager(
        channels=[AlertChannel.LOG, AlertChannel.WEBHOOK],
        webhook_url="https://alerts.example.com/webhook",
        client=client,
    )
    assert alert_manager.channels == ("log", "webhook")

    events = []

    def custom_alert_handler(event: ResourcePressureEvent) -> None:
        events.append(f"ALERT: {event.pressure_level} - {event.message}")

    resource_manager = rlm_tasks.AdaptiveResourceManager(
        resource_limits=ResourceLimits(max_memory_mb=1.0),
        alert_callback=custom_alert_handler,
        client=client,
    )
    assert resource_manager.current_pressure == "emergency", "this process is larger than 1 MB"
    assert events == ["ALERT: emergency - pressure is emergency"]


def test_document_1_circuit_breaker_management(client: Client, resource_limits: Any) -> None:
    config = CircuitBreakerConfig(
        failure_threshold=5,  # Open after 5 failures
        timeout_seconds=60.0,  # Stay open for 60s
        half_open_timeout=30.0,  # Half-open state duration
        memory_threshold_mb=2048.0,  # Open if memory exceeds 2GB
        success_threshold=3,  # Close after 3 successes in half-open
    )
    orchestrator = SimpleNamespace(resource_limits=resource_limits)
    integrate_with_orchestrator(orchestrator, client=client, circuit_breaker_config=config)
    resource_manager = orchestrator.resource_manager

    def failing(executor_id: str, context: dict[str, Any]) -> None:
        raise ConnectionError("its service is down")

    async def fail() -> None:
        executor = wrap_method_executor(failing, resource_manager)
        for _ in range(5):
            with pytest.raises(ConnectionError):
                await executor.execute_with_resource_management("D2-Q1", {})

    asyncio.run(fail())
    can_execute, reason = resource_manager.can_execute("D2-Q1")
    assert not can_execute
    assert "open" in reason

    # Monitor circuit breakers; breaker stuck open
    status = resource_manager.get_resource_status()
    open_breakers = [
        executor_id
        for executor_id, breaker in status["circuit_breakers"].items()
        if breaker["state"] == "open"
    ]
    assert "D2-Q1" in open_breakers
    breaker = resource_manager.circuit_breakers["D2-Q1"]
    assert (f"{breaker.state}", breaker.failure_count) == ("open", 5)
    assert breaker.last_failure_time
    metrics = resource_manager.get_executor_metrics("D2-Q1")
    assert (metrics["total_executions"], metrics["failed_executions"]) == (5, 5)
    assert metrics["circuit_breaker_state"] == "open"

    success = resource_manager.reset_circuit_breaker("D2-Q1")
    assert success
    assert reset_circuit_breakers(orchestrator)["D2-Q1"]
    assert resource_manager.can_execute("D2-Q1") == (True, "")


def test_document_1_excessive_degradation(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    resource_limits = ResourceLimits(max_memory_mb=8.0, max_workers=32, min_workers=4)
    resource_manager, _ = rlm_tasks.create_resource_manager(resource_limits, client=client)
    with caplog.at_level(logging.CRITICAL):
        assert resource_manager.current_pressure == "emergency"

    status = resource_manager.get_resource_status()
    for event in status["recent_pressure_events"]:
        assert {"timestamp", "level", "message"} <= event.keys()

    resource_limits.max_memory_mb = 16384.0  # Increase limit
    assert resource_manager.current_pressure == "normal"


def test_document_1_missing_alerts(create_resource_manager: Any) -> None:
    _, alert_manager = create_resource_manager()
    before = alert_manager.get_alert_summary()["total_alerts"]

    test_event = ResourcePressureEvent(
        timestamp=datetime.utcnow(),  # as the document writes it
        pressure_level=ResourcePressureLevel.CRITICAL,
        cpu_percent=90.0,
        memory_mb=3500.0,
        memory_percent=87.5,
        worker_count=8,
        active_executors=5,
        degradation_applied=["use_simplified_methods"],
        circuit_breakers_open=["D3-Q3"],
        message="Test alert",
    )
    alerts = alert_manager.process_event(test_event)

    assert alerts, "at least one kind is not held back"
    summary = alert_manager.get_alert_summary()
    assert summary["total_alerts"] == before + len(alerts)


def test_document_2_optimization_config() -> None:
    config = OptimizationConfig(
        # Error handling settings
        enable_optimized_error_handling=True,
        enable_circuit_breaker=True,
        error_cache_size=50,
        circuit_breaker_failure_threshold=10,
        circuit_breaker_recovery_timeout_seconds=60,
    )
    assert config.validate() == []

    # Reduce object pool size
    config = OptimizationConfig(
        object_pool_max_size=20,
        object_pool_cleanup_threshold=0.6,
    )
    # Enable memory pressure detection
    config.enable_memory_optimization = True
    # Limit concurrency
    config.max_concurrent_executions = 5
    # Enable error caching
    config.enable_optimized_error_handling = True
    issues = config.validate()

    assert issues == []
    assert config.as_environment()["RLM_SLOTS"] == "5"


@pytest.mark.parametrize(
    ("block", "failures"),
    [
        (
            # Latency-sensitive applications
            {
                "enable_step_optimization": True,
                "enable_algorithm_optimization": True,
                "telemetry_batch_size": 5,
                "telemetry_flush_interval_seconds": 10.0,
                "circuit_breaker_failure_threshold": 5,
                "circuit_breaker_recovery_timeout_seconds": 30,
            },
            "5",
        ),
        (
            # Example 2: Real-Time API Service
            {
                "enable_step_optimization": True,
                "enable_algorithm_optimization": True,
                "telemetry_batch_size": 5,
                "telemetry_flush_interval_seconds": 10.0,
                "circuit_breaker_failure_threshold": 3,
                "circuit_breaker_recovery_timeout_seconds": 30,
                "object_pool_max_size": 20,
                "cache_max_size": 100,
            },
            "3",
        ),
        (
            # Issue: Frequent Errors
            {
                "enable_circuit_breaker": True,
                "circuit_breaker_failure_threshold": 5,
                "circuit_breaker_recovery_timeout_seconds": 30,
            },
            "5",
        ),
    ],
)
def test_document_2_breakers_of_the_examples(block: dict[str, Any], failures: str) -> None:
    config = OptimizationConfig(**block)
    config.enable_optimized_error_handling = True

    assert config.validate() == []
    environment = config.as_environment()
    assert environment["RLM_BREAKERS__FAILURE_THRESHOLD"] == failures
    assert environment["RLM_BREAKERS__RECOVERY_TIMEOUT_S"] == "30"


def test_document_4_circuit_breakers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_REDIS_URL", client.settings.redis_url)

    @with_circuit_breaker("agent-factory", failure_threshold=5)
    @with_retry(max_attempts=5, service="agent-factory")
    async def call_agent_factory(client: Client, execution_input: int) -> Any:
        return client.execute(operation="sum", items=range(execution_input), timeout=30).output

    assert asyncio.run(call_agent_factory(client, 4)) == 6


def test_each_block_that_does_not_run_has_its_reason() -> None:
    assert all(reason for reason in NOT_RUN.values())
    assert {name.split(":")[0] for name in NOT_RUN} == set("01234")
