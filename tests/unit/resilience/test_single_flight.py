"""Calls that are made once while they are in flight: the caller that makes one, the others, and
kept values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilience.errors import InvalidValue
from resilience.keys import Keys
from resilience.single_flight import Flight, SingleFlight
from tests.unit.world import World, world

__all__ = ["world"]

LEASE_S = 8.0


def process(world: World) -> SingleFlight:
    return SingleFlight("llm", world.store(), lease_s=LEASE_S)


def landed(flight: Flight) -> tuple[bytes, str]:
    assert flight.state == "landed"
    return flight.value, flight.source


# --- one call for all -------------------------------------------------------------------------


def test_one_caller_makes_the_call_and_the_others_get_its_value(world: World) -> None:
    ours, theirs = process(world), process(world)
    mine, other, third = ours.begin("key"), theirs.begin("key"), theirs.begin("key")

    assert (mine.state, other.state, third.state) == ("mine", "others", "others")
    assert 0.04 <= other.wait_s <= 0.06
    assert theirs.look(other).state == "others"
    ours.land(mine, b"\x00value\xff")
    assert [landed(theirs.look(each)) for each in (other, third, other)] == [
        (b"\x00value\xff", "flight")
    ] * 3


def test_calls_of_other_keys_and_names_are_separate(world: World) -> None:
    ours, other = process(world), SingleFlight("embeddings", world.store())
    mine = ours.begin("key")

    assert [ours.begin("key 2").state, other.begin("key").state] == ["mine", "mine"]
    waits = other.begin("key")
    ours.land(mine, b"1")
    assert other.look(waits).state == "others"


def test_a_caller_that_begins_after_the_call_has_ended_makes_it_again(world: World) -> None:
    ours = process(world)
    first, waits = ours.begin("key"), ours.begin("key")
    ours.land(first, b"1")
    second, later = ours.begin("key"), ours.begin("key")

    assert (second.state, later.state) == ("mine", "others")
    assert landed(ours.look(waits)) == (b"1", "flight"), (
        "the waiting caller gets it, although the next call is in flight"
    )
    assert ours.look(later).state == "others", "a caller that began later does not get it"
    ours.land(second, b"2")
    assert landed(ours.look(later)) == (b"2", "flight")


def test_a_value_is_not_stored_when_no_caller_waits(world: World) -> None:
    ours = process(world)
    ours.land(ours.begin("key"), b"1")
    assert world.dump() == {}

    dead, alone = ours.begin("key"), ours.begin("key")
    assert dead.state == "mine"
    world.sleep(LEASE_S)
    ours.land(ours.look(alone), b"2")
    assert world.dump() == {}, "the only waiting caller has made the call itself"


def test_an_empty_value_is_returned_as_any_other(world: World) -> None:
    ours = process(world)
    mine, waits = ours.begin("key"), ours.begin("key")
    ours.land(mine, b"", cache_ttl_s=1)

    assert landed(ours.look(waits)) == (b"", "flight")
    assert landed(ours.begin("key", cached=True)) == (b"", "cache")


# --- holders that give up, die or end late ----------------------------------------------------


def test_an_abandoned_call_is_made_by_exactly_one_waiting_caller(world: World) -> None:
    ours = process(world)
    mine, *waiting = (ours.begin("key") for _ in range(4))
    ours.abandon(mine)
    looked = [ours.look(each) for each in waiting]

    assert [each.state for each in looked] == ["mine", "others", "others"]
    ours.abandon(mine)
    assert ours.look(looked[1]).state == "others", "the first caller no longer holds it"
    ours.land(looked[0], b"1")
    assert [landed(ours.look(each)) for each in looked[1:]] == [(b"1", "flight")] * 2


def test_an_abandoned_call_is_made_by_the_next_caller_also_for_those_waiting(
    world: World,
) -> None:
    ours = process(world)
    mine, waits = ours.begin("key"), ours.begin("key")
    ours.abandon(mine)
    again = ours.begin("key")

    assert again.state == "mine"
    ours.land(again, b"1")
    assert landed(ours.look(waits)) == (b"1", "flight")


def test_when_the_lease_of_a_dead_holder_ends_one_waiting_caller_makes_the_call(
    world: World,
) -> None:
    ours = process(world)
    dead, *waiting = (ours.begin("key") for _ in range(3))
    assert dead.state == "mine"
    world.sleep(LEASE_S - 0.001)
    assert [ours.look(each).state for each in waiting] == ["others", "others"]
    world.sleep(0.001)

    assert [ours.look(each).state for each in waiting] == ["mine", "others"]


def test_a_late_value_serves_waiting_callers_and_ends_no_other_flight(world: World) -> None:
    ours = process(world)
    late, waits, takes_over = (ours.begin("key") for _ in range(3))
    world.sleep(LEASE_S)
    holder = ours.look(takes_over)
    assert holder.state == "mine"
    ours.land(late, b"late")
    after = ours.begin("key")

    assert after.state == "others", "the new holder still makes the call"
    assert landed(ours.look(waits)) == (b"late", "flight")
    assert ours.look(after).state == "others", "it began after that value arrived"
    ours.land(holder, b"in time")
    assert landed(ours.look(after)) == (b"in time", "flight")
    assert ours.begin("key").state == "mine"


def test_a_value_after_the_lease_serves_waiting_callers_if_none_took_over(
    world: World,
) -> None:
    ours = process(world)
    late, waits = ours.begin("key"), ours.begin("key")
    world.sleep(LEASE_S + 1)
    ours.land(late, b"late")

    assert landed(ours.look(waits)) == (b"late", "flight")


def test_a_caller_served_by_a_late_value_does_not_wait_for_the_next(world: World) -> None:
    ours = process(world)
    late, takes_over, waits = (ours.begin("key") for _ in range(3))
    world.sleep(LEASE_S)
    holder = ours.look(takes_over)
    ours.land(late, b"1")
    ours.land(holder, b"2")

    assert landed(ours.look(waits)) == (b"1", "flight"), (
        "no caller waited for the other value, so it is not stored"
    )


def test_a_caller_that_missed_a_value_waits_for_the_next(world: World) -> None:
    ours = process(world)
    first, sleeper = ours.begin("key"), ours.begin("key")
    ours.land(first, b"1")
    world.client().delete(Keys("unit").flight("llm", "key")[1])  # 60 s have passed
    second = ours.begin("key")

    assert ours.look(sleeper).state == "others"
    ours.land(second, b"2")
    assert landed(ours.look(sleeper)) == (b"2", "flight")


# --- cached values and memos ------------------------------------------------------------------


def test_a_cached_value_is_returned_only_to_callers_that_accept_one(world: World) -> None:
    ours = process(world)
    ours.land(ours.begin("key", cached=True), b"1", cache_ttl_s=60)

    assert landed(ours.begin("key", cached=True)) == (b"1", "cache")
    assert ours.begin("key").state == "mine"
    assert ours.begin("key 2", cached=True).state == "mine"


def test_a_memo_is_returned_for_the_same_name_and_key_only(world: World) -> None:
    ours = process(world)
    ours.land(ours.begin("key", memo="job 1"), b"1", memo="job 1", memo_ttl_s=60)
    ours.land(ours.begin("key"), b"2", cache_ttl_s=60)

    assert landed(ours.begin("key", memo="job 1")) == (b"1", "memo")
    assert landed(ours.begin("key", memo="job 1", cached=True)) == (b"1", "memo"), (
        "the memo comes first"
    )
    assert landed(ours.begin("key", memo="job 2", cached=True)) == (b"2", "cache")
    assert ours.begin("key 2", memo="job 1").state == "mine"
    assert ours.begin("key", memo="job 2").state == "mine"


def test_memos_are_forgotten_in_one_round_trip(world: World) -> None:
    store = world.store()
    ours = SingleFlight("llm", store)
    memos = [("a", "job"), ("b", "job"), ("b", "other")]
    for key, memo in memos:
        ours.land(ours.begin(key, memo=memo), b"1", memo=memo, memo_ttl_s=60)
    store.round_trips = 0
    store.call(*ours.forgetting(memos[:2]), on_outage="answer")

    assert store.round_trips == 1
    assert [ours.begin(key, memo=memo).state for key, memo in memos] == ["mine", "mine", "landed"]


def test_a_found_value_can_be_kept_and_does_not_end_a_later_flight(world: World) -> None:
    ours = process(world)
    first, waits = ours.begin("key"), ours.begin("key")
    ours.land(first, b"1")
    found, _, later = ours.look(waits), ours.begin("key"), ours.begin("key")
    ours.land(found, found.value, memo="job", memo_ttl_s=60)

    assert landed(ours.begin("key", memo="job")) == (b"1", "memo")
    assert ours.look(later).state == "others"


def test_all_keys_expire(world: World) -> None:
    ours, client = process(world), world.client()
    mine, waits = ours.begin("key"), ours.begin("key")
    made, came, cache, memos = Keys("unit").flight("llm", "key")
    assert ours.look(waits).state == "others"
    assert 0 < client.pttl(made) <= (LEASE_S + 60) * 1000
    ours.abandon(mine)
    assert client.pttl(made) > 0
    ours.land(ours.begin("key"), b"1", cache_ttl_s=5, memo="job", memo_ttl_s=0.5)

    left = {key.decode(): client.pttl(key) for key in client.scan_iter()}
    assert set(left) == {came, cache, memos + "job"}
    assert 59_000 < left[came] <= 60_000
    assert 4_000 < left[cache] <= 5_000
    assert 0 < left[memos + "job"] <= 500


def test_all_keys_of_a_call_are_in_one_cluster_slot() -> None:
    assert {each.partition("}")[0] for each in Keys("unit").flight("llm", "key")} == {
        "unit:{flight:llm:key"
    }


# --- round trips, Redis away, wrong values ----------------------------------------------------


def test_each_step_is_one_round_trip_and_landings_may_share_one(world: World) -> None:
    store = world.store()
    ours = SingleFlight("llm", store)
    mine, waits = ours.begin("key", cached=True, memo="job"), ours.begin("key")
    ours.look(waits)
    store.call(
        ours.landing(mine, b"1", cache_ttl_s=1, memo="job", memo_ttl_s=1),
        ours.landing(ours.begin("other"), b"2"),
        on_outage="answer",
    )

    assert store.round_trips == 5
    assert landed(ours.look(waits)) == (b"1", "flight")


def test_without_redis_every_caller_makes_the_call(world: World) -> None:
    store = world.store()
    ours, others = SingleFlight("llm", store), process(world)
    others.begin("key")
    waits = ours.begin("key")
    assert waits.state == "others"
    store.lost = True
    flights = [ours.look(waits), ours.begin("key", cached=True, memo="job")]

    assert [each.state for each in flights] == ["mine", "mine"]
    ours.land(flights[0], b"1", cache_ttl_s=1)
    ours.abandon(flights[1])


def test_a_call_that_began_without_redis_ends_no_other_flight(world: World) -> None:
    store = world.store()
    ours, others = SingleFlight("llm", store), process(world)
    store.lost = True
    alone = ours.begin("key")
    store.lost = False
    world.sleep(2)
    mine, waits = others.begin("key"), others.begin("key")
    ours.abandon(alone)
    assert others.look(waits).state == "others"
    ours.land(alone, b"1", memo="job", memo_ttl_s=60)

    assert others.begin("key").state == "others"
    assert landed(others.look(waits)) == (b"1", "flight"), "its value serves them, too"
    assert landed(ours.begin("key", memo="job")) == (b"1", "memo"), (
        "the value is kept, as it was paid for"
    )
    others.land(mine, b"2")
    assert others.begin("key").state == "mine"


def test_the_repr_of_a_flight_does_not_show_its_value(world: World) -> None:
    ours = process(world)
    ours.land(ours.begin("key"), b"private", cache_ttl_s=1)

    assert "private" not in repr(ours.begin("key", cached=True))


@pytest.mark.parametrize("lease_s", [0, -1, float("nan")])
def test_a_wrong_lease_is_refused(world: World, lease_s: float) -> None:
    with pytest.raises(InvalidValue, match=r"lease_s=.*: must be above 0"):
        SingleFlight("llm", world.store(), lease_s=lease_s)


def test_a_wrong_expiry_is_refused(world: World) -> None:
    ours = process(world)
    mine = ours.begin("key")
    with pytest.raises(InvalidValue, match="memo_ttl_s=0: must be above 0"):
        ours.land(mine, b"1", memo="job")
    with pytest.raises(InvalidValue, match="cache_ttl_s=-1: must be above 0"):
        ours.land(mine, b"1", cache_ttl_s=-1)


# --- against an oracle ------------------------------------------------------------------------


@dataclass
class Waits:
    """A waiting caller, as the oracle sees it."""

    flight: Flight
    values: list[bytes] = field(default_factory=list)  # the values that arrived since it began


class SingleFlightMachine(RuleBasedStateMachine):
    """Callers of one key, beside a list of the holder and of the waiting callers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.world = pytest.MonkeyPatch(), World()
        self.world.install(self.patch)
        self.stores = [self.world.store() for _ in range(2)]
        self.processes = [SingleFlight("llm", store, lease_s=LEASE_S) for store in self.stores]
        self.holder, self.till = "", 0.0
        self.mine: list[Flight] = []  # not landed: in flight, abandoned, or taken over by others
        self.waiting: list[Waits] = []
        self.cached, self.memos, self.count = b"", dict[str, bytes](), 0

    def teardown(self) -> None:
        self.patch.undo()

    def takes_off(self, flight: Flight) -> bool:
        """Whether the caller makes the call; the oracle must agree."""
        free = not self.holder or self.till <= self.world.now
        assert flight.state == ("mine" if free else "others")
        if free:
            self.holder, self.till = flight.id, self.world.now + LEASE_S
            self.mine.append(flight)
        return free

    @rule(number=st.integers(0, 1), cached=st.booleans(), memo=st.sampled_from(["", "a", "b"]))
    def begin(self, number: int, cached: bool, memo: str) -> None:
        flight = self.processes[number].begin("key", cached=cached, memo=memo)
        if kept := self.memos.get(memo) or (cached and self.cached):
            assert landed(flight) == (kept, "memo" if memo in self.memos else "cache")
        elif not self.takes_off(flight):
            self.waiting.append(Waits(flight))

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 1), at=st.integers(0, 9))
    def look(self, number: int, at: int) -> None:
        waits = self.waiting.pop(at % len(self.waiting))
        found = self.processes[number].look(waits.flight)
        if waits.values:
            assert found.state == "landed"
            assert found.value in waits.values
        elif not self.takes_off(found):
            self.waiting.append(Waits(found))

    @precondition(lambda self: self.mine)
    @rule(
        at=st.integers(0, 9),
        cache=st.sampled_from([False, False, True]),
        memo=st.sampled_from(["", "", "a", "b"]),
    )
    def land(self, at: int, cache: bool, memo: str) -> None:
        """End a call in time or late, even one that was abandoned."""
        flight = self.mine.pop(-1 - at % len(self.mine))
        self.count += 1
        value = b"%d" % self.count
        self.processes[0].land(flight, value, cache_ttl_s=3600 * cache, memo=memo, memo_ttl_s=3600)
        for waits in self.waiting:
            waits.values.append(value)
        self.cached = value if cache else self.cached
        self.memos |= {memo: value} if memo else {}
        self.over(flight)

    @precondition(lambda self: self.mine)
    @rule(at=st.integers(0, 9))
    def abandon(self, at: int) -> None:
        flight = self.mine[-1 - at % len(self.mine)]
        self.processes[1].abandon(flight)
        self.over(flight)

    def over(self, flight: Flight) -> None:
        if flight.id == self.holder:
            self.holder = ""

    @precondition(lambda self: self.waiting)
    @rule(at=st.integers(0, 9))
    def a_waiting_caller_dies(self, at: int) -> None:
        self.waiting.pop(at % len(self.waiting))

    @rule(seconds=st.sampled_from([LEASE_S / 4, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.world.sleep(seconds)

    @rule(memo=st.sampled_from(["a", "b"]))
    def forget(self, memo: str) -> None:
        self.stores[0].call(*self.processes[0].forgetting([("key", memo)]))
        self.memos.pop(memo, None)

    @invariant()
    def all_keys_expire(self) -> None:
        client = self.stores[0].client
        assert all(client.pttl(key) > 0 for key in client.scan_iter())


TestSingleFlightAgainstAnOracle = SingleFlightMachine.TestCase
TestSingleFlightAgainstAnOracle.settings = settings(max_examples=60, stateful_step_count=40)


# --- repeated callers -------------------------------------------------------------------------


def test_a_repeated_caller_takes_over_its_own_earlier_call(
    world: World,
) -> None:
    """An item that is retried begins under the same name; its value serves the waiting callers,
    too.
    """
    first, second, others = process(world), process(world), process(world)
    dead, waits = first.begin("key", by="item 7"), others.begin("key", by="item 8")

    again = second.begin("key", by="item 7")
    assert (dead.again, again.state, again.again) == (False, "mine", True)
    assert (others.look(waits).state, second.begin("key", by="item 9").state) == (
        "others",
        "others",
    )

    second.land(again, b"1")
    assert landed(others.look(waits)) == (b"1", "flight")


def test_a_waiting_caller_that_takes_over_is_the_new_holder(world: World) -> None:
    ours, theirs = process(world), process(world)
    mine, waits = ours.begin("key", by="item 7"), theirs.begin("key", by="item 8")
    ours.abandon(mine)

    taken = theirs.look(waits)
    assert (taken.state, taken.again) == ("mine", False)
    assert ours.begin("key", by="item 7").state == "others"
    assert theirs.begin("key", by="item 8").again is True
