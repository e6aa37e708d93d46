"""Failures of items: their traceback, and the meaning of Celery's exceptions."""

from __future__ import annotations

import pytest
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Retry

from resilience.breaker import CircuitBreaker
from resilience.errors import Category
from resilience.faults import classify
from rlm_tasks.jobs import item_failures as item_failures  # it says what Celery's exceptions mean
from rlm_tasks.jobs.item_failures import failure_of
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.registry import get
from tests.unit.world import World, world

__all__ = ["world"]


def test_a_failure_tells_the_users_frames_only() -> None:
    try:
        get("sum").apply(["one"], Context("j", {}))
    except TypeError as error:
        failure = failure_of(4, error)

    assert (failure["index"], failure["type"], failure["message"]) == (
        4,
        "TypeError",
        "not a number: 'one'",
    )
    assert "operations.py" not in failure["traceback"]
    assert "sum_items" in failure["traceback"]


@pytest.mark.parametrize(
    ("error", "category", "counts"),
    [
        (SoftTimeLimitExceeded(), Category.TIMEOUT, True),
        (WorkerLostError(), Category.WORKER_LOST, False),
        (Retry(), Category.CANCELLED, False),
        (Ignore(), Category.CANCELLED, False),
    ],
)
def test_celerys_own_exceptions_are_known(
    world: World, error: Exception, category: Category, counts: bool
) -> None:
    assert classify(error).category == category
    assert CircuitBreaker("any", world.store()).is_system_error(error) == counts
