"""The protection that an operation declares."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.errors import InvalidValue
from rlm_tasks.errors import InvalidRequest
from rlm_tasks.jobs import item_failures as item_failures  # it says what Celery's exceptions mean
from rlm_tasks.operations.protection import protection


@pytest.mark.parametrize(
    ("about", "error", "told"),
    [
        ({"breaker": "fast"}, InvalidValue, "preset='fast': unknown"),
        (
            {"breaker": 5},
            InvalidValue,
            "breaker=5: must be a preset's name, a BreakerConfig or a dict of its fields",
        ),
        ({"breaker": {"failure_treshold": 3}}, InvalidValue, "failure_treshold=3: unknown field"),
        ({"cost": len}, InvalidRequest, "declare that, too"),
        ({"fallback": len}, InvalidRequest, "declare breaker"),
        ({"timeout_s": 0}, InvalidRequest, "timeout_s=0"),
        ({"retry": 0}, InvalidValue, "max_attempts=0"),
    ],
)
def test_a_declaration_that_makes_no_sense_is_told_when_it_is_made(
    about: dict[str, Any], error: type, told: str
) -> None:
    with pytest.raises(error, match=told):
        protection("op", about)
