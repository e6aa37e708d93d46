"""What the environment says, also under the names of the source documents, and how a wrong value is told."""

from __future__ import annotations

from typing import Any

import pytest

from rlm_tasks.celery import configuration
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.settings import Settings, settings


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("CIRCUIT_BREAKER_ENABLED", "false", lambda its: its.breakers.enabled is False),
        ("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "7", lambda its: its.breakers.failure_threshold == 7),
        ("RLM_BREAKERS__FAILURE_THRESHOLD", "8", lambda its: its.breakers.failure_threshold == 8),
        ("ENABLE_ADAPTIVE_TIMEOUTS", "0", lambda its: its.node.adaptive_timeouts is False),
        ("WORKFLOW_ACTIVITY_TIMEOUT_MINUTES", "30", lambda its: its.node.item_limit_s == 1800),
        ("WORKFLOW_MAX_CONCURRENT_ACTIVITIES", "100", lambda its: configuration(its)["worker_concurrency"] == 100),
        ("RLM_NODE__TIMEOUT_MULTIPLIERS", '{"parse": 2}', lambda its: its.node.timeout_multipliers == {"parse": 2.0}),
        ("RLM_GUARD_TIMEOUT_S", "0.5", lambda its: its.guard_timeout_s == 0.5),
    ],
)
def test_a_variable_is_read(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, found: Any) -> None:
    monkeypatch.setenv(variable, value)

    assert found(Settings())


def test_our_own_name_wins_over_a_document_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "7")
    monkeypatch.setenv("RLM_BREAKERS__FAILURE_THRESHOLD", "9")

    assert Settings().breakers.failure_threshold == 9


def test_a_wrong_value_is_told_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLM_NODE__TIMEOUT_MULTIPLIERS", '{"parse": 0}')
    settings.cache_clear()

    with pytest.raises(InvalidRequest, match="RLM_NODE__TIMEOUT_MULTIPLIERS__PARSE=0: Input should be greater than 0"):
        settings()
    settings.cache_clear()
