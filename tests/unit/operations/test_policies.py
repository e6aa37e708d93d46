"""The allocation policy that holds for an operation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks.operations.policies import policies, policy_of, priority_for
from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from scheduler.allocation import ResourceAllocationPolicy
from scheduler.settings import AllocationSettings


def operation(name: str = "op", **policy: Any) -> Operation:
    allocation = ResourceAllocationPolicy(executor_id=name, **policy) if policy else None
    return Operation(name, lambda item: item, allocation=allocation)


def with_file(tmp_path: Path, *entries: dict[str, Any]) -> Settings:
    path = tmp_path / "policies.json"
    path.write_text(json.dumps(entries))
    return Settings(namespace="unit", allocation=AllocationSettings(policies=str(path)))


@pytest.mark.parametrize(
    ("in_file", "own", "expected"),
    [(True, True, 3), (True, False, 3), (False, True, 5), (False, False, 32)],
)
def test_the_policy_of_the_operator_counts_before_that_of_the_operation(
    tmp_path: Path, in_file: bool, own: bool, expected: int
) -> None:
    settings = (
        with_file(tmp_path, {"operation": "op", "max_workers": 3})
        if in_file
        else Settings(namespace="unit")
    )
    asked = operation(max_workers=5) if own else operation()
    assert policy_of(asked, policies(settings)).max_workers == expected


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        ("critical", "low", "critical"),
        ("low", "critical", "low"),
        ("normal", "high", "high"),
        ("high", "critical", "critical"),
    ],
)
def test_the_priority_of_an_operation_raises_or_lowers_that_of_its_jobs(
    own: str, asked: str, expected: str
) -> None:
    assert (
        priority_for(operation(priority=own), policies(Settings(namespace="unit")), asked)
        == expected
    )
