"""The errors of jobs: which of them a breaker around `client.execute` counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import rlm_tasks.llm
from docs.generate import HTTP_SOURCES, error_codes_page, errors
from resilience.breaker import CircuitBreaker, CircuitOpen
from resilience.errors import (
    Denied,
    RetryBudgetExhausted,
    RlmError,
    StoreUnavailable,
    StoreUntrusted,
)
from resilience.faults import CODES
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
from rlm_tasks.llm.wire import errors as answers
from rlm_tasks.results import ItemFailure, JobResult, Metrics, SuccessfulItems
from tests.integration.pages import PAGES
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


# --- the table of errors -----------------------------------------------------------------------

ERRORS = errors()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_each_error_says_its_cause_what_to_do_and_its_http_status(error: type[RlmError]) -> None:
    """A subclass has another cause than its base, or it would be no class of its own."""
    assert {"when", "remedy"} <= vars(error).keys()
    assert all(text[0].isupper() and text.endswith(".") for text in (error.when, error.remedy))
    assert error.http_status in HTTP_SOURCES
    assert error.__doc__


def test_the_page_of_error_codes_equals_the_classes() -> None:
    page = PAGES["docs/reference/error_codes.md"]

    assert page == error_codes_page(), "run: make docs ARGS=--write"
    for code in {each.code for each in ERRORS} | {each.code for each in CODES}:
        assert f"| `{code}` |" in page


def test_each_status_follows_from_whether_a_retry_helps() -> None:
    """Only an outage that ends by itself is a 503, so that a client may repeat the call."""
    by_status = {each.__name__: (each.http_status, each.retryable) for each in ERRORS}

    assert {name for name, found in by_status.items() if found[0] == 503 and not found[1]} == {
        "RetryBudgetExhausted",  # it is a retry already
        "UnknownToWorkers",  # it ends when the workers are restarted
    }
    assert [name for name, found in by_status.items() if found[0] in (422, 500) and found[1]] == []


def test_each_code_that_an_llm_error_may_have_is_in_the_table() -> None:
    """Codes are written where a provider's answer is read."""
    texts = [
        file.read_text(encoding="utf-8") for file in Path(rlm_tasks.llm.__path__[0]).rglob("*.py")
    ]
    refused = {code for text in texts for code in re.findall(r'refused\(\s*"([A-Z_]+)"', text)}
    without_text = {code for text in texts for code in re.findall(r'"([A-Z]+_[A-Z]+)" if', text)}

    assert refused >= {"INSUFFICIENT_QUOTA", "MODEL_NOT_FOUND"}
    assert refused == answers.REFUSALS.keys()
    assert without_text <= answers.FAULTS.keys()
