"""Settings read from environment variables, under each of their names."""

from __future__ import annotations

from typing import Any

import pytest

from rlm_tasks.celery import configuration
from rlm_tasks.settings.model import Settings


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_REDIS_URL", "redis://somewhere:1/2")
    monkeypatch.setenv("RLM_LEDGER__LEASE_S", "3")
    monkeypatch.setenv("RLM_OPERATIONS", "a.b, c")

    found = Settings()

    assert (found.redis_url, found.broker_url, found.result_backend) == (
        "redis://somewhere:1/2",
    ) * 3
    assert (found.ledger.lease_s, found.ledger.sweep_s) == (3.0, 5.0)
    assert found.operations == ("a.b", "c")


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("CIRCUIT_BREAKER_ENABLED", "false", lambda its: its.breakers.enabled is False),
        ("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "7", lambda its: its.breakers.failure_threshold == 7),
        ("RLM_BREAKERS__FAILURE_THRESHOLD", "8", lambda its: its.breakers.failure_threshold == 8),
        ("ENABLE_ADAPTIVE_TIMEOUTS", "0", lambda its: its.node.adaptive_timeouts is False),
        ("WORKFLOW_ACTIVITY_TIMEOUT_MINUTES", "30", lambda its: its.node.item_limit_s == 1800),
        (
            "WORKFLOW_MAX_CONCURRENT_ACTIVITIES",
            "100",
            lambda its: configuration(its)["worker_concurrency"] == 100,
        ),
        (
            "RLM_NODE__TIMEOUT_MULTIPLIERS",
            '{"parse": 2}',
            lambda its: its.node.timeout_multipliers == {"parse": 2.0},
        ),
        ("RLM_GUARD_TIMEOUT_S", "0.5", lambda its: its.guard_timeout_s == 0.5),
        ("WORKFLOW_MAX_CONCURRENT_WORKFLOWS", "50", lambda its: its.admission.max_jobs == 50),
        ("ENABLE_DYNAMIC_SCALING", "false", lambda its: its.autoscale.enabled is False),
    ],
)
def test_a_variable_is_read(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, found: Any
) -> None:
    monkeypatch.setenv(variable, value)

    assert found(Settings())


def test_the_rlm_name_counts_before_the_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "7")
    monkeypatch.setenv("RLM_BREAKERS__FAILURE_THRESHOLD", "9")

    assert Settings().breakers.failure_threshold == 9
