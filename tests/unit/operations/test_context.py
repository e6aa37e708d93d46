"""The context of an item."""

from __future__ import annotations

from resilience.degradation import (
    CONSTRAINTS,
    Degradation,
    Level,
)
from rlm_tasks.operations.context import Context


def test_an_operation_has_it_as_its_quality() -> None:
    assert Context("job", {}).quality == ""
    assert (
        Context("job", {}, degradation=Degradation(Level.HIGH)).quality
        == CONSTRAINTS[Level.HIGH].fingerprint
    )
