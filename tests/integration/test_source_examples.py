"""Requests in the form of a TypeScript orchestrator, as Python dicts with camelCase keys.

Teams that migrate can send their requests unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from rlm_tasks import Client, InvalidRequest, Status, estimate_optimal_chunk_size

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
    leaves = [
        node for node in client.job(result.job_id).tree() if node.worked and node.id != "merge"
    ]
    assert all(50 <= node.hi - node.lo <= 500 for node in leaves)


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
            "input": {"items": [*range(0, 400, 2), 1, 3, 5], "operation": "fail_odd"},
            "options": {"continueOnError": True, "errorThreshold": 0.1},
        },
        timeout=60,
    )

    assert len(result.successful) == 200
    assert len(result.failed) == 3
    assert result.failure_rate == 3 / 203


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
