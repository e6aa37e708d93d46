"""The context of an item."""

from __future__ import annotations

from resilience.degradation import (
    CONSTRAINTS,
    Degradation,
    Level,
)
from rlm_tasks.operations.context import Context


def test_the_quality_of_an_item_is_the_fingerprint_of_its_level() -> None:
    assert Context("job", {}).quality == ""
    assert (
        Context("job", {}, degradation=Degradation(Level.HIGH)).quality
        == CONSTRAINTS[Level.HIGH].fingerprint
    )
