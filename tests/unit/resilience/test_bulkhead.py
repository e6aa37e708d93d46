"""The shared bulkhead: permits, their leases, waiters, and limits that adapt."""

from __future__ import annotations

import asyncio
import gc
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilience.bucket import Rate, TokenBucket
from resilience.bulkhead import PRESETS, Aimd, Bulkhead, Elastic, Permit
from resilience.errors import BulkheadFull, CallTimeout, Category, InvalidValue, NeverSatisfiable
from resilience.keys import Keys
from resilience.store import Store, together
from tests.unit.world import World, world

__all__ = ["world"]


class Process(Bulkhead):
    """A bulkhead that acts for a process of a given number, as all share one process in a test."""

    number = 0

    @property
    def owner(self) -> str:
        return f"{self._host}:{self.number}"


def used(bulkhead: Bulkhead) -> float:
    return bulkhead.status()["used"]


def test_by_default_50_calls_are_in_flight_over_all_hosts_and_10_on_each(world: World) -> None:
    hosts = [Bulkhead("llm", world.store(), host=f"host-{i}") for i in range(6)]

    first = [bool(hosts[0].acquire()) for _ in range(11)]
    others = [sum(bool(host.acquire()) for _ in range(11)) for host in hosts[1:]]

    assert first == [*[True] * 10, False]
    assert others == [10, 10, 10, 10, 0], "all fifty permits are taken"


def test_processes_share_a_limit_and_names_do_not(world: World) -> None:
    ours, theirs, other = (Bulkhead(name, world.store(), limit=2) for name in ("llm", "llm", "db"))
    held = [ours.acquire(), theirs.acquire()]

    assert all(held)
    assert not theirs.acquire()
    assert other.acquire()
    held[0].release()
    assert theirs.acquire()


def test_a_host_may_be_any_name_to_count_by(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), per_host=1)

    assert [bool(bulkhead.acquire(host=endpoint)) for endpoint in ("a", "b", "a", "")] == [
        True,
        True,
        False,
        True,
    ]


def test_a_permit_is_given_back_once(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=2)
    first, second = bulkhead.acquire(), bulkhead.acquire()
    first.release()
    first.release()

    assert not first, "it has been given back"
    assert used(bulkhead) == 1
    second.release()
    assert used(bulkhead) == 0


def test_the_permit_of_a_dead_holder_is_free_when_its_lease_ends(world: World) -> None:
    dead, alive = (Bulkhead("llm", world.store(), limit=1, lease_s=60) for _ in range(2))
    late = dead.acquire()
    world.sleep(10)
    denied = alive.acquire()
    assert denied.wait_s == pytest.approx(50, abs=0.01), "the end of the lease"
    world.sleep(denied.wait_s)

    assert alive.acquire()
    late.release()
    assert used(alive) == 1, "a late release gives back nothing, as the lease is over"


def test_all_permits_of_a_process_that_is_forgotten_are_free_at_once(world: World) -> None:
    dead, alive = (Process("llm", world.store(), limit=3, host="a") for _ in range(2))
    dead.number, alive.number = 1, 12
    assert all([dead.acquire(), dead.acquire(weight=1, host="endpoint"), alive.acquire()])

    assert alive.forget(dead.owner) == 2
    assert alive.forget(dead.owner) == 0
    assert used(alive) == 1, "an owner with the same prefix is another process"
    assert alive.acquire(weight=2)


def test_a_call_may_weigh_more_than_one(world: World) -> None:
    bulkhead = Bulkhead("pool", world.store(), limit=10)
    heavy = bulkhead.acquire(weight=7)

    assert [bool(bulkhead.acquire(weight=each)) for each in (4, 2.5, 0.5)] == [False, True, True]
    assert used(bulkhead) == 10
    heavy.release()
    assert used(bulkhead) == 3


@pytest.mark.parametrize(("weight", "per_host", "bound"), [(21, None, 20), (6, 5, 5)])
def test_a_weight_above_the_limit_is_refused_at_once(
    world: World, weight: float, per_host: float | None, bound: int
) -> None:
    bulkhead = Bulkhead("pool", world.store(), limit=20, per_host=per_host, sleep=world.sleep)

    with pytest.raises(
        NeverSatisfiable,
        match=f"bulkhead pool: {weight} at once can never be granted, the limit is {bound}",
    ):
        bulkhead.acquire(weight=weight, max_wait_s=10)


@pytest.mark.parametrize(
    "wrong", [{"limit": 0}, {"limit": -1}, {"per_host": -1}, {"lease_s": 0}, {"limit": "fast"}]
)
def test_a_wrong_limit_is_refused(world: World, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=f"{next(iter(wrong))}=.*: must be "):
        Bulkhead("llm", world.store(), **wrong)


def test_a_caller_may_wait_for_a_permit(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=1, lease_s=5, sleep=world.sleep)
    began = world.now
    assert bulkhead.acquire()

    assert not bulkhead.acquire(max_wait_s=2)
    assert world.now - began == pytest.approx(2, abs=0.02)
    assert bulkhead.acquire(max_wait_s=100)
    assert world.now - began == pytest.approx(5, abs=0.02), "as soon as the lease is over"


def test_each_released_permit_wakes_the_most_urgent_and_oldest_waiter(
    world: World,
) -> None:
    woken: list[str] = []
    bulkhead = Bulkhead("llm", world.store(), limit=2, wake=woken.extend)
    held = [bulkhead.acquire(), bulkhead.acquire()]
    for waiter, urgency in [
        ("low", 3),
        ("normal", 2),
        ("normal 2", 2),
        ("critical", 0),
        ("low", 3),
    ]:
        assert not bulkhead.acquire(waiter=waiter, urgency=urgency)
        world.sleep(0.01)
    assert bulkhead.status()["waiting"] == 4

    held[0].release()
    assert woken == ["critical"]
    assert bulkhead.acquire(waiter="critical")
    held[1].release()
    assert woken == ["critical", "normal"]
    assert bulkhead.status()["waiting"] == 2


def test_a_waiter_that_has_got_a_permit_is_not_woken(world: World) -> None:
    woken: list[str] = []
    bulkhead = Bulkhead("llm", world.store(), limit=1, lease_s=1, wake=woken.extend)
    assert bulkhead.acquire()
    assert not bulkhead.acquire(waiter="mine")
    world.sleep(1)
    mine = bulkhead.acquire(waiter="mine")
    mine.release()

    assert woken == []


def test_forgetting_a_process_wakes_one_waiter_for_each_of_its_permits(world: World) -> None:
    woken: list[str] = []
    dead, alive = (
        Bulkhead("llm", world.store(), limit=2, host=host, wake=woken.extend) for host in ("a", "b")
    )
    assert all([dead.acquire(), dead.acquire()])
    for waiter in "xyz":
        alive.acquire(waiter=waiter)
        world.sleep(0.01)
    alive.forget(dead.owner)

    assert woken == ["x", "y"]


def limit_of(bulkhead: Bulkhead) -> float:
    return bulkhead.status()["limit"]


def test_a_limit_that_is_used_grows_by_one_for_each_round(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=Aimd(start=10, most=12), per_host=None)
    in_flight = [bulkhead.acquire() for _ in range(10)]
    found = []
    for _ in range(4):
        for _ in range(len(in_flight)):
            in_flight.pop(0).release()
            while permit := bulkhead.acquire():
                in_flight.append(permit)
        found.append(limit_of(bulkhead))

    assert found == [pytest.approx(11, abs=0.2), pytest.approx(12, abs=0.2), 12, 12]
    assert len(in_flight) == 12


def test_a_limit_that_is_not_used_does_not_grow(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=None, per_host=None)
    for _ in range(50):
        bulkhead.acquire().release()

    assert limit_of(bulkhead) == Aimd().start == 20


def test_a_round_with_drops_lowers_the_limit_by_a_tenth_once(world: World) -> None:
    processes = [
        Bulkhead("llm", world.store(), limit=Aimd(20), per_host=None, lease_s=60) for _ in range(2)
    ]
    in_flight = [processes[i % 2].acquire() for i in range(12)]
    world.sleep(1)
    for permit in in_flight:
        permit.release(TimeoutError())
    assert limit_of(processes[0]) == pytest.approx(18)

    next_round = [processes[0].acquire() for _ in range(3)]
    world.sleep(1)
    next_round[0].release(CallTimeout("call", 1))
    assert limit_of(processes[1]) == pytest.approx(18), (
        "it began in the millisecond of the cut, at the old limit"
    )
    later = processes[1].acquire()
    world.sleep(1)
    later.release(ConnectionError())
    assert limit_of(processes[1]) == pytest.approx(16.2)


@pytest.mark.parametrize("error", [ValueError("theirs"), KeyError(1), KeyboardInterrupt()])
def test_errors_that_do_not_mean_overload_leave_the_limit_alone(
    world: World, error: BaseException
) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=Aimd(20), per_host=None)
    permit = bulkhead.acquire()
    world.sleep(1)
    permit.release(error)

    assert limit_of(bulkhead) == 20


def test_an_adapted_limit_is_shared_and_never_below_one(world: World) -> None:
    ours, theirs = (Bulkhead("llm", world.store(), limit=Aimd(2), per_host=None) for _ in range(2))
    for _ in range(20):
        world.sleep(1)
        permit = ours.acquire()
        world.sleep(1)
        permit.release(TimeoutError())

    assert limit_of(theirs) == 1
    assert [bool(theirs.acquire()) for _ in range(2)] == [True, False]


def test_an_elastic_limit_grows_on_demand_and_shrinks_after_a_time_without_it(
    world: World,
) -> None:
    pool = Bulkhead(
        "memory", world.store(), limit=Elastic(500, 2048, 900), per_host=None, lease_s=3600
    )
    small = pool.acquire(weight=400)
    assert limit_of(pool) == 500
    large = pool.acquire(weight=1600)
    assert (used(pool), limit_of(pool)) == (2000, 2000)
    assert not pool.acquire(weight=49)
    assert pool.acquire(weight=48)
    large.release()
    world.sleep(899)
    pool.acquire(weight=1).release()
    assert limit_of(pool) == 2048, "the large use ended less than 900 s ago"

    world.sleep(2)
    small.release()
    assert pool.acquire(weight=1)
    assert limit_of(pool) == 500
    assert pool.acquire(weight=2047 - 48)
    assert limit_of(pool) == 2048, "it grows again"


def test_an_elastic_limit_never_grows_beyond_its_maximum(world: World) -> None:
    pool = Bulkhead("memory", world.store(), limit=Elastic(500, 2048, 900), per_host=None)
    assert pool.acquire(weight=400)

    assert not pool.acquire(weight=2000)


def test_an_elastic_limit_shrinks_by_the_end_of_the_last_large_use(world: World) -> None:
    pool = Bulkhead(
        "memory", world.store(), limit=Elastic(500, 2048, 900), per_host=None, lease_s=3600
    )
    large = pool.acquire(weight=1500)
    world.sleep(1000)
    large.release()
    world.sleep(1)
    pool.acquire(weight=1).release()

    assert limit_of(pool) == 1500


@pytest.mark.parametrize("host", ["my host", "a|b", "http://x/?q=1|2|3|"])
def test_any_name_may_be_a_host(world: World, host: str) -> None:
    bulkhead = Bulkhead("llm", world.store(), per_host=1, lease_s=60)
    for _ in range(2):
        permit = bulkhead.acquire(host=host)
        assert permit
        assert not bulkhead.acquire(host=host)
        permit.release()
    assert bulkhead.acquire(host=host)
    world.sleep(60)
    assert bulkhead.acquire(host=host)
    assert used(bulkhead) == 1


@pytest.mark.parametrize("weight", [0, -5, float("nan")])
def test_a_wrong_weight_is_refused(world: World, weight: float) -> None:
    with pytest.raises(InvalidValue, match=r"weight=.*: must be "):
        Bulkhead("llm", world.store()).acquire(weight=weight)


def test_a_weight_is_counted_exactly(world: World) -> None:
    bulkhead = Bulkhead("bytes", world.store(), limit=1e9, per_host=None)
    assert bulkhead.acquire(weight=123_456_789)

    assert used(bulkhead) == 123_456_789


def test_it_protects_methods(world: World) -> None:
    class Client:
        @Bulkhead("llm", world.store())
        def ask(self, what: str) -> str:
            return what

    assert Client().ask("this") == "this"


def test_the_presets() -> None:
    assert PRESETS == {"throughput": 20, "default": 10, "constrained": 5}


def test_without_redis_a_process_holds_as_many_permits_as_before(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    store = world.store()
    bulkhead, other = Bulkhead("llm", store, limit=10), Bulkhead("llm", world.store(), limit=10)
    held = [bulkhead.acquire() for _ in range(3)]
    store.lost = True
    denied = bulkhead.acquire()
    assert not denied
    assert denied.wait_s > 0
    held.pop().release()
    held.append(bulkhead.acquire())
    assert [bool(bulkhead.acquire()) for _ in range(2)] == [False, False]
    for permit in held:
        permit.release()
    again = [bulkhead.acquire() for _ in range(4)]
    assert [bool(permit) for permit in again] == [True, True, True, False]

    store.lost = False
    world.sleep(2)
    assert bulkhead.acquire(), "shared again"
    assert used(other) == 4, "permits that could not be given back are held until their lease ends"
    for permit in again:
        permit.release()
    assert used(other) == 4, "permits taken without Redis are not shared"
    assert len([record for record in caplog.records if "Redis" in record.message]) == 2


def test_without_redis_a_process_that_held_no_permit_may_hold_one(world: World) -> None:
    store = world.store()
    store.lost = True
    bulkhead = Bulkhead("llm", store)
    first = bulkhead.acquire()

    assert first
    assert not bulkhead.acquire()
    first.release()
    assert bulkhead.acquire()
    assert bulkhead.forget("host:1") == 0


def test_it_protects_functions_coroutines_and_blocks(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=1)

    @bulkhead
    def double(number: int) -> int:
        """Say how much is in flight."""
        assert used(bulkhead) == 1
        return 2 * number

    @bulkhead
    async def triple(number: int) -> int:
        assert used(bulkhead) == 1
        return 3 * number

    assert (double(2), asyncio.run(triple(2))) == (4, 6)
    assert double.__doc__ == "Say how much is in flight."
    assert bulkhead.call(lambda: 1) == 1
    with bulkhead.permit(weight=1) as permit:
        assert permit
    assert used(bulkhead) == 0


def test_a_full_bulkhead_raises_an_error_and_calls_nothing(world: World) -> None:
    ran: list[int] = []
    bulkhead = Bulkhead("llm", world.store(), limit=1, lease_s=60)

    async def run() -> None:
        ran.append(1)

    with bulkhead.permit():
        with pytest.raises(
            BulkheadFull,
            match="bulkhead llm: the limit of calls in flight is reached; come back in 60 s",
        ) as caught:
            bulkhead.call(ran.append, 1)
        with pytest.raises(BulkheadFull):
            asyncio.run(bulkhead.call_async(run))
    assert ran == []
    assert (caught.value.code, caught.value.category) == ("BULKHEAD_FULL", Category.BULKHEAD_FULL)
    assert caught.value.retry_after_s == pytest.approx(60)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
def test_any_exception_gives_the_permit_back(world: World, error: type[BaseException]) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=1)

    async def fail() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(error), bulkhead.permit():
            raise error
        with pytest.raises(error):
            asyncio.run(bulkhead.call_async(fail))


# --- against an oracle ------------------------------------------------------------------------


LIMIT, PER_HOST, LEASE_S = 8, 5, 4.0
HOSTS = ("left", "left", "right", "right")
"""Four processes on two hosts."""


@dataclass
class Held:
    """A permit as the oracle sees it."""

    permit: Permit
    name: str
    owner: int
    host: str
    weight: int
    until: float


class BulkheadMachine(RuleBasedStateMachine):
    """Bulkheads of several processes, beside a list of the permits that each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.world = pytest.MonkeyPatch(), World()
        self.world.install(self.patch)
        self.processes = [self.process(number) for number in range(len(HOSTS))]
        self.held: list[Held] = []
        self.past: list[Held] = []  # given back, forgotten or expired

    def teardown(self) -> None:
        self.patch.undo()

    def process(self, number: int) -> Process:
        made = Process(
            "llm",
            self.world.store(),
            limit=LIMIT,
            per_host=PER_HOST,
            lease_s=LEASE_S,
            host=HOSTS[number],
        )
        made.number = number
        return made

    def expire(self) -> None:
        over = [each for each in self.held if each.until <= self.world.now]
        self.past += over
        self.held = [each for each in self.held if each not in over]

    def weight(self, host: str = "") -> int:
        return sum(each.weight for each in self.held if not host or each.host == host)

    @rule(
        number=st.integers(0, 3),
        weight=st.integers(1, PER_HOST),
        endpoint=st.sampled_from(["", "", "left", "api"]),
    )
    def take(self, number: int, weight: int, endpoint: str) -> None:
        host = endpoint or HOSTS[number]
        room = self.weight() + weight <= LIMIT and self.weight(host) + weight <= PER_HOST
        permit = self.processes[number].acquire(weight=weight, host=endpoint)
        assert bool(permit) is room
        if permit:
            until = self.world.now + LEASE_S
            self.held.append(
                Held(
                    Permit(self.processes[number], permit.name),
                    permit.name,
                    number,
                    host,
                    weight,
                    until,
                )
            )
        else:
            first = min(each.until for each in self.held)
            assert permit.wait_s == pytest.approx(max(0.02, first - self.world.now), abs=0.001)

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 20))
    def release(self, at: int) -> None:
        each = self.held.pop(at % len(self.held))
        each.permit.release()
        self.past.append(each)

    @precondition(lambda self: self.past)
    @rule(at=st.integers(0, 20))
    def release_again_or_late(self, at: int) -> None:
        each = self.past[at % len(self.past)]
        Permit(self.processes[each.owner], each.name).release()

    @rule(number=st.integers(0, 3))
    def a_process_dies_and_is_forgotten(self, number: int) -> None:
        gone = [each for each in self.held if each.owner == number]
        assert self.processes[(number + 1) % 4].forget(self.processes[number].owner) == len(gone)
        self.past += gone
        self.held = [each for each in self.held if each.owner != number]
        self.processes[number] = self.process(number)

    @rule(seconds=st.sampled_from([0.125, 0.5, 1.0, LEASE_S / 2, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.world.sleep(seconds)
        self.expire()

    @invariant()
    def limits_are_never_exceeded(self) -> None:
        assert self.weight() <= LIMIT
        assert all(self.weight(host) <= PER_HOST for host in ("left", "right", "api"))

    @invariant()
    def used_equals_that_of_the_oracle(self) -> None:
        assert self.processes[0].status() == {"used": self.weight(), "limit": LIMIT, "waiting": 0}


TestBulkheadAgainstAnOracle = BulkheadMachine.TestCase
TestBulkheadAgainstAnOracle.settings = settings(max_examples=60, stateful_step_count=40)


# --- functions of every kind ------------------------------------------------------------------


def test_the_permit_of_a_generator_is_held_from_its_first_item_to_its_end(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=1)

    @bulkhead
    def stream() -> Iterator[int]:
        yield from (1, 2)

    first, second = stream(), stream()
    assert bulkhead.status()["used"] == 0
    assert next(first) == 1
    with pytest.raises(BulkheadFull):
        next(second)
    assert list(first) == [2]
    assert bulkhead.status()["used"] == 0
    third = stream()
    next(third)
    third.close()
    assert bulkhead.status()["used"] == 0


def test_the_garbage_collector_calls_no_redis(world: World) -> None:
    """It may interrupt a thread that holds a lock of the connection pool."""
    store = world.store()
    bulkhead = Bulkhead("llm", store, limit=4)

    def stream() -> Iterator[int]:
        yield from (1, 2)

    async def pause() -> None:
        await asyncio.sleep(0)

    half_read, unread = bulkhead(stream)(), bulkhead.call(stream)
    awaited = bulkhead(pause)(), bulkhead.call_async(pause)
    next(half_read)
    for each in awaited:
        each.send(None)
    cycle: list[Any] = [half_read, unread, *awaited]
    cycle.append(cycle)
    assert used(bulkhead) == 4
    del half_read, unread, awaited, each, cycle
    before = store.round_trips
    gc.collect()
    assert store.round_trips == before
    assert used(bulkhead) == 4

    assert list(bulkhead(stream)()) == [1, 2], "the next call gives all permits back first"
    assert used(bulkhead) == 0


def test_the_permit_of_an_awaitable_is_held_until_it_has_ended(world: World) -> None:
    bulkhead = Bulkhead("llm", world.store(), limit=1)

    async def work() -> float:
        return bulkhead.status()["used"]

    async def call() -> None:
        used = bulkhead.call(work)
        assert bulkhead.status()["used"] == 1
        assert await used == 1
        assert bulkhead.status()["used"] == 0

    asyncio.run(call())


# --- a limit that follows the time of calls ----------------------------------------------------

TIMEOUT_S = 40.0


@dataclass
class Load:
    """The end of a simulated load: the calls that timed out, and the most that were in flight."""

    timeouts: int
    most: int
    limit: float
    took_s: float


def load(
    world: World,
    service_s: Callable[[int], float],
    *,
    slots: int = 100_000,
    calls: int = 60,
    wanted: int = 40,
    fails: Callable[[int], bool] = lambda _: False,
) -> Load:
    """Make calls of a server that has some slots, where further calls wait, as fast as allowed."""
    bulkhead = Bulkhead(
        "server",
        world.store(),
        limit=Aimd(2, 10_000, TIMEOUT_S / 4),
        per_host=None,
        lease_s=2 * TIMEOUT_S,
    )
    began, free = world.now, [world.now] * slots
    in_flight: list[tuple[float, int, Permit, bool]] = []
    started = timeouts = most = 0
    while started < calls or in_flight:
        while started < calls and len(in_flight) < wanted and (permit := bulkhead.acquire()):
            end = max(heapq.heappop(free), world.now) + service_s(started)
            heapq.heappush(free, end)
            late = end > world.now + TIMEOUT_S
            ends = min(end, world.now + TIMEOUT_S), started, permit, late or fails(started)
            heapq.heappush(in_flight, ends)
            started, timeouts, most = started + 1, timeouts + late, max(most, len(in_flight))
        ended, _, permit, failed = heapq.heappop(in_flight)
        world.now = max(world.now, ended)
        permit.release(ConnectionError() if failed else None)
    return Load(timeouts, most, limit_of(bulkhead), world.now - began)


@pytest.mark.parametrize("service_s", [0.2, 4.0])
def test_a_server_with_two_slots_gets_no_long_queue_and_is_never_idle(
    world: World, service_s: float
) -> None:
    """With 40 calls in flight, a call of 4 s would take 80 s."""
    found = load(world, lambda _: service_s, slots=2)

    assert found.timeouts == 0
    assert found.took_s == pytest.approx(60 * service_s / 2)
    assert service_s < 1 or found.most <= 12


@pytest.mark.parametrize("seed", range(4))
def test_calls_of_any_length_do_not_time_out_in_a_queue(world: World, seed: int) -> None:
    random = Random(seed)

    found = load(world, lambda _: random.choice((2.0, 4.0, 6.0)), slots=2)

    assert found.timeouts == 0
    assert found.most <= 12


def test_a_server_without_a_queue_is_used_in_full_after_three_rounds(world: World) -> None:
    found = load(world, lambda _: 1.0, calls=400, wanted=200)

    assert found.most == 200
    assert found.took_s <= 400 / 200 + 3


def test_long_calls_that_wait_in_no_queue_do_not_lower_the_limit_for_long(world: World) -> None:
    """The calls become twenty times as long, and take half of their time limit."""
    found = load(world, lambda call: 1.0 if call < 400 else 20.0, calls=1600, wanted=100)

    assert found.limit >= 100
    assert found.took_s <= 5 + 300 + 3 * 20


@pytest.mark.parametrize(("every", "least"), [(20, 100), (7, 100), (2, 0)])
def test_some_errors_do_not_lower_the_limit_and_many_do(
    world: World, every: int, least: int
) -> None:
    found = load(
        world, lambda _: 1.0, calls=800, wanted=100, fails=lambda call: call % every == every - 1
    )

    assert found.most >= least
    assert (found.limit > 50) == bool(least)


def test_calls_that_were_refused_say_nothing_about_the_capacity(world: World) -> None:
    bulkhead = Bulkhead("server", world.store(), limit=Aimd(2, 100, 10), per_host=None)
    for _ in range(20):
        permits = [bulkhead.acquire() for _ in range(2)]
        permits[0].release(ValueError("the question is too long"))
        permits[1].withdraw()

    assert limit_of(bulkhead) == 2
    assert used(bulkhead) == 0


def test_little_load_does_not_raise_the_limit_without_end(world: World) -> None:
    assert load(world, lambda _: 1.0, calls=200, wanted=1).limit <= 16


def test_room_that_a_grown_limit_has_wakes_as_many_waiters(world: World) -> None:
    woken: list[str] = []
    bulkhead = Bulkhead(
        "server", world.store(), limit=Aimd(2, 100, 10), per_host=None, wake=woken.extend
    )
    first = [bulkhead.acquire() for _ in range(2)]
    for number in range(9):
        bulkhead.acquire(waiter=f"job {number}")
    world.sleep(0.1)
    for permit in first:
        permit.release()

    assert limit_of(bulkhead) == 16
    assert woken == [f"job {number}" for number in range(9)]


def test_a_limit_that_was_halved_wakes_nobody_before_there_is_room(world: World) -> None:
    woken: list[str] = []
    bulkhead = Bulkhead(
        "server", world.store(), limit=Aimd(4, 100, 10), per_host=None, wake=woken.extend
    )
    permits = [bulkhead.acquire() for _ in range(4)]
    world.sleep(1)
    for permit in permits[:3]:
        permit.release(TimeoutError())
    others = [bulkhead.acquire() for _ in range(3)]
    bulkhead.acquire(waiter="job 1")

    permits[3].release(TimeoutError())
    others[0].release()
    assert limit_of(bulkhead) == 2
    assert woken == [], "two calls are in flight, as many as the limit"
    others[1].release()
    assert woken == ["job 1"]


def test_a_limit_of_an_older_release_is_read(world: World) -> None:
    """Its record has a limit and the time of the last decrease, and nothing about rounds."""
    old = Bulkhead("server", world.store(), limit=Aimd(20), per_host=None, lease_s=60)
    permit = old.acquire()
    world.sleep(1)
    permit.release(TimeoutError())
    new = Bulkhead("server", world.store(), limit=Aimd(2, 1000, 10), per_host=None, lease_s=60)
    assert limit_of(new) == 18

    world.sleep(1)
    permits = [new.acquire() for _ in range(18)]
    world.sleep(1)
    for permit in permits:
        permit.release()
        new.acquire()
    assert limit_of(new) == 18 * 8


def test_a_fixed_limit_is_shown_after_an_adapted_one(world: World) -> None:
    adapted = Bulkhead("server", world.store(), limit=Aimd(2, 100, 10), per_host=None)
    adapted.acquire().release()
    adapted.acquire().release()
    assert limit_of(adapted) == 16

    assert limit_of(Bulkhead("server", world.store(), limit=4)) == 4


@pytest.mark.parametrize("slow_s", [0, -1.0])
def test_the_time_from_which_a_call_is_slow_must_be_positive(slow_s: float) -> None:
    with pytest.raises(InvalidValue, match="slow_s"):
        Aimd(2, 100, slow_s)


# --- round trips --------------------------------------------------------------------------------


def test_guards_share_a_round_trip_and_decide_alone_without_redis(world: World) -> None:
    store = world.store()
    bulkhead = Bulkhead("server", store, limit=2)
    bucket = TokenBucket("server", store, requests=Rate(10))

    grant, permit = together(store, bucket.reserving(), bulkhead.taking())
    assert grant
    assert permit
    assert store.round_trips == 1
    assert together(store, *permit.releasing()) == [1]
    assert store.round_trips == 2
    assert permit.releasing() == []
    assert together(store) == []
    assert store.round_trips == 2

    store.lost = True
    grant, permit = together(store, bucket.reserving(), bulkhead.taking())
    assert (grant.granted, bool(permit), permit.local) == (False, True, True)


def test_a_damaged_record_of_one_guard_does_not_stop_another(world: World) -> None:
    store = world.store()
    bulkhead = Bulkhead("server", store, limit=2)
    world.client().set(store_keys(store, "server")[0], "damaged")

    grant, permit = together(
        store, TokenBucket("server", store, requests=Rate(10)).reserving(), bulkhead.taking()
    )

    assert grant.id
    assert permit.local


def store_keys(store: Store, name: str) -> tuple[str, str, str, str]:
    return Keys(store.namespace).bulkhead(name)


def test_a_full_bulkhead_is_not_asked_in_vain(world: World) -> None:
    ours, theirs = (Bulkhead("server", world.store(), limit=2) for _ in range(2))
    mine, others = ours.acquire(), theirs.acquire()
    assert not ours.is_known_full
    assert not ours.acquire()
    assert ours.is_known_full

    mine.release()
    assert not ours.is_known_full
    mine = ours.acquire()
    assert ours.is_known_full, "the permit that was free is taken again"
    others.release()
    world.sleep(0.11)
    assert not ours.is_known_full
