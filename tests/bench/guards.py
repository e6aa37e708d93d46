"""Measure the cost of a guard: microseconds and round trips of a call, against other libraries.

`tests.bench` calls it; begin with `guards`.  All libraries take turns on one private server.  The
server counts a round trip for each read from a socket.  Microseconds are medians over the turns;
round trips are means."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from statistics import mean, median
from typing import Any, NamedTuple

import limits
import pybreaker
import redis
import throttled
from limits.storage import RedisStorage

from resilience import (
    BreakerConfig,
    Bulkhead,
    CircuitBreaker,
    LeasedBucket,
    Rate,
    RetryBudget,
    Store,
    TokenBucket,
)
from resilience.bucket import PROVIDER, ROUTER
from rlm_tasks.testing import embedded

TURN_S = 0.15
PACE_S = 1 / 900
ROUND_TRIPS = "total_reads_processed"

PLENTY = {
    "requests": Rate(1_000_000_000, per_s=60, burst=1_000_000_000),
    "tokens": Rate(1_000_000_000, per_s=60, burst=1_000_000_000),
}
SPENT = {
    "requests": PLENTY["requests"],
    "tokens": Rate(PROVIDER["tokens"].limit, per_s=86_400, burst=PROVIDER["tokens"].limit),
}
AMOUNTS = {"requests": 1, "tokens": 800}

Ask = Callable[[], object]


class Measured(NamedTuple):
    """One line of the table."""

    what: str
    ours: str
    compared: str
    ratio: str
    figure: str
    met: bool | None


class Cost(NamedTuple):
    """The cost of a call: microseconds and round trips."""

    us: float
    trips: float

    def __str__(self) -> str:
        trips = "< 0.001" if 0 < self.trips < 0.001 else f"{self.trips:.3f}".rstrip("0").rstrip(".")
        return f"{self.us:,.1f} us, {trips} round trip{'s' * (trips != '1')}"


@dataclass(frozen=True)
class Bench:
    """A server, and the connection that reads its statistics."""

    url: str
    control: redis.Redis
    pairs: int

    def trips(self) -> int:
        """Return the number of requests that the server has read, without this one."""
        return int(self.control.info("stats")[ROUND_TRIPS]) - 1

    def store(self) -> Store:
        """Return a store.  Its timeout is long: a late answer must not count as an outage."""
        return Store.from_url(self.url, timeout_s=5.0)


Turn = Callable[[Bench], Cost]
Figure = tuple[str, Callable[[Cost], bool]]
FAST: Figure = ("< 10 us", lambda cost: cost.us < 10)
ONE_TRIP: Figure = ("1 round trip", lambda cost: round(cost.trips, 2) == 1)
SELDOM: Figure = ("< 0.1 round trips", lambda cost: cost.trips < 0.1)


# --- one turn ---------------------------------------------------------------------------------


def running(ask: Ask, *, expected: bool = True) -> Turn:
    """Return a turn of calls one after the other, for about TURN_S seconds.

    The turn raises RuntimeError if an answer is not `expected`.
    """
    began = time.perf_counter()
    for _ in range(20):
        ask()
    calls = max(20, int(TURN_S / (time.perf_counter() - began) * 20))

    def turn(bench: Bench) -> Cost:
        trips, began = bench.trips(), time.perf_counter()
        answers = {bool(ask()) for _ in range(calls)}
        took = time.perf_counter() - began
        if answers != {expected}:
            raise RuntimeError(f"answers were {answers}, not {expected}")
        return Cost(took / calls * 1e6, (bench.trips() - trips - 1) / calls)

    return turn


def prepared(prepare: Ask, ask: Ask, calls: int = 20) -> Turn:
    """Return a turn of calls with a preparation before each; the preparation is not measured."""

    def turn(bench: Bench) -> Cost:
        took = trips = 0.0
        for _ in range(calls):
            prepare()
            before, began = bench.trips(), time.perf_counter()
            ask()
            took += time.perf_counter() - began
            trips += bench.trips() - before - 1
        return Cost(took / calls * 1e6, trips / calls)

    return turn


def paced(ask: Ask, seconds: float = 0.6) -> Turn:
    """Return a turn of calls at a steady rate; only the calls are timed.

    The turn raises RuntimeError if a call is denied.
    """

    def turn(bench: Bench) -> Cost:
        trips, took, calls = bench.trips(), 0.0, 0
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            if not ask():
                raise RuntimeError(f"call {calls} was denied")
            took, calls = took + time.perf_counter() - now, calls + 1
            time.sleep(max(0.0, now + PACE_S - time.perf_counter()))
        return Cost(took / calls * 1e6, (bench.trips() - trips - 1) / calls)

    return turn


def contest(
    bench: Bench,
    what: str,
    ours: Turn,
    others: Mapping[str, Turn],
    figure: str = "",
    met: Callable[[Cost], bool] | None = None,
) -> Iterator[Measured]:
    """Let all libraries take turns, and yield the comparison of ours with each of the others."""
    turns = {"": ours, **others}
    costs: dict[str, list[Cost]] = {name: [] for name in turns}
    for _ in range(bench.pairs):
        for name, turn in turns.items():
            costs[name].append(turn(bench))
    total = {
        name: Cost(median(each.us for each in them), mean(each.trips for each in them))
        for name, them in costs.items()
    }
    verdict = met(total[""]) if met else None
    if not others:
        yield Measured(what, str(total[""]), "", "", figure, verdict)
    for name in others:
        ratio = median(
            mine.us / theirs.us for mine, theirs in zip(costs[""], costs[name], strict=True)
        )
        yield Measured(
            f"{what}, against {name}",
            str(total[""]),
            str(total[name]),
            f"{ratio:.3f}",
            figure,
            verdict,
        )


# --- breakers ---------------------------------------------------------------------------------


def answer() -> bool:
    """Answer as a service that works."""
    return True


def fail() -> bool:
    """Fail as a service that does not answer."""
    raise TimeoutError


def _failing(breaker: pybreaker.CircuitBreaker) -> Ask:
    def ask() -> bool:
        with contextlib.suppress(TimeoutError, pybreaker.CircuitBreakerError):
            breaker.call(fail)
        return True

    return ask


def _failing_after(failures: int, breaker: pybreaker.CircuitBreaker) -> Ask:
    fail_once = _failing(breaker)

    def prepare() -> None:
        breaker.close()
        for _ in range(failures):
            fail_once()

    return prepare


def _theirs(bench: Bench, name: str) -> pybreaker.CircuitBreaker:
    storage = pybreaker.CircuitRedisStorage(
        pybreaker.STATE_CLOSED, redis.Redis.from_url(bench.url), namespace=name
    )
    return pybreaker.CircuitBreaker(fail_max=5, reset_timeout=600, state_storage=storage)


def breakers(bench: Bench) -> Iterator[Measured]:
    """Measure the closed path, a failure that is counted, one that trips, and a refusal."""
    store, name = bench.store(), "pybreaker's CircuitRedisStorage"
    closed, theirs, memory = (
        CircuitBreaker("closed", store),
        _theirs(bench, "closed"),
        pybreaker.CircuitBreaker(),
    )
    others = {
        name: running(lambda: theirs.call(answer)),
        "pybreaker in memory, shared with nobody": running(lambda: memory.call(answer)),
    }
    yield from contest(
        bench,
        "breaker, closed, a call succeeds",
        running(lambda: closed.call(answer)),
        others,
        *FAST,
    )

    mine, other = (
        CircuitBreaker("failing", store, BreakerConfig(recovery_timeout_s=600)),
        _theirs(bench, "failing"),
    )
    for what, failures in (("a failure is counted", 1), ("the failure that trips it", 4)):
        turns = [prepared(_failing_after(failures, each), _failing(each)) for each in (mine, other)]
        yield from contest(bench, f"breaker, {what}", turns[0], {name: turns[1]}, *ONE_TRIP)
    mine.open(), other.open()
    turns = [running(_failing(each)) for each in (mine, other)]
    yield from contest(bench, "breaker, open, a call is refused", turns[0], {name: turns[1]}, *FAST)


# --- buckets ----------------------------------------------------------------------------------


def _taking(bench: Bench, name: str, rates: Mapping[str, Rate]) -> Ask:
    named: dict[str, Any] = dict(rates)
    amounts: dict[str, Any] = {each: AMOUNTS[each] for each in rates}
    bucket = TokenBucket(name, bench.store(), **named)
    return lambda: bucket.acquire(**amounts)


def _hitting(limiter: limits.strategies.RateLimiter, name: str, rates: Mapping[str, Rate]) -> Ask:
    """Hit one limit after the other, as users of `limits` do.

    A caller that the second limit denies has already used up the first.
    """
    items = [
        (
            limits.RateLimitItemPerSecond(int(rate.limit), int(rate.per_s)),
            f"{name}:{each}",
            AMOUNTS[each],
        )
        for each, rate in rates.items()
    ]
    return lambda: all(limiter.hit(item, key, cost=amount) for item, key, amount in items)


def _throttling(bench: Bench, algorithm: str, name: str, rates: Mapping[str, Rate]) -> Ask:
    """Ask one limit after the other, as users of throttled-py do."""
    store = throttled.RedisStore(server=bench.url)
    throttles = [
        (
            throttled.Throttled(
                key=f"{name}:{each}",
                using=algorithm,
                store=store,
                quota=throttled.per_duration(
                    timedelta(seconds=rate.per_s), int(rate.limit), int(rate.capacity)
                ),
            ),
            AMOUNTS[each],
        )
        for each, rate in rates.items()
    ]
    return lambda: all(not throttle.limit(cost=amount).limited for throttle, amount in throttles)


def rivals(bench: Bench, name: str, rates: Mapping[str, Rate]) -> dict[str, Ask]:
    """Return the same limits in other libraries."""
    storage = RedisStorage(bench.url)
    return {
        "limits, moving window": _hitting(
            limits.strategies.MovingWindowRateLimiter(storage), name, rates
        ),
        "limits, sliding window counter": _hitting(
            limits.strategies.SlidingWindowCounterRateLimiter(storage), name, rates
        ),
        "throttled-py, token bucket": _throttling(bench, "token_bucket", name, rates),
        "throttled-py, GCRA": _throttling(bench, "gcra", name, rates),
    }


def buckets(bench: Bench) -> Iterator[Measured]:
    """Measure a take from two limits, a take from one limit, and a denial."""
    for what, name, rates, expected in (
        ("bucket, requests and tokens taken", "two", PLENTY, True),
        ("bucket, requests taken", "one", {"requests": PLENTY["requests"]}, True),
        ("bucket, requests and tokens denied", "spent", SPENT, False),
    ):
        asks = {"": _taking(bench, name, rates), **rivals(bench, name, rates)}
        if not expected:
            for ask in asks.values():
                while ask():
                    pass
        turns = {rival: running(ask, expected=expected) for rival, ask in asks.items()}
        yield from contest(bench, what, turns.pop(""), turns, *ONE_TRIP)


def leases(bench: Bench) -> Iterator[Measured]:
    """Measure a router's bucket, at nine tenths of its rate."""
    leased = LeasedBucket(TokenBucket("router", bench.store(), requests=ROUTER))
    others = rivals(bench, "router", {"requests": ROUTER})
    names = ("limits, sliding window counter", "throttled-py, GCRA")
    turns = {name: paced(others[name]) for name in names}
    yield from contest(
        bench, "leased bucket, 1,000/s asked at 900/s", paced(leased.acquire), turns, *SELDOM
    )


# --- the rest ---------------------------------------------------------------------------------


def rest(bench: Bench) -> Iterator[Measured]:
    """Measure the bulkhead and the retry budget; no figure is set for them."""
    bulkhead, budget = Bulkhead("llm", bench.store()), RetryBudget("llm", bench.store())

    def permit() -> bool:
        permit = bulkhead.acquire()
        found = bool(permit)
        permit.release()
        return found

    def spend() -> bool:
        for _ in range(10):
            budget.attempted()
        return budget.spend()

    yield from contest(bench, "bulkhead, a permit taken and given back", running(permit), {})
    yield from contest(bench, "retry budget, ten first attempts and a retry", running(spend), {})


def guards(pairs: int) -> Iterator[Measured]:
    """Measure all guards."""
    logger = logging.getLogger("resilience")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a breaker that opens writes to the log
    with embedded.server() as server, redis.Redis.from_url(server.url) as control:
        bench = Bench(server.url, control, pairs)
        for group in (breakers, buckets, leases, rest):
            yield from group(bench)
    logger.setLevel(level)
