"""Counters that a request raises."""

from __future__ import annotations

import pytest

from rlm_tasks.errors import InvalidRequest
from rlm_tasks.metrics import emission
from rlm_tasks.metrics.declared import Counter
from rlm_tasks.requests import Options
from tests.unit.exposed_metrics import ExposedMetrics, exposed, folder

__all__ = ["exposed", "folder"]

RECORDS = Counter("unit_records_total", "Records.", {"domain": ("analytics", "billing")})


def test_a_request_adds_to_declared_counters(exposed: ExposedMetrics) -> None:
    options = Options(emitMetrics={"unit.records": 12, "domain": "billing"})
    emission.emit(options.emit_metrics)

    assert exposed["unit_records_total"] == {"domain=billing": 12}


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"unit.recrods": 1}, "emit_metrics='unit.recrods': declare it beside your operations"),
        ({"rlm.items": 1}, "emit_metrics='rlm.items': declare it beside your operations"),
        ({"unit.records": 1}, "unit.records needs 0 or more, and the labels domain"),
        (
            {"unit.records": -1, "domain": "billing"},
            "unit.records needs 0 or more, and the labels domain",
        ),
    ],
)
def test_a_request_with_undeclared_metrics_is_refused(
    metrics: dict[str, float | str], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        Options(emit_metrics=metrics)
