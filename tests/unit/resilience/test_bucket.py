"""Token buckets: grants in any window, denials, and the retry times of denied callers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.bucket import (
    HOLD_MOST_S,
    LINE_FROM_S,
    PROVIDER,
    ROUTER,
    LeasedBucket,
    Rate,
    TokenBucket,
)
from resilience.errors import InvalidValue, NeverSatisfiable
from tests.unit.world import World, world

__all__ = ["world"]


def bucket_of(world: World, **rates: Rate) -> TokenBucket:
    return TokenBucket("llm", world.store(), sleep=world.sleep, **(rates or PROVIDER))


def limits_of(world: World) -> dict[bytes, Any]:
    """Return the stored state of limits, without the keys that list the takers."""
    return {key: value for key, value in world.dump().items() if not key.endswith(b":takers")}


class Window:
    """A provider's true sliding window."""

    def __init__(self, limit: float, per_s: float) -> None:
        self.limit, self.per_s, self.calls, self.used = (
            limit,
            per_s,
            deque[tuple[float, float]](),
            0.0,
        )

    def admits(self, at: float, amount: float) -> bool:
        while self.calls and self.calls[0][0] <= at - self.per_s:
            self.used -= self.calls.popleft()[1]
        if self.used + amount > self.limit + 1e-6:
            return False
        self.calls.append((at, amount))
        self.used += amount
        return True


def test_a_grant_has_the_time_from_which_it_holds(world: World) -> None:
    grant = bucket_of(world).acquire(requests=1, tokens=800)

    assert grant
    assert (grant.wait_s, grant.at, grant.limited_by) == (0, pytest.approx(world.now), "")


def test_a_denied_take_changes_no_limit(world: World) -> None:
    bucket = bucket_of(world, requests=Rate(10, per_s=1), tokens=Rate(100, per_s=1))
    assert bucket.acquire(requests=1, tokens=100)
    before = limits_of(world)

    denied = bucket.acquire(requests=1, tokens=50)

    assert not denied
    assert denied.limited_by == "tokens"
    assert limits_of(world) == before, "a denial changes nothing"
    assert bucket.status()["requests"]["level"] == 9


def test_a_take_is_one_round_trip(world: World) -> None:
    store = world.store()
    TokenBucket("llm", store, **PROVIDER).acquire(requests=1, tokens=800)

    assert store.round_trips == 1


def test_a_caller_may_wait_for_a_grant(world: World) -> None:
    bucket, began = bucket_of(world, calls=Rate(10, per_s=1, burst=1)), world.now
    grants = [bucket.acquire(max_wait_s=5) for _ in range(11)]

    assert all(grants)
    assert world.now - began == pytest.approx(1.0, abs=0.01)
    assert asyncio.run(bucket.acquire_async()).granted is False


def test_reservations_of_several_processes_get_successive_times(world: World) -> None:
    buckets = [bucket_of(world, calls=Rate(10, per_s=1, burst=1)) for _ in range(3)]
    waits = [bucket.reserve(max_wait_s=5).wait_s for bucket in buckets]

    assert waits == pytest.approx([0, 0.1, 0.2], abs=1e-4)


def test_each_denied_caller_in_line_gets_its_own_retry_time(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(10, per_s=1, burst=1))
    assert bucket.acquire()
    waits = [bucket.reserve(in_line=1, priority="low").wait_s for _ in range(4)]
    urgent = bucket.reserve(in_line=1).wait_s

    assert waits == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-3)
    assert urgent == pytest.approx(0.1, abs=1e-3)
    world.sleep(urgent)
    assert bucket.acquire()


def test_a_retry_time_covers_all_takes_of_that_turn(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(40, per_s=1, burst=30))
    assert bucket.acquire(calls=30)
    waits = [bucket.reserve(in_line=times).wait_s for times in (3, 1, 100)]

    assert waits == pytest.approx([0.075, 0.1, 0.2], abs=1e-3), "at most the refill of 0.1 s"
    world.sleep(waits[0])
    assert all(bucket.acquire() for _ in range(3))
    assert not bucket.acquire()


def test_a_turn_leaves_room_in_the_bucket(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(100, per_s=1, burst=9))
    assert bucket.acquire(calls=9)

    assert bucket.reserve(in_line=100).wait_s == pytest.approx(0.03, abs=1e-3)


def test_returning_callers_get_earlier_retry_times_than_new_ones(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(10, per_s=1, burst=1))
    assert bucket.acquire()
    new = [bucket.reserve(in_line=1).wait_s for _ in range(3)]
    returned = [bucket.reserve(in_line=1, returns=True).wait_s for _ in range(2)]

    assert new == pytest.approx([0.1, 0.2, 0.3], abs=1e-3)
    assert returned == pytest.approx([0.1, 0.2], abs=1e-3), "each has its own time"


def test_a_line_is_forgotten_when_no_caller_returns(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(10, per_s=1, burst=1))
    assert bucket.acquire()
    waits = [
        bucket.reserve(in_line=1).wait_s for _ in range(50)
    ]  # their job has since been cancelled
    assert waits[-1] == pytest.approx(5.0, abs=1e-3)

    world.sleep(0.7)
    assert bucket.acquire()
    assert bucket.reserve(in_line=1).wait_s == pytest.approx(0.1, abs=1e-3)


def test_a_caller_that_returns_a_little_early_keeps_its_turn(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(10, per_s=1, burst=1))
    assert bucket.acquire()
    world.sleep(0.09)
    early = [bucket.reserve(in_line=1, returns=True).wait_s for _ in range(2)]
    world.sleep(0.011)
    assert bucket.acquire()

    assert early == pytest.approx([0.01, 0.01], abs=1e-3)
    assert bucket.reserve(in_line=1, returns=True).wait_s == pytest.approx(0.1, abs=2e-3), (
        "no caller is in line before it"
    )


def test_a_call_larger_than_the_bucket_delays_the_next_caller(world: World) -> None:
    bucket = bucket_of(world, tokens=Rate(600, per_s=60, burst=50))
    assert bucket.acquire(tokens=50)
    waits = [bucket.reserve(in_line=1, tokens=tokens).wait_s for tokens in (200, 10)]

    assert waits == pytest.approx([5.0, 21.0], abs=1e-3), (
        "it passes when the bucket is full, and leaves a debt of 15 s"
    )


def test_retry_times_follow_the_amounts_that_calls_really_use(world: World) -> None:
    bucket = bucket_of(world, tokens=Rate(1000, per_s=1, burst=100))
    for _ in range(60):
        world.sleep(1)
        bucket.acquire(tokens=50).settle(tokens=10)
    world.sleep(1)
    assert bucket.acquire(tokens=100)
    waits = [bucket.reserve(in_line=1, tokens=50).wait_s for _ in range(3)]

    assert waits == pytest.approx([0.05, 0.06, 0.07], abs=2e-3)
    for _ in range(60):
        world.sleep(1)
        bucket.acquire(tokens=50).settle(tokens=50)
    world.sleep(1)
    assert bucket.acquire(tokens=100)
    waits = [bucket.reserve(in_line=1, tokens=50).wait_s for _ in range(3)]
    assert waits == pytest.approx([0.05, 0.1, 0.15], abs=2e-3), "calls now use all that they take"


def test_a_line_in_one_scope_delays_no_other_scope(world: World) -> None:
    bucket = TokenBucket(
        "llm", world.store(), sleep=world.sleep, calls=Rate(1000), scoped={"mine": Rate(2, burst=1)}
    )
    waits = {
        scope: [bucket.reserve(in_line=1, scope=scope, calls=1, mine=1).wait_s for _ in range(4)]
        for scope in "ab"
    }

    assert waits["a"] == waits["b"] == pytest.approx([0, 0.5, 1.0, 1.5], abs=1e-3)


def test_the_same_id_is_the_same_grant(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(10, per_s=1))
    for _ in range(3):
        assert bucket.acquire(id="call-7")

    assert bucket.status()["calls"]["used"] == 1


def test_settling_corrects_once(world: World) -> None:
    bucket = bucket_of(world)
    grant = bucket.acquire(requests=1, tokens=800)
    assert grant.settle(tokens=730) is True
    assert grant.settle(tokens=1) is False

    status = bucket.status()
    assert (status["tokens"]["used"], status["tokens"]["level"]) == (730, 1500 - 730)
    assert status["requests"]["used"] == 1


def test_settling_for_more_than_was_taken_leaves_a_debt(world: World) -> None:
    bucket = bucket_of(world)
    bucket.acquire(tokens=100).settle(tokens=5000)

    denied = bucket.acquire(tokens=1)
    assert denied.wait_s == pytest.approx((5000 - 1500 + 1) / 1500, abs=1e-3)


def test_more_than_a_burst_passes_when_the_bucket_is_full(world: World) -> None:
    bucket = bucket_of(world)
    assert bucket.acquire(tokens=15_000)
    denied = bucket.acquire(tokens=1500)
    assert denied.wait_s == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize("amount", [90_001, 1e9])
def test_an_amount_above_the_limit_of_a_window_is_refused_at_once(
    world: World, amount: float
) -> None:
    with pytest.raises(
        NeverSatisfiable,
        match=r"tokens of rate limit llm: .* can never be granted, the limit is 90000",
    ):
        bucket_of(world).acquire(requests=1, tokens=amount)


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"token": 1}, "token=1: rate limit llm has requests, tokens"),
        ({"tokens": -1}, "tokens=-1"),
        ({"tokens": float("nan")}, "tokens=nan"),
        (
            {"tokens": 1, "priority": "urgent"},
            "priority='urgent': must be one of critical, high, normal, low",
        ),
        ({}, "give an amount for each: requests, tokens"),
    ],
)
def test_a_wrong_amount_is_refused(world: World, amounts: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        bucket_of(world).acquire(**amounts)


@pytest.mark.parametrize(
    ("limit", "per_s", "burst"), [(0, 1, None), (1, 0, None), (10, 1, 11), (10, 1, 0)]
)
def test_a_wrong_rate_is_refused(limit: float, per_s: float, burst: float | None) -> None:
    with pytest.raises(InvalidValue):
        Rate(limit, per_s, burst)


def test_a_pause_holds_for_every_process(world: World) -> None:
    ours, theirs = bucket_of(world), bucket_of(world)
    ours.hold(20)
    ours.hold(5)

    denied = theirs.acquire(requests=1)
    assert (denied.granted, denied.wait_s) == (False, pytest.approx(20))
    world.sleep(20.001)
    assert theirs.acquire(requests=1)


def test_lower_priorities_leave_a_reserve(world: World) -> None:
    bucket = bucket_of(world, calls=Rate(100, per_s=1))
    drained = {}
    for priority in ("low", "normal", "high", "critical"):
        drained[priority] = 0
        while bucket.acquire(priority=priority):
            drained[priority] += 1

    assert drained == {"low": 70, "normal": 15, "high": 10, "critical": 5}


def test_scopes_have_own_limits_beside_the_global_one(world: World) -> None:
    bucket = TokenBucket("llm", world.store(), requests=Rate(10), scoped={"requests": Rate(2)})
    assert bucket.acquire(requests=1, scope="org-7")
    assert bucket.acquire(requests=1, scope="org-7")
    denied = bucket.acquire(requests=1, scope="org-7")

    assert (denied.granted, denied.limited_by) == (False, "requests of org-7")
    assert bucket.acquire(requests=1, scope="org-8")
    assert bucket.status("org-7")["requests"]["used"] == 3


def test_the_presets() -> None:
    assert {name: (rate.limit, rate.per_s) for name, rate in PROVIDER.items()} == {
        "requests": (3500, 60),
        "tokens": (90_000, 60),
    }
    assert (ROUTER.limit, ROUTER.per_s, ROUTER.capacity) == (1000, 1, 100)


def test_under_saturation_the_limit_is_used_and_never_exceeded(world: World) -> None:
    bucket, window = (
        bucket_of(world, requests=Rate(1750, per_s=30)),
        Window(1750, 30),
    )  # the refill of 3500 a minute
    began, granted = world.now, []
    while world.now < began + 120:
        grant = bucket.acquire(max_wait_s=100)
        assert window.admits(grant.at, 1)
        granted.append(grant.at)

    after_the_first = [
        sum(1 for at in granted if began + 30 * i <= at < began + 30 * (i + 1)) for i in (1, 2, 3)
    ]
    assert min(after_the_first) >= 0.97 * 1750


def test_without_redis_each_process_takes_its_share_and_reports_it_afterwards(world: World) -> None:
    stores = [world.store() for _ in range(4)]
    buckets = [TokenBucket("llm", store, calls=Rate(40, per_s=1)) for store in stores]
    for bucket in buckets * 2:
        bucket.acquire()
    for store in stores:
        store.lost = True

    def pumped(seconds: float) -> int:
        until, count = world.now + seconds, 0
        while world.now < until:
            count += sum(bool(bucket.acquire()) for bucket in buckets)
            world.sleep(0.01)
        return count

    pumped(1)
    assert pumped(4) == pytest.approx(160, abs=4), (
        "the rate holds: each of four processes takes a quarter"
    )
    for store in stores:
        store.lost = False
    pumped(1.6)  # each process tries Redis again within 1.5 s
    used = buckets[0].status()["calls"]["used"]
    assert 35 <= used <= 45, "the takes of the last window are counted"
    world.sleep(1.1)
    assert buckets[0].acquire(), "earlier takes no longer count"


def test_a_pause_set_without_redis_holds_for_all_processes_afterwards(
    world: World,
) -> None:
    stores = [world.store() for _ in range(2)]
    ours, theirs = (TokenBucket("llm", store, calls=Rate(40, per_s=1)) for store in stores)
    ours.acquire()
    stores[0].lost = True
    ours.hold(60)
    ours.hold(5)
    stores[0].lost = False
    world.sleep(2)

    assert ours.acquire().wait_s == pytest.approx(58)
    assert theirs.acquire().wait_s == pytest.approx(58)


def test_a_leased_amount_is_spent_without_round_trips(world: World) -> None:
    store = world.store()
    leased, count = LeasedBucket(TokenBucket("router", store, messages=ROUTER)), 0
    until = world.now + 2
    while world.now < until:
        count += bool(leased.acquire())
        world.sleep(0.0011)

    assert count == pytest.approx(2 / 0.0011, rel=0.01), "every take below the rate is granted"
    assert store.round_trips < 0.1 * count


def test_leases_of_several_processes_never_admit_more_than_the_rate(world: World) -> None:
    many = [LeasedBucket(TokenBucket("router", world.store(), messages=ROUTER)) for _ in range(8)]
    began, admitted = world.now, []
    while world.now < began + 3:
        admitted += [world.now for each in many for _ in range(5) if each.acquire()]
        world.sleep(0.002)

    for start in range(20):
        at = began + start * 0.1
        assert sum(1 for each in admitted if at <= each < at + 1) <= 1000 + 100
    assert len(admitted) >= 0.9 * 3 * 1000


def test_a_leased_bucket_notes_soon_that_a_pause_was_released(world: World) -> None:
    bucket = TokenBucket("router", world.store(), messages=ROUTER)
    store = world.store()
    leased = LeasedBucket(TokenBucket("router", store, messages=ROUTER))
    bucket.hold(500.0)

    assert leased.acquire().wait_s == pytest.approx(500)
    asked = store.round_trips
    world.sleep(0.5)
    assert leased.acquire().wait_s == pytest.approx(499.5)
    assert store.round_trips == asked, "a denial counts for a while"
    bucket.release()
    world.sleep(LeasedBucket.ASK_AGAIN_S)

    assert leased.acquire()


class Oracle:
    """One limit in plain Python: the same rule, computed from a list of all grants."""

    def __init__(self, rate: Rate, now: float, guard_s: float) -> None:
        self.rate, self.level, self.at = rate, rate.capacity, now
        self.granted: list[tuple[float, float]] = []
        self.span, self.width = rate.per_s + guard_s, rate.per_s / 256

    def flow(self, now: float) -> None:
        self.level = min(
            self.rate.capacity, self.level + (now - self.at) * self.rate.limit / self.rate.per_s
        )
        self.at = now

    def bucket_wait(self, amount: float) -> float:
        return max(
            0.0, (min(amount, self.rate.capacity) - self.level) * self.rate.per_s / self.rate.limit
        )

    def in_any_window(self) -> float:
        return max(
            (
                sum(n for at, n in self.granted if start <= at < start + self.rate.per_s)
                for start, _ in self.granted
            ),
            default=0,
        )


@settings(max_examples=100)
@given(
    limit=st.integers(2, 50),
    per_s=st.sampled_from([0.5, 1.0, 7.0, 60.0]),
    burst=st.floats(0.05, 1),
    steps=st.lists(
        st.tuples(
            st.floats(0, 0.4),
            st.integers(1, 8),
            st.floats(0, 0.5),
            st.sampled_from([None, 0.0, 0.5, 1.0]),
        ),
        max_size=60,
    ),
)
def test_grants_equal_those_of_a_model_in_plain_python(
    limit: int, per_s: float, burst: float, steps: list[tuple[float, int, float, float | None]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World()
        world.install(patch)
        rate = Rate(limit, per_s, max(1.0, burst * limit))
        bucket = TokenBucket("llm", world.store(), calls=rate)
        oracle = Oracle(rate, world.now, min(0.3, 0.005 * per_s))
        for pause, amount, patience, settled in steps:
            world.sleep(round(pause * per_s, 6))
            oracle.flow(world.now)
            amount = min(amount, limit)
            before = limits_of(world)
            grant = bucket.reserve(calls=amount, max_wait_s=round(patience * per_s, 6))
            assert grant.wait_s >= oracle.bucket_wait(amount) - 1e-5
            if not grant:
                assert limits_of(world) == before
                assert grant.wait_s > patience * per_s - 2e-6
                assert_grants_at_that_time_only(world, bucket, amount, grant.wait_s)
                continue
            oracle.level -= amount
            oracle.granted.append((grant.at, amount))
            if settled is not None:
                used = settled * amount
                assert [grant.settle(calls=used), grant.settle(calls=0)] == [True, False]
                oracle.level = min(rate.capacity, oracle.level + amount - used)
                oracle.granted[-1] = (grant.at, used)
            assert oracle.in_any_window() <= limit + 1e-6
            assert bucket.status()["calls"]["level"] == pytest.approx(oracle.level, abs=1e-3)


def assert_grants_at_that_time_only(
    world: World, bucket: TokenBucket, amount: int, wait_s: float
) -> None:
    if wait_s > 0.004:
        with world.future(wait_s - 0.002):
            assert not bucket.acquire(calls=amount)
    with world.future(wait_s):
        assert bucket.acquire(calls=amount)


def test_a_pause_is_told_with_its_end_and_a_release_wakes_those_in_its_line(world: World) -> None:
    bucket = TokenBucket("llm", world.store(), requests=Rate(60, per_s=60))
    other = TokenBucket("llm", world.store(), requests=Rate(60, per_s=60))
    bucket.hold(86_400.0)
    until = time.strftime("%H:%M:%S", time.gmtime(world.now + HOLD_MOST_S))
    woken: list[str] = []

    for urgency, waiter in ((2, "job b"), (0, "job a")):
        grant = other.reserve(requests=1)
        denied = other.denied(grant, "no room", waiter=waiter, urgency=urgency)
        assert denied.retry_after_s == pytest.approx(HOLD_MOST_S, abs=0.1)
        assert (denied.why, denied.noted) == (
            f"its provider asked for a pause until {until} UTC",
            True,
        )
        assert world.store().call(bucket.waits(waiter)) == [1]

    assert bucket.release(woken.extend) == pytest.approx(HOLD_MOST_S)
    assert woken == ["job a", "job b"]
    assert world.store().call(bucket.waits("job a")) == [0]
    assert other.reserve(requests=1)
    assert (bucket.release(woken.extend), len(woken)) == (0.0, 2)


def test_without_a_pause_or_for_a_short_one_no_waiter_stands_in_line(world: World) -> None:
    bucket = TokenBucket("llm", world.store(), requests=Rate(60, per_s=60, burst=1))
    assert bucket.reserve(requests=1)

    empty = bucket.denied(bucket.reserve(requests=1), "no room", waiter="job a")
    bucket.hold(LINE_FROM_S - 1)
    short = bucket.denied(bucket.reserve(requests=1), "no room", waiter="job a")

    assert (empty.why, empty.noted) == ("no room", False)
    assert (short.why[:12], short.noted) == ("its provider", False)


def test_a_bucket_that_is_emptier_than_its_pause_is_long_says_that_it_has_no_room(
    world: World,
) -> None:
    bucket = TokenBucket("llm", world.store(), requests=Rate(6, per_s=60, burst=1))
    assert bucket.reserve(requests=1)
    bucket.hold(2.0)

    assert bucket.reserve(requests=1).held_until == 0.0
