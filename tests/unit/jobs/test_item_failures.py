"""Failures of items: the traceback, and the classification of Celery's exceptions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import msgspec
import pytest
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Retry

from resilience.breaker import CircuitBreaker
from resilience.errors import Category
from resilience.faults import classify
from rlm_tasks import JobRequest, NextRound, operation
from rlm_tasks.jobs import item_failures as item_failures  # it says what Celery's exceptions mean
from rlm_tasks.settings import Settings
from tests.unit.harness import Platform
from tests.unit.world import World, world

__all__ = ["world"]


@operation("unit_fails", merge=sum)
def unit_fails(item: int) -> int:
    """Fail in a function of its own."""
    return _divided(item)


@operation("unit_fails_async", concurrency=2)
async def unit_fails_async(item: int) -> int:
    """Fail among others."""
    return _divided(item)


@operation("unit_fails_batch", merge=sum, batch=True)
def unit_fails_batch(items: list[int]) -> int:
    """Fail with neighbours, then alone."""
    return sum(map(_divided, items))


@operation("unit_fails_guarded", merge=sum, breaker=True)
def unit_fails_guarded(item: int) -> int:
    """Fail behind a breaker."""
    return _divided(item)


@operation("unit_fails_retried", merge=sum, retry=1, bulkhead=2, timeout_s=60)
def unit_fails_retried(item: int) -> int:
    """Fail behind a retry, a bulkhead and a time limit of its own."""
    return _divided(item)


def _divided(item: int) -> int:
    return item // 0


def _fails_to_merge(outputs: object) -> int:
    return _divided(len(list(outputs)))  # type: ignore[call-overload]


@operation("unit_fails_merge", merge=_fails_to_merge)
def unit_fails_merge(item: int) -> int:
    """Leave the failing to the merge."""
    return item


def _fails_to_yield() -> Iterator[int]:
    yield _divided(1)


@operation("unit_fails_then", then=lambda _outputs, _round: NextRound("sum", _fails_to_yield(), {}))
def unit_fails_then(item: int) -> int:
    """Leave the failing to the items of the next round."""
    return item


NAMES = (
    *("unit_fails", "unit_fails_async", "unit_fails_batch", "unit_fails_guarded"),
    "unit_fails_retried",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit_s", [0.0, 60.0])
def test_a_traceback_begins_at_the_users_own_line(name: str, limit_s: float) -> None:
    platform = Platform(settings=Settings(namespace="unit", node={"item_limit_s": limit_s}))
    spec = platform.submit(
        JobRequest(operation=name, items=[4], options={"continue_on_error": True})
    )
    platform.run(spec)

    [failure] = platform.ledger.failures(spec.job)

    first, *_, last = failure.traceback.splitlines()
    assert first == f'  File "{__file__}", line {_line_of(name)}, in {name}'
    assert last == "ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.parametrize(
    ("name", "function"),
    [("unit_fails_merge", "_fails_to_merge"), ("unit_fails_then", "_fails_to_yield")],
)
def test_a_traceback_of_a_merge_begins_at_the_users_own_line(name: str, function: str) -> None:
    platform = Platform()
    facts = platform.run(platform.submit(JobRequest(operation=name, items=[4])))

    first = msgspec.json.decode(facts["error"])["traceback"].splitlines()[0]
    assert first.startswith(f'  File "{__file__}"')
    assert first.endswith(f"in {function}")


def test_a_traceback_of_a_built_in_operation_begins_at_its_own_line() -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(operation="sum", items=["one"], options={"continue_on_error": True})
    )
    platform.run(spec)

    [failure] = platform.ledger.failures(spec.job)
    assert "builtin.py" in failure.traceback.splitlines()[0]
    assert (failure.index, failure.type, failure.message) == (
        0,
        "TypeError",
        "not a number: 'one'",
    )


def _line_of(name: str) -> int:
    """Return the last line of a function of this file."""
    lines, first = inspect.getsourcelines(globals()[name].function)
    return first + len(lines) - 1


@pytest.mark.parametrize(
    ("error", "category", "counts"),
    [
        (SoftTimeLimitExceeded(), Category.TIMEOUT, True),
        (WorkerLostError(), Category.WORKER_LOST, False),
        (Retry(), Category.CANCELLED, False),
        (Ignore(), Category.CANCELLED, False),
    ],
)
def test_exceptions_of_celery_are_classified(
    world: World, error: Exception, category: Category, counts: bool
) -> None:
    assert classify(error).category == category
    assert CircuitBreaker("any", world.store()).is_system_error(error) == counts
