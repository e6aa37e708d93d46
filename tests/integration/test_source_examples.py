"""Requests in the form of a TypeScript orchestrator, as Python dicts with camelCase keys.

Teams that migrate can send their requests unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from resilience import BreakerConfig, CircuitOpen, with_circuit_breaker, with_retry
from rlm_tasks import (
    Client,
    InvalidRequest,
    JobFailed,
    RlmError,
    Status,
    estimate_optimal_chunk_size,
)
from rlm_tasks.compat.resource_manager import AdaptiveResourceManager
from rlm_tasks.jobs.splitting import Reason

DATA = list(range(1, 1201))


def test_custom_decomposition_logic(client: Client) -> None:
    result = client.execute(
        {
            "type": "recursive",
            "description": "Custom recursive processing",
            "complexity": "quadratic",
            "input": {
                "items": DATA,
                "operation": "custom_merge",
                "decompositionStrategy": {
                    "maxDepth": 10,
                    "minChunkSize": 100,
                    "branchingFactor": 4,
                },
            },
            "options": {"maxDepth": 10, "timeoutMs": 300000, "priority": "high"},
        },
        timeout=60,
    )

    assert result.output == {"count": 1200, "first": 1, "last": 1200, "largest": 1200}
    assert (result.metrics.nodes, result.metrics.max_depth) == (1 + 12, 2)


def test_conditional_execution(client: Client) -> None:
    result = client.execute(
        {
            "type": "sequential",
            "description": "Conditional processing",
            "input": {
                "items": DATA,
                "operation": "conditional_process",
                "conditions": {
                    "skipIfEmpty": True,
                    "validateBeforeProcess": True,
                    "earlyTerminationThreshold": 0.95,
                },
            },
        },
        timeout=60,
    )

    assert result.status is Status.SUCCEEDED
    assert result.done >= 0.95 * len(DATA)
    assert result.output[0]["item"] == 1


def test_strategy_1_binary_split_is_the_default(client: Client) -> None:
    result = client.execute(
        {"type": "recursive", "complexity": "linear", "input": {"items": DATA, "operation": "sum"}},
        timeout=60,
    )

    assert result.output == sum(DATA)


def test_strategy_2_n_way_split(client: Client) -> None:
    result = client.execute(
        {
            "type": "recursive",
            "complexity": "linear",
            "input": {"items": DATA, "operation": "aggregate", "splitFactor": 8},
        },
        timeout=60,
    )

    assert (result.output["count"], result.output["mean"], result.output["max"]) == (
        1200,
        600.5,
        1200,
    )
    assert result.output["variance"] == pytest.approx((1200**2 - 1) / 12)


def test_strategy_3_adaptive_split(client: Client) -> None:
    result = client.execute(
        {
            "type": "recursive",
            "complexity": "quadratic",
            "input": {
                "items": DATA,
                "operation": "complex_process",
                "adaptiveSplit": {
                    "minChunkSize": 50,
                    "maxChunkSize": 500,
                    "targetExecutionTimeMs": 1000,
                },
            },
        },
        timeout=60,
    )

    assert [each["item"] for each in result.output] == DATA
    tree = client.job(result.job_id).tree()
    overdue = {node.id for node in tree if node.why == Reason.TARGET}
    parts = [
        node
        for node in tree
        # On a busy machine a part runs its target time, and a tail call goes on with its rest.
        if node.worked and node.id != "merge" and node.parent not in overdue
    ]
    assert all(50 <= node.hi - node.lo <= 500 for node in parts)


def test_optimize_chunk_sizes(client: Client) -> None:
    chunk = estimate_optimal_chunk_size(
        total_items=10000, estimated_item_processing_time_ms=5, target_parallelism=8
    )
    assert chunk == 1250

    result = client.execute(
        {
            "type": "parallel",
            "input": {"items": list(range(10000)), "operation": "process", "chunkSize": chunk},
        },
        timeout=60,
    )

    assert len(result.output) == 10000
    assert result.metrics.nodes == 1 + 8


def test_batching_multiple_operations(client: Client) -> None:
    data: list[list[Any]] = [[1, 2], ["a"], [{"x": 1}]]

    results = client.batch_execute(
        [
            {"type": "sequential", "description": f"Task {i}", "input": each}
            for i, each in enumerate(data, 1)
        ],
        timeout=60,
    )

    assert [[row["item"] for row in result.output] for result in results] == data


def test_partial_failure_handling(client: Client) -> None:
    result = client.execute(
        {
            "type": "parallel",
            "input": {"items": [*range(0, 400, 2), 1, 3, 5], "operation": "return_even"},
            "options": {"continueOnError": True, "errorThreshold": 0.1},
        },
        timeout=60,
    )

    assert len(result.output.successful) == 200
    assert len(result.output.failed) == 3
    assert result.output.failureRate == 3 / 203


def test_exponential_backoff(client: Client) -> None:
    result = client.execute_with_retry(
        {"type": "recursive", "description": "Critical task", "input": DATA},
        {
            "maxRetries": 5,
            "backoffMultiplier": 2,
            "initialDelayMs": 1000,
            "maxDelayMs": 30000,
            "retryableErrors": ["TIMEOUT", "RATE_LIMITED", "SERVICE_UNAVAILABLE"],
        },
    )

    assert len(result.output) == 1200


def test_circuit_breaker_pattern(client: Client) -> None:
    """The service is down: five executions fail, and the sixth is refused."""
    breaker = client.create_circuit_breaker(
        {"failureThreshold": 5, "recoveryTimeoutMs": 30000, "halfOpenMaxCalls": 3}
    )
    codes = []
    for _ in range(6):
        try:
            breaker.execute(
                lambda: client.execute(
                    {"type": "recursive", "input": {"items": [1, 3, 5], "operation": "fail_odd"}},
                    timeout=60,
                )
            )
        except (JobFailed, CircuitOpen) as error:
            codes.append(error.code)

    assert codes == ["JOB_FAILED"] * 5 + ["CIRCUIT_OPEN"]
    assert (breaker.state, breaker.failure_count) == ("open", 5)
    breaker.reset()
    assert breaker.execute(lambda: client.execute({"input": [1]}, timeout=60)).output


def test_circuit_breaker_pattern_falls_back_to_a_degraded_mode(client: Client) -> None:
    """The block as it stands: `error.code` tells an open circuit from other errors."""
    data, warnings = {"kind": "report"}, []
    breaker = client.create_circuit_breaker(
        {"failureThreshold": 5, "recoveryTimeoutMs": 30000, "halfOpenMaxCalls": 3}
    )

    def attempt() -> Any:
        try:
            return breaker.execute(lambda: client.execute({"type": "recursive", "input": data}))
        except RlmError as error:
            if error.code == "CIRCUIT_OPEN":
                # Fallback to degraded mode
                warnings.append("Service unavailable, using fallback")
            return None

    assert attempt().output[0]["item"] == data
    breaker.open()
    assert attempt() is None
    assert warnings == ["Service unavailable, using fallback"]
    breaker.reset()


def test_a_protected_call_with_a_breaker_outside_of_the_retries(client: Client) -> None:
    """The service is down; the breaker counts each call once, whatever its retries."""
    calls = []

    @with_circuit_breaker("agent-factory", failure_threshold=5, store=client.store)
    @with_retry(max_attempts=5, service="agent-factory", initial_delay_s=0.01, store=client.store)
    async def call_agent_factory(execution_input: int) -> int:
        calls.append(execution_input)
        raise ConnectionError("down")

    async def call_many() -> list[str]:
        outcomes = []
        for number in range(20):
            try:
                await call_agent_factory(number)
            except Exception as error:
                outcomes.append(type(error).__name__)
        return outcomes

    outcomes = asyncio.run(call_many())
    assert outcomes == ["ConnectionError"] * 5 + ["CircuitOpen"] * 15
    assert len(calls) == 5 * 5
    client.breakers.reset("agent-factory")


def test_breakers_of_executors(client: Client) -> None:
    """Document 1: an executor fails, is blocked, looked at and reset."""
    config = BreakerConfig(
        failure_threshold=5,
        timeout_seconds=60.0,
        half_open_timeout=30.0,
        memory_threshold_mb=2048.0,
        success_threshold=3,
    )
    resource_manager = AdaptiveResourceManager(client=client)
    breaker = client.breakers.get("D3-Q3", config)
    for _ in range(5):
        with pytest.raises(JobFailed), breaker.calling():
            client.execute(operation="fail_odd", items=[1], timeout=60)

    can_execute, reason = resource_manager.can_execute("D3-Q3")
    assert not can_execute
    assert "its circuit is open; come back in" in reason
    status = resource_manager.get_resource_status()
    assert [
        executor_id
        for executor_id, breaker in status["circuit_breakers"].items()
        if breaker["state"] == "open"
    ] == ["D3-Q3"]
    known = resource_manager.circuit_breakers["D3-Q3"]
    assert (known.state, known.failure_count) == ("open", 5)
    assert known.last_failure_time is not None

    assert resource_manager.reset_circuit_breaker("D3-Q3")
    assert resource_manager.can_execute("D3-Q3") == (True, "")


def test_priority_scheduling(client: Client) -> None:
    result = client.execute(
        {
            "type": "recursive",
            "description": "Critical analysis",
            "input": DATA,
            "options": {"priority": "critical"},
        },
        timeout=60,
    )

    assert len(result.output) == 1200


def test_a_dict_with_two_strategies_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="more than one strategy"):
        client.submit(
            {"input": {"items": [1], "operation": "sum", "splitFactor": 2, "adaptiveSplit": {}}}
        )
