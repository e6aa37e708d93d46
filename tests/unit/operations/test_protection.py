"""The protection that an operation declares."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.bulkhead import Elastic
from resilience.errors import InvalidValue
from resilience.retry import RetryPolicy
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs import item_failures as item_failures  # registers Celery's exceptions
from rlm_tasks.operations.protection import protection


@pytest.mark.parametrize(
    ("about", "error", "message"),
    [
        ({"breaker": "fast"}, InvalidValue, "preset='fast': unknown"),
        (
            {"breaker": 5},
            InvalidValue,
            "breaker=5: must be a preset's name, a BreakerConfig or a dict of its fields",
        ),
        ({"breaker": {"failure_treshold": 3}}, InvalidValue, "failure_treshold=3: unknown field"),
        ({"cost": len}, InvalidRequest, "declare rate_limit=..., too"),
        ({"weight": 5}, InvalidRequest, "weight=5: .* declare bulkhead=..., too"),
        ({"weight": 0, "bulkhead": 5}, InvalidRequest, "weight=0: must be above 0 and at most 5"),
        ({"weight": "1", "bulkhead": 5}, InvalidRequest, "weight='1': must be above 0"),
        ({"weight": 9, "bulkhead": Elastic(5, 8)}, InvalidRequest, "weight=9: .* at most 8"),
        (
            {"weight": 3, "bulkhead": "constrained", "per_host": 2},
            InvalidRequest,
            "weight=3: .* at most 2",
        ),
        ({"timeout_s": 0}, InvalidRequest, "timeout_s=0"),
        ({"retry": 0}, InvalidValue, "max_attempts=0"),
        ({"retry": True}, InvalidRequest, "retry=True: must be a RetryPolicy"),
        ({"retry": {"maxRetrys": 3}}, InvalidValue, "maxRetrys"),
    ],
)
def test_a_wrong_declaration_is_refused_at_once(
    about: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        protection("op", about)


def test_a_fallback_alone_guards_calls() -> None:
    assert protection("op", {"fallback": len}).guards_calls


def test_a_retry_is_a_number_of_attempts_a_dict_or_a_policy() -> None:
    policy = RetryPolicy(max_attempts=3)

    for given in (3, {"max_attempts": 3}, {"maxRetries": 2}, policy):
        assert protection("unit", {"retry": given}).retry == policy
