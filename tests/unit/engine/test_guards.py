"""An operation with its guards: their order, and the refunds when an inner guard denies a call."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from resilience.breaker_storage import BreakerConfig
from resilience.bucket import HOLD_MOST_S, Rate
from resilience.bulkhead import Elastic
from resilience.errors import BulkheadFull, InvalidValue, NeverSatisfiable, RateLimited
from resilience.retry import RetryPolicy
from resilience.settings import BreakerSettings
from rlm_tasks.engine.guards import OperationGuards, Postponed, ProcessGuards
from rlm_tasks.jobs import item_failures as item_failures  # registers Celery's exceptions
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Reason, Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.operations.context import Context
from rlm_tasks.operations.protection import protection
from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from tests.unit.world import World, world

__all__ = ["world"]


SPEC = JobSpec(
    "job", "op", RangeSource(0, 1), 1, Shape("flat"), "unit.critical", priority="critical"
)


def guards(world: World, **settings: Any) -> ProcessGuards:
    return ProcessGuards(
        world.store(), Settings(breakers=BreakerSettings(**settings)), lambda waiters: None
    )


def guarded(on: ProcessGuards, function: Any = lambda item: item, **about: Any) -> OperationGuards:
    found = on.of(Operation("op", function, protection=protection("op", about)), SPEC)
    assert found is not None
    return found


def context(**about: Any) -> Context:
    return Context("job", {}, **about)


def test_a_denial_by_an_inner_guard_is_given_back_to_the_outer_ones(world: World) -> None:
    on = guards(world)
    one = guarded(
        on,
        rate_limit=Rate(10),
        breaker=BreakerConfig(failure_threshold=1, recovery_timeout_s=5),
        bulkhead=1,
    )
    entry = one.enter(1, context(), "")
    used = on._buckets["op"].status()["requests"]["used"]

    with pytest.raises(BulkheadFull):
        one.enter(2, context(), "")
    assert on._buckets["op"].status()["requests"]["used"] == used == 1

    one.leave(entry, ConnectionError())
    world.sleep(5.01)
    held = on._bulkheads["op"].acquire()
    with pytest.raises(BulkheadFull):
        one.enter(3, context(), "")
    assert on._breakers["op"].state == "half-open"
    held.release()
    for _ in range(3):
        permit = one.enter(4, context(), "").permit  # the unused probe did not take a place
        assert permit is not None
        permit.release()


def test_an_empty_bucket_asks_no_inner_guard(world: World) -> None:
    on = guards(world)
    one = guarded(on, rate_limit=Rate(1), bulkhead=1)
    one.leave(one.enter(1, context(), ""))

    with pytest.raises(RateLimited):
        one.enter(2, context(), "")
    assert on._bulkheads["op"].status()["used"] == 0


def test_a_denial_costs_no_attempt_and_a_failure_costs_one(world: World) -> None:
    def fail(_: int) -> None:
        raise ConnectionError("gone")

    one = guarded(
        guards(world),
        fail,
        rate_limit=Rate(1),
        retry=RetryPolicy(max_attempts=3, initial_delay_s=1),
    )
    with pytest.raises(Postponed) as failed:
        one.call(1, context(tries=1), tries=1, waiter="")
    with pytest.raises(Postponed) as refused:
        one.call(1, context(tries=1), tries=1, waiter="")

    assert (
        failed.value.tries,
        failed.value.reason,
        refused.value.tries,
        refused.value.reason,
    ) == (2, Reason.RETRY, 1, Reason.WAITING)
    world.sleep(2)
    with pytest.raises(ConnectionError):
        one.call(1, context(tries=2), tries=2, waiter="")


def test_a_429_of_the_provider_pauses_its_bucket_and_costs_no_attempt(world: World) -> None:
    class TooMany(Exception):
        status_code = 429
        headers = {"Retry-After": "7"}

    def fail(_: int) -> None:
        raise TooMany

    on = guards(world)
    one = guarded(on, fail, rate_limit=Rate(100), breaker="client", retry=5)
    with pytest.raises(Postponed) as put_off:
        one.call(1, context(), tries=0, waiter="")

    assert (put_off.value.tries, put_off.value.wait_s) == (0, 0), "the pause is the bucket's"
    assert on._breakers["op"].failure_count == 0
    with pytest.raises(Postponed) as held:
        one.call(2, context(), tries=0, waiter="")
    assert held.value.wait_s == pytest.approx(7)


@pytest.mark.parametrize("ours", [False, True])
def test_nodes_that_wait_for_a_pause_of_a_service_stand_in_its_line(
    world: World, ours: bool
) -> None:
    class TooMany(Exception):
        status_code = 429
        headers = {"Retry-After": "86400"}

    def fail(_: int) -> None:
        raise RateLimited("service", 86_400.0, "busy") if ours else TooMany()

    on = guards(world)
    one = guarded(on, fail, rate_limit=Rate(100), retry=5)
    with pytest.raises(Postponed) as put_off:
        one.call(1, context(), tries=0, waiter="job 1")
    assert put_off.value.wait_s == 0, "the pause is the bucket's"
    with pytest.raises(Postponed) as held:
        one.call(1, context(), tries=0, waiter="job 1")
    woken: list[str] = []

    assert held.value.wait_s == pytest.approx(HOLD_MOST_S)
    assert (held.value.noted, one.still_waits("job 1")) == (True, True)
    on._buckets["op"].release(woken.extend)
    assert woken == ["job 1"]


@pytest.mark.parametrize("status", [429, 503])
def test_no_service_lets_a_node_wait_for_a_day(world: World, status: int) -> None:
    class Busy(Exception):
        status_code = status
        headers = {"Retry-After": "86400"}

    def fail(_: int) -> None:
        raise Busy

    one = guarded(guards(world), fail, retry=5)
    with pytest.raises(Postponed) as put_off:
        one.call(1, context(), tries=0, waiter="")

    assert HOLD_MOST_S <= put_off.value.wait_s <= 1.1 * HOLD_MOST_S


def test_processor_time_is_counted_automatically(world: World) -> None:
    def compute(_: int) -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    on = guards(world)
    one = guarded(on, compute, rate_limit={"cpu_s": Rate(12, per_s=60, burst=0.5)})
    one.call(1, context(), tries=0, waiter="")

    assert on._buckets["op"].status()["cpu_s"]["used"] == pytest.approx(0.05, rel=0.3)


def test_breakers_can_be_switched_off(world: World) -> None:
    def fail(_: int) -> None:
        raise ConnectionError

    one = guarded(
        guards(world, enabled=False), fail, breaker=BreakerConfig(failure_threshold=1), bulkhead=5
    )
    for _ in range(5):
        with pytest.raises(ConnectionError):
            one.call(1, context(), tries=0, waiter="")


def test_an_operation_without_guards_has_none(world: World) -> None:
    assert guards(world).of(Operation("op", len), SPEC) is None


# --- fallbacks --------------------------------------------------------------------------------


def raising(error: Exception) -> Any:
    def fail(_: int) -> None:
        raise error

    return fail


@pytest.mark.parametrize("about", [{}, {"breaker": "client"}, {"retry": 1}, {"bulkhead": 5}])
def test_a_fallback_answers_when_an_item_has_no_retry_left(
    world: World, about: dict[str, Any]
) -> None:
    one = guarded(
        guards(world), raising(ConnectionError("gone")), fallback=lambda item: -item, **about
    )

    assert one.call(7, context(), tries=0, waiter="") == -7


def test_a_fallback_waits_until_all_retries_are_used_up(world: World) -> None:
    fail, about = raising(TimeoutError("slow")), {"retry": 3, "fallback": lambda item: -item}
    one = guarded(guards(world), fail, **about)

    for tries in (0, 1):
        with pytest.raises(Postponed):
            one.call(7, context(tries=tries), tries=tries, waiter="")
    assert one.call(7, context(tries=2), tries=2, waiter="") == -7


@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError()])
def test_a_fallback_hides_no_error_that_is_not_worth_a_retry(
    world: World, error: Exception
) -> None:
    one = guarded(guards(world), raising(error), retry=3, fallback=lambda item: -item)

    with pytest.raises(type(error)):
        one.call(7, context(), tries=0, waiter="")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_fallback_of_a_coroutine_function_answers_as_well(world: World, is_async: bool) -> None:
    async def fail(_: int) -> int:
        raise ConnectionError("gone")

    async def backup(item: int) -> int:
        return -item

    async def call() -> Any:
        one = guarded(
            guards(world), fail, bulkhead=5, fallback=backup if is_async else lambda item: -item
        )
        held = one.enter(7, context(), "")
        return await one.call_async(
            7, context(), held, run=fail, again=lambda: 7, waiter="", pause=never_pause
        )

    assert asyncio.run(call()) == -7


async def never_pause(wait: Postponed) -> None:
    raise AssertionError(wait)


# --- weights ----------------------------------------------------------------------------------


def test_a_call_takes_its_weight_of_the_bulkhead(world: World) -> None:
    on = guards(world)
    one = guarded(on, bulkhead=Elastic(500, 2048, 900), weight=lambda item: item["mb"])

    held = [one.enter({"mb": 400}, context(), "") for _ in range(5)]
    assert on._bulkheads["op"].status()["used"] == 2000
    with pytest.raises(BulkheadFull):
        one.enter({"mb": 49}, context(), "")
    assert one.enter({"mb": 48}, context(), "").permit
    for each in held:
        one.leave(each)
    assert on._bulkheads["op"].status()["used"] == 48


def test_a_weight_may_be_a_number_and_may_read_the_context(world: World) -> None:
    on = guards(world)
    guarded(on, bulkhead=10, weight=2.5).enter(1, context(), "")
    assert on._bulkheads["op"].status()["used"] == 2.5
    by_context = guarded(on, bulkhead=10, weight=lambda item, ctx: ctx.index + 1)
    by_context.enter(1, context(index=3), "")
    assert on._bulkheads["op"].status()["used"] == 6.5


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (9, NeverSatisfiable, "bulkhead op: 9 at once can never be granted, the limit is 8"),
        (0, InvalidValue, "weight=0: must be a number above 0"),
        ("1", InvalidValue, "weight='1': must be a number above 0"),
        (float("nan"), InvalidValue, "weight=nan: must be a number above 0"),
    ],
)
def test_an_item_with_an_impossible_weight_fails_by_itself(
    world: World, weight: Any, error: type[Exception], message: str
) -> None:
    one = guarded(guards(world), bulkhead=8, weight=lambda item: weight)

    with pytest.raises(error, match=message):
        one.call(1, context(), tries=0, waiter="")
