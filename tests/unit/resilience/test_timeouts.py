"""Time limits of items: the base table, learned limits, and limits while Redis is away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import InvalidValue
from resilience.keys import Keys
from resilience.store import Call, Store
from resilience.timeouts import (
    BUCKETS,
    RATIO,
    TTL_S,
    Timeouts,
    TimeoutSettings,
    bucket_of,
    percentile,
    upper_edge_s,
)
from tests.unit.harness import Clock

WORDS = ("simple", "medium", "complex", "very_complex")
CAP_S = 10_800.0
KEY = Keys("rlm").timing("op")


class Counted(Store):
    """A store on fakeredis that counts its round trips and can lose its server."""

    def __init__(self) -> None:
        self.server, self.time, self.round_trips = fakeredis.FakeServer(), Clock(), 0
        super().__init__(
            "redis://fake", client=fakeredis.FakeRedis(server=self.server), clock=self.time
        )

    def _run(self, *calls: Call) -> list[Any]:
        self.round_trips += 1
        return super()._run(*calls)

    def weights(self) -> dict[int, float]:
        """Return the histogram as it is stored."""
        stored = self.client.hgetall(KEY)
        return {int(field): float(weight) for field, weight in stored.items() if field != b"since"}


def taught(durations_s: Sequence[float], settings: TimeoutSettings | None = None) -> Timeouts:
    timeouts = Timeouts(Counted(), settings=settings or TimeoutSettings())
    timeouts.learn("op", durations_s)
    return timeouts


def lognormal(random: Random, sigma: float) -> float:
    return 100 * math.exp(sigma * random.gauss(0, 1))


def bimodal(random: Random) -> float:
    return random.gauss(60, 6) if random.random() < 0.8 else random.gauss(600, 60)


DISTRIBUTIONS: dict[str, Callable[[Random], float]] = {
    "lognormal 0.5": lambda random: lognormal(random, 0.5),
    "lognormal 1": lambda random: lognormal(random, 1.0),
    "bimodal": bimodal,
}


# --- the base table ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("complexity", "expected_s"),
    [("simple", 300), ("medium", 900), ("complex", 2700), ("very_complex", 7200)]
    + [(undeclared, 7200) for undeclared in ("", "linear", "quadratic", "Simple")],
)
def test_the_base_table_holds_for_an_operation_without_samples(
    complexity: str, expected_s: float
) -> None:
    assert Timeouts(Counted()).limit_s("op", complexity) == expected_s


def test_a_multiplier_scales_the_base_of_its_operation_alone() -> None:
    timeouts = Timeouts(Counted(), multipliers={"slow": 2.0, "fast": 0.5})

    assert [timeouts.limit_s(name, "medium") for name in ("slow", "fast", "other")] == [
        1800,
        450,
        900,
    ]


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.inf, math.nan])
def test_a_multiplier_that_is_not_above_zero_is_refused(multiplier: float) -> None:
    with pytest.raises(InvalidValue, match=r"multipliers\.op"):
        Timeouts(Counted(), multipliers={"op": multiplier})


def test_twice_the_estimate_may_only_lengthen_the_limit() -> None:
    timeouts = Timeouts(Counted())

    assert timeouts.limit_s("op", "simple", estimate_s=149) == 300
    assert timeouts.limit_s("op", "simple", estimate_s=200) == 400


def test_each_retry_lengthens_the_limit_by_half_up_to_the_cap() -> None:
    timeouts = Timeouts(Counted())

    assert [timeouts.limit_s("op", "simple", retries=n) for n in range(3)] == [300, 450, 675]
    assert timeouts.limit_s("op", retries=1) == CAP_S
    assert timeouts.limit_s("op", retries=10**6) == CAP_S
    assert timeouts.limit_s("op", estimate_s=1e9) == CAP_S


def test_no_limit_exceeds_the_remaining_time() -> None:
    timeouts = Timeouts(Counted())

    assert [timeouts.limit_s("op", "simple", remaining_s=left) for left in (1e9, 20, 0, -5)] == [
        300,
        20,
        0,
        0,
    ]


def test_the_table_can_be_set_and_is_checked() -> None:
    settings = TimeoutSettings(simple_s=7, cap_s=10)

    assert Timeouts(Counted(), settings=settings).limit_s("op", "simple", retries=5) == 10
    for wrong in (
        {"simple_s": 0},
        {"cap_s": -1},
        {"retry_penalty": 0.9},
        {"floor": 0},
        {"min_samples": 0},
    ):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            TimeoutSettings(**wrong)


# --- properties -------------------------------------------------------------------------------

SHARED = {"untaught": Timeouts(Counted(), multipliers={"op": 1.7}), "taught": taught([90.0] * 200)}


@given(
    st.sampled_from(sorted(SHARED)),
    st.integers(0, 40),
    st.floats(0, 1e6),
    st.none() | st.floats(0, 1e6),
)
def test_more_complexity_and_more_retries_never_shorten_a_limit(
    which: str, retries: int, estimate_s: float, remaining_s: float | None
) -> None:
    def limits_s(more: int) -> list[float]:
        more_fields = {"estimate_s": estimate_s, "remaining_s": remaining_s}
        return [
            SHARED[which].limit_s("op", word, retries=retries + more, **more_fields)
            for word in WORDS
        ]  # type: ignore[arg-type]

    now, later = limits_s(0), limits_s(1)

    assert all(less <= more for less, more in [*pairwise(now), *zip(now, later, strict=True)])
    assert all(
        0 <= each <= min(CAP_S, remaining_s if remaining_s is not None else CAP_S)
        for each in now + later
    )


# --- the histogram ----------------------------------------------------------------------------


@given(st.floats(0, 1e9))
def test_a_duration_is_in_the_bucket_whose_edges_are_around_it(seconds: float) -> None:
    bucket = bucket_of(seconds)

    assert 0 <= bucket < BUCKETS
    assert bucket == BUCKETS - 1 or seconds <= upper_edge_s(bucket) * (1 + 1e-6)
    assert bucket == 0 or seconds > upper_edge_s(bucket - 1)


def test_the_buckets_reach_from_a_millisecond_to_beyond_the_cap() -> None:
    assert [bucket_of(upper_edge_s(bucket)) for bucket in range(BUCKETS)] == list(range(BUCKETS))
    assert upper_edge_s(0) == 0.001
    assert upper_edge_s(BUCKETS - 1) > 1000 * CAP_S
    assert (bucket_of(-1.0), bucket_of(math.inf)) == (0, BUCKETS - 1)


def test_a_percentile_is_the_upper_edge_of_the_bucket_it_ends_in() -> None:
    weights = {40: 1.0, 10: 98.0, 30: 1.0}

    assert [percentile(weights, share) for share in (0.5, 0.98, 0.99, 1.0)] == [
        upper_edge_s(at) for at in (10, 10, 30, 40)
    ]
    assert percentile({3: 0.1, 4: 0.2, 5: 0.3}, 1.0) == upper_edge_s(5)
    with pytest.raises(ValueError, match="empty"):
        percentile({}, 0.99)


def test_many_samples_are_one_round_trip_and_no_sample_is_none() -> None:
    store = Counted()
    timeouts = Timeouts(store)

    timeouts.learn("op", [])
    assert store.round_trips == 0
    timeouts.learn("op", [0.0005, 10.0, 10.0, 10.1, 50.0])
    assert store.round_trips == 1
    assert store.weights() == {0: 1, bucket_of(10.0): 3, bucket_of(50.0): 1}
    assert store.client.ttl(KEY) == TTL_S == 2_592_000


def test_weights_fade_once_500_samples_have_arrived() -> None:
    store = Counted()
    timeouts = Timeouts(store)

    timeouts.learn("op", [1.0] * 499)
    assert store.weights() == {bucket_of(1.0): 499}
    timeouts.learn("op", [2.0] * 2)
    assert store.weights() == pytest.approx({bucket_of(1.0): 499 * 0.5, bucket_of(2.0): 2 * 0.5})
    timeouts.learn("op", [2.0] * 1000)
    faded = {bucket_of(1.0): 499 * 0.5**2, bucket_of(2.0): (2 * 0.5 + 1000) * 0.5}
    assert store.weights() == pytest.approx(faded), (
        "one call fades the weights once, however many samples it has"
    )
    assert store.client.hget(KEY, "since") == b"0"


def test_every_write_extends_the_expiry() -> None:
    store = Counted()
    timeouts = Timeouts(store)
    timeouts.learn("op", [1.0])
    store.client.expire(KEY, 10)

    timeouts.limit_s("op")
    assert store.client.ttl(KEY) == 10
    timeouts.learn("op", [1.0])
    assert store.client.ttl(KEY) == TTL_S


# --- the learned limit ------------------------------------------------------------------------


def test_fifty_samples_are_enough_and_forty_nine_are_not() -> None:
    assert taught([800.0] * 49).limit_s("op", "simple") == 300
    assert taught([800.0] * 50).limit_s("op", "simple") == 1.5 * upper_edge_s(bucket_of(800.0))


def test_the_learned_limit_has_a_floor_a_penalty_and_the_cap() -> None:
    quick = Timeouts(Counted(), multipliers={"op": 2.0})
    quick.learn("op", [1.0] * 50)

    assert quick.limit_s("op", "complex") == 0.25 * 2.0 * 2700
    assert quick.limit_s("op", "complex", retries=2) == 0.25 * 2.0 * 2700 * 1.5**2
    assert taught([9000.0] * 50).limit_s("op", "simple") == CAP_S


def test_samples_shorten_no_limit_below_five_minutes_unless_its_base_is_shorter() -> None:
    for complexity in ("simple", "medium"):
        assert taught([0.01] * 100).limit_s("op", complexity) == 300
    short = Timeouts(Counted(), multipliers={"op": 0.1}, settings=TimeoutSettings())
    short.learn("op", [0.01] * 100)
    assert short.limit_s("op", "simple") == 30
    asked = Timeouts(Counted(), settings=TimeoutSettings(least_s=60))
    asked.learn("op", [0.01] * 100)
    assert asked.limit_s("op", "simple") == 75


def test_twice_the_estimate_is_allowed_whatever_the_samples_say() -> None:
    assert taught([1.0] * 50).limit_s("op", "simple", estimate_s=1000) == 2000


def test_operations_learn_apart_and_workers_learn_together() -> None:
    store = Counted()
    mine, theirs = Timeouts(store), Timeouts(store)
    mine.learn("op", [800.0] * 25)
    theirs.learn("op", [800.0] * 25)

    assert mine.limit_s("op", "simple") == theirs.limit_s("op", "simple") > 1200
    assert mine.limit_s("other", "simple") == 300


def test_learned_limits_are_read_every_thirty_seconds() -> None:
    store = Counted()
    timeouts = Timeouts(store)
    assert timeouts.limit_s("op", "simple") == 300
    timeouts.learn("op", [800.0] * 50)

    store.time.now = 29.9
    assert [timeouts.limit_s("op", "simple") for _ in range(100)] == [300] * 100
    assert store.round_trips == 2
    store.time.now = 30.0
    assert timeouts.limit_s("op", "simple") > 1200
    assert store.round_trips == 3


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_fewer_than_one_in_a_hundred_good_items_is_stopped(name: str) -> None:
    random, draw = Random(1), DISTRIBUTIONS[name]
    limit_s = taught([draw(random) for _ in range(5000)]).limit_s("op", "simple")

    later = sorted(draw(random) for _ in range(20_000))

    assert sum(took > limit_s for took in later) / len(later) < 0.01
    assert limit_s < later[int(0.99 * len(later))] * 1.5 * RATIO * 1.1


class Loop:
    """Items that run under the limit that they teach.

    A stopped item is a sample of the limit that stopped it.
    """

    def __init__(self, draw: Callable[[Random], float], history: int, seed: int) -> None:
        self.random, self.draw, self.store, self.stopped = Random(seed), draw, Counted(), 0
        self.timeouts = Timeouts(self.store)
        for _ in range(0, history, 50):
            self.timeouts.learn("op", [draw(self.random) for _ in range(50)])

    def limit_s(self) -> float:
        self.store.time.now += 30
        return self.timeouts.limit_s("op", "simple")

    def run(self, items: int, slower: float) -> None:
        for _ in range(items):
            took, limit_s = slower * self.draw(self.random), self.limit_s()
            self.stopped += took > limit_s
            self.timeouts.learn("op", [min(took, limit_s)])

    def stops(self, slower: float) -> float:
        """Return the share of such items that the present limit would stop."""
        limit_s = self.limit_s()
        return sum(slower * self.draw(self.random) > limit_s for _ in range(20_000)) / 20_000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("history", [500, 5000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_items_that_take_three_times_as_long_are_learned_within_200_samples(
    name: str, history: int, seed: int
) -> None:
    """At most 1,000 earlier samples count, so the new ones soon outweigh the last hundredth.

    A heavy tail is less well known from 200 samples than from 5,000. The share of stopped items may
    therefore be three times the usual.
    """
    loop = Loop(DISTRIBUTIONS[name], history=history, seed=seed)

    loop.run(200, slower=3.0)

    assert loop.stops(slower=3.0) <= 0.03
    assert loop.stopped <= 25


# --- Redis is away ----------------------------------------------------------------------------


def test_without_redis_the_base_table_holds_and_samples_are_lost() -> None:
    store = Counted()
    store.server.connected = False
    timeouts = Timeouts(store)

    timeouts.learn("op", [800.0] * 50)
    assert timeouts.limit_s("op", "medium", retries=1) == 1350

    store.server.connected, store.time.now = True, 2.0
    assert timeouts.limit_s("op", "medium") == 900
    timeouts.learn("op", [800.0] * 50)
    store.time.now = 40.0
    assert timeouts.limit_s("op", "medium") == 1.5 * upper_edge_s(bucket_of(800.0))


def test_while_redis_is_away_the_limits_read_last_hold() -> None:
    store = Counted()
    timeouts = Timeouts(store)
    timeouts.learn("op", [800.0] * 50)
    learned_s = timeouts.limit_s("op", "simple")

    store.server.connected, store.time.now = False, 1000.0
    assert timeouts.limit_s("op", "simple") == learned_s > 300
    assert timeouts.limit_s("new", "simple") == 300

    store.server.connected, store.time.now = True, 1002.0
    timeouts.learn("op", [2000.0] * 50)
    assert timeouts.limit_s("op", "simple") == 1.5 * upper_edge_s(bucket_of(2000.0))


def test_a_record_of_another_type_costs_no_item_and_is_no_outage_of_redis() -> None:
    store = Counted()
    store.client.set(KEY, "not a hash")

    Timeouts(store).learn("op", [1.0])
    assert Timeouts(store).limit_s("op", "simple") > 0
    assert not store.is_away


def test_urgent_work_gets_more_time_and_never_more_than_the_cap() -> None:
    timeouts = taught([])

    assert timeouts.limit_s("parse", "simple", stretch=2.0) == 2 * timeouts.limit_s(
        "parse", "simple"
    )
    assert timeouts.limit_s("parse", "very_complex", stretch=2.0) == 10_800
