"""The errors of jobs: which of them a breaker around `client.execute` counts."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.breaker import CircuitBreaker, CircuitOpen
from resilience.errors import (
    Denied,
    RetryBudgetExhausted,
    RlmError,
    StoreUnavailable,
    StoreUntrusted,
)
from rlm_tasks.errors import (
    BrokerUnavailable,
    InvalidRequest,
    JobCancelled,
    JobEnded,
    JobExpired,
    JobFailed,
    JobNotFound,
    Overloaded,
    QueueFull,
    ResultTimeout,
    UnknownOperation,
)
from rlm_tasks.jobs.endings import Status
from rlm_tasks.results import ItemFailure, JobResult, Metrics, SuccessfulItems
from tests.unit.world import World, world

__all__ = ["world"]


def ended(
    kind: type[JobEnded], *codes: str, merge: str = "", status: Status = Status.FAILED
) -> JobEnded:
    """Return the error of a job whose items failed with these codes, or its merge with one."""
    failed = [failure(index, code) for index, code in enumerate(codes)]
    numbers: dict[str, Any] = dict.fromkeys(Metrics.__slots__, 0)
    result = JobResult(
        job_id="ab12",
        status=status,
        output=None,
        total=3,
        done=0,
        failed_count=len(codes),
        skipped=3 - len(codes),
        failed=failed,
        successful=SuccessfulItems([], []),
        metrics=Metrics(**numbers),
        error=failure(-1, merge) if merge else None,
    )
    return kind(result, "as the test says")


def failure(index: int, code: str) -> ItemFailure:
    """Return the failure of an item."""
    return ItemFailure(index=index, code=code, type="Error", message="", traceback="")


REFUSALS: list[RlmError] = [
    Overloaded("pressure", 1, "high"),
    QueueFull("queue", 1, "full"),
    InvalidRequest("items", 1, "no"),
    UnknownOperation("sun", ["sum"]),
    JobNotFound("ab12"),
    ended(JobCancelled),
    ended(JobFailed, "INVALID_REQUEST", "UNAUTHORISED", "QUARANTINED", "RATE_LIMITED"),
    ended(JobFailed),
    CircuitOpen("breaker", 1, "open"),
    Denied("guard", 1, "no"),
    StoreUntrusted("redis://x", "certificate"),
]
OUTAGES: list[RlmError] = [
    ended(JobFailed, "INVALID_REQUEST", "TIMEOUT"),
    ended(JobFailed, "SERVICE_UNAVAILABLE"),
    ended(JobFailed, "OPERATION_FAILED"),
    ended(JobFailed, "RETRY_BUDGET_EXHAUSTED"),
    ended(JobFailed, merge="OPERATION_FAILED"),
    ended(JobExpired, status=Status.EXPIRED),
    ResultTimeout("ab12", 5),
    StoreUnavailable("redis://x", "refused"),
    BrokerUnavailable("amqp://x", "refused"),
    RetryBudgetExhausted("llm", TimeoutError()),
]


def shown(error: RlmError) -> str:
    """Return the name of a case."""
    codes = "+".join(each.code for each in getattr(error, "failures", []))
    return f"{type(error).__name__} {codes}".strip()


def attempt(breaker: CircuitBreaker, error: RlmError) -> None:
    """Call through a breaker a function that raises an error."""

    def execute() -> None:
        raise error

    with pytest.raises(type(error)):
        breaker.execute(execute)


@pytest.mark.parametrize("error", OUTAGES, ids=shown)
def test_five_outages_of_the_platform_open_a_breaker_around_it(
    world: World, error: RlmError
) -> None:
    breaker = CircuitBreaker("client", world.store(), "client")
    for count in range(1, 5):
        attempt(breaker, error)
        assert (breaker.state, breaker.failure_count) == ("closed", count)
    attempt(breaker, error)
    assert breaker.state == "open"


@pytest.mark.parametrize("error", REFUSALS, ids=shown)
def test_refusals_and_wrong_requests_open_no_breaker(world: World, error: RlmError) -> None:
    breaker = CircuitBreaker("client", world.store(), "client")
    for _ in range(10):
        attempt(breaker, error)
    assert (breaker.state, breaker.failure_count) == ("closed", 0)
