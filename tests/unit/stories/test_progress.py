"""The progress of a job whose items are in flight together."""

from __future__ import annotations

import asyncio

import pytest

from rlm_tasks import JobRequest, operation
from rlm_tasks.requests import Options
from rlm_tasks.settings.model import Settings
from tests.unit.harness import Platform

SEEN: list[tuple[int, int, int]] = []
_platform: list[tuple[Platform, str]] = []


@operation("unit_progress", concurrency=10)
async def first_ends_last(number: int) -> int:
    """Let the first item end when a pulse has told of all others."""
    if number:
        if number % 5 == 0:
            raise ValueError
        return number
    platform, job = _platform[0]
    for _ in range(450):
        platform.clock.now += 0.002
        await asyncio.sleep(0.001)
        SEEN.append(platform.ledger.inflight(job))
        if sum(SEEN[-1]) == 49:
            break
    return number


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"continue_on_error": True}, (40, 9, 0)),
        # The number of failures decides this job, so only FINISH tells of them.
        ({"continue_on_error": True, "error_threshold": 0.5}, (40, 0, 0)),
    ],
)
def test_items_that_end_behind_a_slow_one_are_in_the_progress(
    options: dict[str, object], seen: tuple[int, int, int]
) -> None:
    SEEN.clear()
    platform = Platform(settings=Settings(namespace="unit"))
    spec = platform.submit(
        JobRequest(operation="unit_progress", items=range(50), options=Options(**options))
    )
    _platform[:] = [(platform, spec.job)]
    facts = platform.run(spec)
    assert SEEN[-1] == seen
    assert (facts["done"], facts["failed"]) == ("41", "9")


@operation("unit_long_progress", concurrency=10)
async def all_end_after_the_node_has_stopped(number: int) -> int:
    """End when the target time of a node has passed; the first item ends last."""
    platform, job = _platform[0]
    until = 3.0 if number == 0 else 1.5
    while platform.clock.now < until:
        platform.clock.now += 0.002 * (number == 0)
        await asyncio.sleep(0)
        if number == 0:
            SEEN.append(platform.ledger.inflight(job))
    return number


def test_items_that_end_after_their_node_has_stopped_are_in_the_progress() -> None:
    SEEN.clear()
    platform = Platform(settings=Settings(namespace="unit"))
    spec = platform.submit(JobRequest(operation="unit_long_progress", items=range(10)))
    _platform[:] = [(platform, spec.job)]

    facts = platform.run(spec)

    assert (SEEN[-1], facts["done"]) == ((9, 0, 0), "10")
