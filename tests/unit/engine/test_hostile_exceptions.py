"""No exception of a user's code ends a worker, or spoils the items beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import Rate
from rlm_tasks import JobRequest, operation
from rlm_tasks.requests import Conditions, Options
from tests.hostile import raise_hostile
from tests.unit.harness import Platform

SEEDS = 64
ITEMS = range(2 * SEEDS)


def _fails_if_odd(number: int, *_: object) -> int:
    """Return an even number; each odd one has a hostile exception of its own."""
    if number % 2:
        raise_hostile(number // 2)
    return number


async def _fails_in_flight(number: int) -> int:
    return _fails_if_odd(number)


async def _fails_in_a_task(number: int) -> int:
    return await asyncio.ensure_future(_fails_in_flight(number))


async def _fails_in_a_thread(number: int) -> int:
    return await asyncio.to_thread(_without_stop_iteration, number)


def _without_stop_iteration(number: int) -> int:
    try:
        return _fails_if_odd(number)
    except StopIteration:  # asyncio itself takes it for the end of a coroutine
        raise RuntimeError from None


async def _number(number: int) -> int:
    return number


def _sum_of(numbers: list[int]) -> int:
    return sum([_fails_if_odd(number) for number in numbers])


def _cost(number: int) -> dict[str, float]:
    return {"requests": 1.0 + 0 * _fails_if_odd(number)}


MANY = {"rate_limit": Rate(10_000, 60.0), "cost": _cost}
operation("unit_hostile_item", merge=sum)(_fails_if_odd)
operation("unit_hostile_batch", merge=sum, batch=True)(_sum_of)
operation("unit_hostile_async", merge=sum, concurrency=4)(_fails_in_flight)
operation("unit_hostile_task", merge=sum, concurrency=4)(_fails_in_a_task)
operation("unit_hostile_thread", merge=sum, concurrency=4)(_fails_in_a_thread)
operation("unit_hostile_validate", merge=sum, validate=_fails_if_odd)(int)
operation("unit_hostile_cost", merge=sum, **MANY)(int)
operation("unit_hostile_cost_async", merge=sum, concurrency=4, **MANY)(_number)
operation("unit_hostile_guarded", merge=sum, bulkhead=5, retry=2)(_fails_if_odd)
operation("unit_hostile_guarded_async", merge=sum, bulkhead=5, retry=2, concurrency=4)(
    _fails_in_flight
)
PLACES = (
    *("item", "batch", "async", "task", "thread", "validate"),
    *("cost", "cost_async", "guarded", "guarded_async"),
)


class _Interrupts(dict[str, int]):
    """An output whose methods raise what is no Exception."""

    def items(self) -> Any:
        raise SystemExit("in the class of an output")

    def __repr__(self) -> str:
        raise KeyboardInterrupt("in the class of an output")


class _NoHash(type):
    def __hash__(cls) -> int:
        raise RuntimeError("in the metaclass of an output")


class _OfNoHash(metaclass=_NoHash):
    pass


OUTPUTS: dict[str, Any] = {
    "_Interrupts": _Interrupts(a=1),
    "_OfNoHash": _OfNoHash(),
    "list": [[_Interrupts()]],
}
operation("unit_hostile_output")(lambda name: OUTPUTS.get(name, name))


def test_a_hostile_output_fails_its_own_item_and_no_other() -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(
            operation="unit_hostile_output",
            items=["first", *OUTPUTS, "last"],
            options=Options(continue_on_error=True),
        )
    )
    facts = platform.run(spec)
    assert (facts["state"], facts["done"], facts["failed"]) == ("succeeded", "2", "3")
    assert [each.index for each in platform.ledger.failures(spec.job)] == [1, 2, 3]
    assert platform.output(spec) == ["first", "last"]


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_exception_fails_its_own_item_and_no_other(place: str) -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(
            operation=f"unit_hostile_{place}",
            items=ITEMS,
            options=Options(continue_on_error=True),
            conditions=Conditions(validate_before_process=place == "validate"),
        )
    )
    facts = platform.run(spec)
    assert (facts["state"], facts["failed"]) == ("succeeded", str(SEEDS))
    assert platform.output(spec) == sum(ITEMS[::2])
    failures = platform.ledger.failures(spec.job)
    assert [each.index for each in failures] == list(ITEMS[1::2])
    # Python itself turns some exceptions of coroutines and generators into a RuntimeError.
    renamed = {"RuntimeError"} if "async" in place or place in ("task", "thread") else set()
    assert [
        (each.index, each.type)
        for each in failures
        if each.type not in {f"Hostile{each.index // 2}", *renamed}
    ] == []
    assert max(len(each.message) + len(each.traceback) for each in failures) <= 5000


@operation("unit_hostile_fallback", breaker=BreakerConfig(), fallback=_fails_if_odd)
def never_answers(_number: int) -> int:
    """Fail until the breaker opens; then the fallback is called."""
    raise ConnectionError


@operation("unit_hostile_denied", breaker=BreakerConfig())
def denied(number: int) -> int:
    """Fail behind a breaker, which asks for the meaning of each exception."""
    return _fails_if_odd(number)


def test_a_hostile_exception_of_a_fallback_fails_its_item() -> None:
    platform = Platform()
    spec = platform.submit(
        JobRequest(
            operation="unit_hostile_fallback",
            items=ITEMS,
            options=Options(continue_on_error=True),
        )
    )
    facts = platform.run(spec)
    failures = platform.ledger.failures(spec.job)
    own = [each for each in failures if each.type != "ConnectionError"]
    assert int(facts["done"]) + int(facts["failed"]) == len(ITEMS)
    assert [(each.index, each.type) for each in own] == [
        (each.index, f"Hostile{each.index // 2}") for each in own
    ]
    assert len(own) > SEEDS - 10


def _merge_that_fails(parts: Iterable[int]) -> int:
    numbers = [*parts]
    raise_hostile(max(numbers))
    return 0


def _fails_at_the_end(numbers: Any) -> int:
    raise_hostile(max(numbers) if isinstance(numbers, list) else numbers)
    return 0


def _then(outputs: Any, _round: Any) -> int:
    raise_hostile(max(outputs))
    return 0


@operation("unit_hostile_merge", merge=_merge_that_fails)
def merged(number: int) -> int:
    """Fail in the merge."""
    return number


@operation("unit_hostile_finalize", merge=max, finalize=_fails_at_the_end)
def finalized(number: int) -> int:
    """Fail when the answer is shaped."""
    return number


@operation("unit_hostile_outputs", finalize=_fails_at_the_end)
def listed(number: int) -> int:
    """Fail when the list of outputs is shaped."""
    return number


@operation("unit_hostile_then", then=_then)
def with_rounds(number: int) -> int:
    """Fail between two rounds."""
    return number


ENDS = ("merge", "finalize", "outputs", "then")


@pytest.mark.parametrize("place", ENDS)
def test_a_hostile_exception_after_the_items_fails_the_job_by_its_name(place: str) -> None:
    for seed in range(ENDS.index(place), SEEDS, len(ENDS)):
        platform = Platform(seed)
        spec = platform.submit(
            JobRequest(operation=f"unit_hostile_{place}", items=[seed, seed, seed])
        )
        facts = platform.run(spec)
        assert facts["state"] == "failed"
        assert json.loads(facts["error"])["type"] == f"Hostile{seed}", seed
