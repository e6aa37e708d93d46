"""The final status of a job whose items fail, are empty, or do not exist."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from rlm_tasks import JobRequest, operation
from rlm_tasks.jobs.endings import sentence, shown
from rlm_tasks.requests import Conditions, Options
from rlm_tasks.results import Status
from tests.unit.harness import Platform


def _positive(number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    return number


operation("unit_verdict")(_positive)
operation("unit_verdict_max", merge=max, finalize=round)(_positive)
operation("unit_verdict_mean", merge=statistics.mean)(_positive)
operation("unit_verdict_sum", merge=sum, finalize=str)(_positive)


def _run(name: str, items: list[Any], *, empty: bool = False, **options: Any) -> tuple[Any, ...]:
    platform = Platform()
    spec = platform.submit(
        JobRequest(
            operation=name,
            items=items,
            options=Options(**{"continue_on_error": True, **options}),
            conditions=Conditions(skip_if_empty=empty),
        )
    )
    facts = platform.run(spec)
    return facts, platform.output(spec) if facts["state"] == "succeeded" else None


def _failing(failures: int, n: int) -> list[int]:
    return [-1] * failures + [1] * (n - failures)


@pytest.mark.parametrize(
    ("share", "n", "most"),
    [
        *[(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.28, 100, 28)],
        *[(0.1, 3, 0), (1e-05, 9, 0), (1 / 3, 3, 1), (2 / 3, 300, 200), (1 - 1e-16, 5, 4)],
    ],
)
def test_exactly_the_tolerated_share_of_failures_passes(share: float, n: int, most: int) -> None:
    passed, _ = _run("unit_verdict", _failing(most, n), error_threshold=share)
    failed, _ = _run("unit_verdict", _failing(most + 1, n), error_threshold=share)
    assert (passed["state"], failed["state"]) == ("succeeded", "failed")


@pytest.mark.parametrize(
    ("share", "n", "enough"),
    [(0.29, 100, 29), (0.07, 100, 7), (0.01, 3, 1), (1 / 3, 3000, 1000), (0.7, 10, 7)],
)
def test_exactly_the_requested_share_of_items_ends_a_job_early(
    share: float, n: int, enough: int
) -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(
            operation="unit_verdict",
            items=range(n),
            conditions=Conditions(early_termination_threshold=share),
        )
    )
    assert platform.ledger.facts(spec.job)["early_limit"] == str(enough)


async def _not_awaited(_item: Any) -> None:
    raise ValueError


operation("unit_verdict_bool", validate=lambda number: number > 0)(abs)
operation("unit_verdict_awaitable", validate=lambda number: _not_awaited(-number))(abs)


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    ("name", "failed", "message"),
    [
        ("unit_verdict_bool", [1], "validate returned False"),
        ("unit_verdict_awaitable", [0, 1, 2], "validate must be a plain function"),
    ],
)
def test_a_verdict_of_validate_is_never_passed_over(
    name: str, failed: list[int], message: str
) -> None:
    platform = Platform()
    request = JobRequest(
        operation=name,
        items=[1, -2, 3],
        options=Options(continue_on_error=True),
        conditions=Conditions(validate_before_process=True),
    )
    platform.run(spec := platform.submit(request))
    failures = platform.ledger.failures(spec.job)
    assert [each.index for each in failures] == failed
    assert all(each.message.startswith(message) for each in failures)


@pytest.mark.parametrize("items", [[-1, -2, -3], [-1], [None, -1, ""]])
def test_a_job_fails_when_each_of_its_items_has_failed(items: list[Any]) -> None:
    facts, _ = _run("unit_verdict_max", items, empty=True)
    assert facts["state"] == "failed"
    why = "an item failed" if facts["failed"] == "1" else "no item succeeded"
    assert f"because {why}: 0 of" in sentence(facts)


def test_a_job_may_tolerate_that_all_items_fail() -> None:
    facts, output = _run("unit_verdict_max", [-1, -2], error_threshold=1)
    assert (facts["state"], facts["failed"], output) == ("succeeded", "2", None)


@pytest.mark.parametrize(
    ("name", "items", "output"),
    [
        ("unit_verdict_max", [], None),  # round(None) is not called
        ("unit_verdict_mean", [], None),
        ("unit_verdict_mean", [None, ""], None),
        ("unit_verdict_sum", [], "0"),
        ("unit_verdict", [], []),
    ],
)
def test_a_job_without_an_output_succeeds(name: str, items: list[Any], output: Any) -> None:
    facts, found = _run(name, items, empty=bool(items))
    assert (facts["state"], found) == ("succeeded", output)


def test_some_failures_do_not_fail_a_job_that_continues() -> None:
    facts, output = _run("unit_verdict_max", [-1, 4, -2])
    assert (facts["state"], facts["failed"], output) == ("succeeded", "2", 4)


def test_a_job_with_failures_is_shown_with_a_word_of_its_own() -> None:
    assert shown(Status.SUCCEEDED, 0) == ("succeeded", "success")
    assert shown(Status.SUCCEEDED, 3) == ("succeeded with failures", "warning")
    assert shown(Status.FAILED, 3) == ("failed", "danger")
    assert json.dumps(Status.SUCCEEDED) == '"succeeded"', "the status itself has no new value"
