"""Requests: fields that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from rlm_tasks import Options
from rlm_tasks.errors import InvalidRequest


@pytest.mark.parametrize(
    ("context", "field"),
    [
        ("00-xyz", "trace_context"),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "trace_id"),
        ({"traceId": "0"}, "trace_id"),
        ({"traceId": "abc", "parentSpanId": "span456"}, "parent_span_id"),
        ({"traceId": "a" * 33}, "trace_id"),
    ],
)
def test_a_wrong_trace_context_is_refused(context: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Options(trace_context=context)
