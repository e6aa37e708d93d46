"""Each item gets the params of its request, whatever items beside it write into theirs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from resilience.retry import RetryPolicy
from rlm_tasks import JobRequest, NextRound, NWay, operation
from rlm_tasks.operations.context import Context
from rlm_tasks.results import Status
from tests.unit.harness import Platform

PARAMS = {"seen": [], "limits": {"left": 1}, "factor": 2}
ITEMS = range(300)


def _once(number: int, ctx: Context) -> int:
    """Use up what the params allow: a second item with the same params would fail."""
    assert ctx.params["seen"] == [], "another item has written here"
    ctx.params["seen"].append(number)
    ctx.params["limits"]["left"] -= 1
    assert ctx.params["limits"]["left"] == 0
    return int(number * ctx.params.pop("factor"))


@operation("unit_params")
def one(number: int, ctx: Context) -> int:
    """Change the params."""
    return _once(number, ctx)


@operation("unit_params_batch", batch=True)
def batch(numbers: list[int], ctx: Context) -> list[int]:
    """Change the params for a whole batch, and fail while it has neighbours."""
    doubled = _once(1, ctx)
    if len(numbers) > 1:
        raise ValueError("too many")
    return [number * doubled for number in numbers]


@operation("unit_params_async", concurrency=20)
async def in_flight(number: int, ctx: Context) -> int:
    """Change the params while other items are in flight."""
    output = _once(number, ctx)
    await asyncio.sleep(0)
    assert ctx.params["seen"] == [number]
    return output


QUICK = RetryPolicy(max_attempts=3, initial_delay_s=0.01, max_delay_s=0.01)
TRIED: set[int] = set()


@operation("unit_params_retried", concurrency=20, retry=QUICK)
async def retried(number: int, ctx: Context) -> int:
    """Change the params, and fail at the first attempt."""
    output = _once(number, ctx)
    if number not in TRIED:
        TRIED.add(number)
        raise ConnectionError
    return output


def _fails(number: int, ctx: Context) -> int:
    _once(number, ctx)
    raise ConnectionError


async def _fails_later(number: int, ctx: Context) -> int:
    return _fails(number, ctx)


LAST = RetryPolicy(max_attempts=1)
operation("unit_params_fallback", retry=LAST, fallback=_once)(_fails)
operation("unit_params_async_fallback", concurrency=4, retry=LAST, fallback=_once)(_fails_later)


def _next(_outputs: Any, round: Any) -> Any:
    round.params["limits"]["left"] -= 1
    assert round.params["limits"]["left"] == 0
    return 7 if round.number else NextRound("unit_params", [1], PARAMS)


@operation("unit_params_rounds", then=_next)
def with_rounds(number: int, ctx: Context) -> int:
    """Change the params in items and between rounds."""
    return _once(number, ctx)


@pytest.mark.parametrize(
    "kind", ["", "_batch", "_async", "_retried", "_fallback", "_async_fallback"]
)
def test_each_item_gets_the_params_of_the_request(kind: str) -> None:
    TRIED.clear()
    platform = Platform()
    items = ITEMS if kind != "_retried" else ITEMS[:5]
    spec = platform.submit(
        JobRequest(
            operation=f"unit_params{kind}",
            items=items,
            params=PARAMS,
            strategy=NWay(split_factor=3, min_chunk_size=max(1, len(items) // 6)),
        )
    )
    while not Status((facts := platform.run(spec))["state"]).final:
        platform.runtime.delivery.resend(spec.job, platform.ledger.sweep(spec.job).send)
    assert (facts["state"], facts["failed"]) == ("succeeded", "0")
    assert platform.output(spec) == [2 * number for number in items]


def test_each_round_gets_the_params_of_the_request() -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(operation="unit_params_rounds", items=range(3), params=PARAMS)
    )
    assert platform.run(spec)["state"] == "succeeded"
    assert platform.output(spec) == 7
