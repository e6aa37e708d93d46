"""Preemption: nodes yield for urgent work, never more than wait for a slot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilience.keys import Keys
from resilience.store import Call
from scheduler.preemption import GRACE_MS, PATIENCE_MS, TTL_MS, Preemption, more_urgent, rank_of
from scheduler.slots import TTL_MS as SLOTS_TTL_MS
from scheduler.slots import SlotBoard
from tests.unit.harness import Platform
from tests.unit.world import CountingStore, World, world

__all__ = ["world"]

QUEUE = "rlm.critical"
ENOUGH = 15
"""Attempts to win, more than any test has tokens."""


class Process:
    """One process of a platform: its connection, the shared slots, and its preemption."""

    def __init__(self, world: World) -> None:
        self.store: CountingStore = world.store()
        self.slots = SlotBoard(self.store, Keys("unit"))
        self.preemption = Preemption(self.store, Keys("unit"), self.slots)

    def do(self, call: Call) -> Any:
        [answer] = self.store.call(call)
        return answer

    def has_slots(self, total: int, *, free: int = 0, queue: str = QUEUE) -> None:
        self.do(self.slots.publish("worker", total, free, [queue]))

    def wins(self, queue: str = QUEUE) -> int:
        """Let every node try to yield; return the number that may."""
        return sum(self.do(self.preemption.win(queue)) for _ in range(ENOUGH))

    def open(self, queue: str = QUEUE) -> int:
        return int(self.do(self.preemption.open(queue)))


@pytest.fixture
def process(world: World) -> Process:
    """A process of a platform with eight slots, all of them taken."""
    made = Process(world)
    made.has_slots(8)
    return made


def after_the_grace(world: World) -> None:
    world.sleep((GRACE_MS + 1) / 1000)


# --- urgency ----------------------------------------------------------------------------------


def test_each_priority_has_a_bit_and_other_queues_have_none() -> None:
    ranks = {name: rank_of(name) for name in ("critical", "high", "normal", "low", "control", "")}

    assert ranks == {"critical": 1, "high": 2, "normal": 4, "low": 8, "control": 0, "": 0}


@pytest.mark.parametrize(
    ("waiting", "critical", "high", "normal", "low"),
    [
        ((), "", "", "", ""),
        (("critical",), "", "critical", "critical", "critical"),
        (("high",), "", "", "high", "high"),
        (("normal",), "", "", "", "normal"),
        (("low",), "", "", "", ""),
        (("high", "low"), "", "", "high", "high"),
        (("normal", "high"), "", "", "high", "high"),
        (("critical", "high", "normal", "low"), "", "critical", "critical", "critical"),
    ],
)
def test_a_node_yields_for_the_most_urgent_of_the_more_urgent_priorities(
    waiting: tuple[str, ...], critical: str, high: str, normal: str, low: str
) -> None:
    ranks = sum(rank_of(name) for name in waiting)

    assert [more_urgent(ranks, name) for name in ("critical", "high", "normal", "low")] == [
        critical,
        high,
        normal,
        low,
    ]


# --- announcing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "free", "freed", "counted", "without"),
    [
        (8, 0, 0, 5, "abcde"),
        (8, 2, 0, 5, "cde"),
        (8, 2, 1, 5, "de"),
        (8, 0, 1, 5, "bcde"),
        (8, 8, 0, 5, ""),
        (8, 0, 9, 5, ""),
        (3, 0, 0, 3, "abc"),  # more nodes than slots would wait for each other
        (3, 1, 1, 3, "c"),
        (0, 0, 0, 0, ""),  # no worker serves the queue: no node could run, so none yields
    ],
)
def test_the_first_nodes_get_the_free_slots_and_the_rest_get_none(
    world: World, total: int, free: int, freed: int, counted: int, without: str
) -> None:
    process = Process(world)
    process.has_slots(total, free=free)

    assert "".join(process.preemption.announce(QUEUE, list("abcde"), freed=freed)) == without
    assert process.open() == counted


def test_a_free_slot_is_promised_once(process: Process) -> None:
    process.has_slots(8, free=3)

    assert process.preemption.announce(QUEUE, ["a", "b"]) == []
    assert process.preemption.announce(QUEUE, ["c", "d"]) == ["d"]


def test_slots_of_another_queue_are_of_no_use(process: Process) -> None:
    process.has_slots(8, free=8, queue="rlm.low")

    assert process.preemption.announce(QUEUE, ["a"]) == []
    assert process.open() == 0


def test_announcing_no_node_changes_nothing(world: World, process: Process) -> None:
    before = world.dump()

    assert process.preemption.announce(QUEUE, []) == []
    assert world.dump() == before


# --- yielding ---------------------------------------------------------------------------------


def test_no_node_yields_within_the_grace_period_unless_insisted_on(
    world: World, process: Process
) -> None:
    process.preemption.announce(QUEUE, ["a", "b"])
    world.sleep(GRACE_MS / 2000)

    assert (process.wins(), process.open()) == (0, 2), "it is known that two nodes wait"
    process.preemption.insist(QUEUE, ["b", "a stranger"])
    assert (process.wins(), process.open()) == (1, 1)
    after_the_grace(world)
    assert (process.wins(), process.open()) == (1, 0)


@given(
    n=st.integers(0, 12),
    total=st.integers(0, 10),
    free=st.integers(0, 10),
    freed=st.integers(0, 3),
    claim_first=st.booleans(),
)
@settings(max_examples=60)
def test_k_nodes_without_a_slot_cause_at_most_k_yields(
    n: int, total: int, free: int, freed: int, claim_first: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        (world := World()).install(patch)
        process = Process(world)
        process.has_slots(total, free=min(free, total))
        nodes = [f"job {i}" for i in range(n)]

        without = process.preemption.announce(QUEUE, nodes, freed=freed)
        with_slot = [node for node in nodes[:total] if node not in without]
        if claim_first:
            for node in with_slot:
                process.preemption.settle(QUEUE, node)
        process.preemption.insist(QUEUE, without)

        assert process.wins() == len(without)
        after_the_grace(world)
        assert process.wins() == (0 if claim_first else len(with_slot)), (
            "their slots did not come, so other nodes must yield"
        )


def test_a_claim_uses_up_one_yield_whichever_node_it_was_for(
    world: World, process: Process
) -> None:
    process.preemption.announce(QUEUE, ["a", "b", "c"])
    after_the_grace(world)
    assert process.do(process.preemption.win(QUEUE)) == 1

    process.preemption.settle(QUEUE, "c")

    assert process.open() == 2
    assert process.wins() == 2, "the yielded slot is taken, and two nodes still wait"


def test_a_claim_by_a_free_slot_leaves_the_yield_of_another_node(
    world: World, process: Process
) -> None:
    process.has_slots(8, free=1)
    process.preemption.insist(QUEUE, process.preemption.announce(QUEUE, ["a", "b"]))
    assert process.wins() == 1

    process.preemption.settle(QUEUE, "a")
    after_the_grace(world)

    assert (process.wins(), process.open()) == (0, 0), "b gets the slot that is about to be yielded"


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_yielded_slot_and_a_free_one_may_be_used_in_any_order(
    world: World, process: Process, first: str
) -> None:
    process.has_slots(8, free=1)
    process.preemption.insist(QUEUE, process.preemption.announce(QUEUE, ["a", "b"]))
    assert process.wins() == 1
    process.do(process.preemption.yielded(QUEUE, "low"))

    process.preemption.settle(QUEUE, first)

    assert process.wins() == 0
    after_the_grace(world)
    assert process.wins() == 1, "the other slot has not come"


def test_a_claim_without_a_yield_removes_a_token(world: World, process: Process) -> None:
    process.preemption.announce(QUEUE, ["a", "b"])
    after_the_grace(world)

    process.preemption.settle(QUEUE, "a")

    assert process.wins() == 1


@pytest.mark.parametrize(
    "stranger", ["z", "", "a"], ids=["never counted", "without a name", "claimed before"]
)
def test_a_claim_of_a_node_that_is_not_counted_changes_nothing(
    world: World, process: Process, stranger: str
) -> None:
    process.preemption.announce(QUEUE, ["a", "b", "c"])
    after_the_grace(world)
    process.do(process.preemption.win(QUEUE))
    process.preemption.settle(QUEUE, "a")
    process.do(process.preemption.win(QUEUE))
    before = world.dump()

    assert process.do(process.preemption.claimed(QUEUE, stranger)) == 1
    assert world.dump() == before


def test_a_node_that_is_announced_twice_counts_once(world: World, process: Process) -> None:
    for _ in range(2):
        process.preemption.announce(QUEUE, ["a", "b"])
    after_the_grace(world)

    assert process.wins() == 2


def test_each_queue_has_its_own_tokens(world: World, process: Process) -> None:
    process.do(process.slots.publish("another", 8, 0, ["rlm.high"]))
    process.preemption.announce(QUEUE, ["a"])
    process.preemption.announce("rlm.high", ["a", "b"])
    after_the_grace(world)

    process.preemption.settle("rlm.high", "a")

    assert (process.wins(QUEUE), process.wins("rlm.high")) == (1, 1)


def test_no_key_is_left_when_every_node_has_a_slot(world: World, process: Process) -> None:
    before = set(world.dump())
    process.preemption.announce(QUEUE, ["a", "b"])
    after_the_grace(world)
    process.do(process.preemption.win(QUEUE))

    for node in "ab":
        process.preemption.settle(QUEUE, node)

    assert (process.wins(), process.open(), set(world.dump())) == (0, 0, before)


def test_an_unclaimed_token_is_void_after_a_minute_and_leaves_no_key(
    world: World, process: Process
) -> None:
    process.preemption.announce(QUEUE, ["a"])
    world.sleep(TTL_MS / 1000 - 0.01)
    assert process.open() == 1
    world.sleep(0.01 + GRACE_MS / 1000)

    assert (process.wins(), process.open()) == (0, 0)
    assert not [key for key in world.dump() if b"preemption" in key]


def test_a_void_token_takes_its_yield_with_it(world: World, process: Process) -> None:
    """The next node that waits gets a yield of its own."""
    process.preemption.announce(QUEUE, ["cancelled"])
    after_the_grace(world)
    assert process.wins() == 1
    world.sleep(TTL_MS / 1000 - 1)
    process.has_slots(8)
    process.preemption.announce(QUEUE, ["next"])
    world.sleep(1)

    assert process.open() == 1
    assert process.wins() == 1


def test_of_two_yields_one_is_left_when_one_token_is_void(world: World, process: Process) -> None:
    process.preemption.announce(QUEUE, ["a", "b"])
    after_the_grace(world)
    assert process.wins() == 2
    world.sleep(TTL_MS / 1000 - 1)
    process.preemption.insist(QUEUE, ["b"])
    world.sleep(1)

    assert (process.open(), process.wins()) == (0, 0)


# --- brokers that do not order queues ---------------------------------------------------------


def given_up(process: Process, *slots: str) -> None:
    """Announce as many nodes as slots, and let these slots be yielded."""
    process.preemption.insist(
        QUEUE, process.preemption.announce(QUEUE, [f"urgent {slot}" for slot in slots])
    )
    assert process.wins() == len(slots)
    for slot in slots:
        process.do(process.preemption.yielded(QUEUE, slot))


def test_a_yielded_slot_is_reserved_for_a_moment(world: World, process: Process) -> None:
    assert process.do(process.preemption.awaited(QUEUE)) == 0, "no node waits"
    given_up(process, "a")

    for _ in range(2):
        assert process.do(process.preemption.awaited(QUEUE)) == 1
    process.preemption.settle(QUEUE, "urgent a")
    assert process.do(process.preemption.awaited(QUEUE)) == 0


def test_a_reserved_slot_taken_by_another_node_leads_to_one_more_yield(
    world: World, process: Process
) -> None:
    given_up(process, "a", "b")
    world.sleep(PATIENCE_MS / 1000)
    assert process.wins() == 0, "both urgent nodes are still expected"

    assert process.do(process.preemption.awaited(QUEUE)) == 0
    assert process.wins() == 1, "the other node has taken one of the slots"


def test_a_promised_slot_is_reserved_for_a_moment(world: World, process: Process) -> None:
    process.has_slots(8, free=1)
    process.preemption.announce(QUEUE, ["a"])

    assert process.do(process.preemption.awaited(QUEUE)) == 1
    after_the_grace(world)
    assert process.do(process.preemption.awaited(QUEUE)) == 0


@pytest.mark.parametrize(("mine", "waiting"), [("critical", 0), ("high", 1), ("low", 2)])
def test_a_message_goes_back_only_for_more_urgent_work_that_waits(mine: str, waiting: int) -> None:
    platform = Platform()
    runtime, store = platform.runtime, platform.store
    runtime.page.urgent = rank_of("critical") | rank_of("high")
    platform.store.call(platform.slots.publish("unit", 8, 0, ["unit.critical", "unit.high"]))
    for queue in ("unit.critical", "unit.high"):
        runtime.preemption.insist(queue, runtime.preemption.announce(queue, [f"a node of {queue}"]))
        store.call(runtime.preemption.win(queue), runtime.preemption.yielded(queue, "somebody"))

    assert not runtime.goes_back(f"unit.{mine}"), "Redis delivers the more urgent message first"
    runtime.in_order = False
    assert runtime.goes_back(f"unit.{mine}") == (waiting > 0)
    for queue in ("unit.critical", "unit.high")[:waiting]:
        runtime.preemption.settle(queue, f"a node of {queue}")
    assert not runtime.goes_back(f"unit.{mine}")


# --- while Redis is away ----------------------------------------------------------------------


def test_without_redis_no_node_is_asked_and_nothing_is_raised(process: Process) -> None:
    process.store.lost = True

    assert process.preemption.announce(QUEUE, ["a", "b"]) == ()
    process.preemption.insist(QUEUE, ["a"])
    process.preemption.settle(QUEUE, "a")


def test_an_outage_between_two_calls_raises_no_error(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(queue: str, nodes: list[str], *, promised: int) -> Call:
        process.store.lost = True
        return original(queue, nodes, promised=promised)

    original = process.preemption.ask
    monkeypatch.setattr(process.preemption, "ask", ask)

    assert process.preemption.announce(QUEUE, ["a"]) == ()


# --- against an oracle ------------------------------------------------------------------------


class Oracle:
    """The state that the script should keep, in plain Python; times are the server's, in ms."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}  # node -> the end of its grace period
        self.coming: dict[str, int] = {}  # slot -> the time until which it counts as taken
        self.yields = 0  # tokens won, slots not yet given up
        self.slots, self.free, self.slots_at = 0, 0, 0

    def now_is(self, now: int) -> None:
        """Forget void tokens."""
        self.coming = {slot: until for slot, until in self.coming.items() if until > now}
        for node in [node for node, ripe in self.waiting.items() if now - ripe >= TTL_MS]:
            del self.waiting[node]
            self.use()
        self.settle()
        if now - self.slots_at > SLOTS_TTL_MS:
            self.slots = self.free = 0

    def settle(self) -> None:
        """Expect no slot when no node waits."""
        self.yields = min(self.yields, len(self.waiting))
        if not self.waiting:
            self.coming.clear()

    def claimed(self, node: str) -> None:
        """Give a node its slot: one that was coming, else one of a yield."""
        del self.waiting[node]
        self.use()
        self.settle()

    def use(self) -> None:
        if self.coming:
            del self.coming[max(self.coming, key=lambda slot: (self.coming[slot], slot))]
        else:
            self.yields = max(0, self.yields - 1)

    def yielded(self, who: str, now: int) -> None:
        """Note that a node that won a token has given up its slot."""
        if self.yields:
            self.yields -= 1
            self.coming[who] = now + TTL_MS

    def wins(self, now: int) -> bool:
        """Return whether a node that tries now is to yield."""
        return sum(ripe <= now for ripe in self.waiting.values()) > self.yields + len(self.coming)

    def announced(self, nodes: list[str], freed: int, now: int) -> list[str]:
        """Promise free slots to the first nodes; return those that get none."""
        taken = min(self.free, max(0, len(nodes) - freed))
        self.free -= taken
        counted, promised = nodes[: self.slots], freed + taken
        self.waiting.update(
            dict.fromkeys(counted[:promised], now)
            | dict.fromkeys(counted[promised:], now + GRACE_MS)
        )
        self.coming.update(dict.fromkeys(counted[:promised], now + GRACE_MS))
        return counted[promised:]


class PreemptionMachine(RuleBasedStateMachine):
    """Several processes that announce nodes and yield, beside the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.world = pytest.MonkeyPatch(), World()
        self.world.install(self.patch)
        self.processes = [Process(self.world) for _ in range(3)]
        self.oracle = Oracle()
        self.counted: list[str] = []  # ever
        self.won, self.gone, self.renewed = 0, 0, 0  # ever

    def teardown(self) -> None:
        self.patch.undo()

    @property
    def now(self) -> int:
        return self.processes[0].store.now_ms()

    def any(self) -> Process:
        """Return the processes in turn; the choice must not matter."""
        self.processes.append(self.processes.pop(0))
        return self.processes[0]

    @rule(total=st.integers(1, 8), free=st.integers(0, 8))
    def a_worker_publishes(self, total: int, free: int) -> None:
        self.oracle.slots, self.oracle.free, self.oracle.slots_at = (
            total,
            min(free, total),
            self.now,
        )
        self.any().has_slots(total, free=min(free, total))

    @rule(n=st.integers(1, 5), freed=st.integers(0, 2))
    def nodes_are_announced(self, n: int, freed: int) -> None:
        nodes = [f"job {len(self.counted) + i}" for i in range(n)]
        self.counted += nodes[: self.oracle.slots]
        expected = self.oracle.announced(nodes, freed, self.now)
        assert self.any().preemption.announce(QUEUE, nodes, freed=freed) == expected

    @precondition(lambda self: self.counted)
    @rule(at=st.integers(0, 20), count=st.integers(1, 3))
    def waiting_nodes_insist(self, at: int, count: int) -> None:
        nodes = self.counted[-at - 1 :][:count]
        self.any().preemption.insist(QUEUE, nodes)
        waiting = [node for node in nodes if node in self.oracle.waiting]
        self.renewed += len(waiting)
        self.oracle.waiting.update(dict.fromkeys(waiting, self.now))

    @rule()
    def a_node_tries_to_yield(self) -> None:
        expected = self.oracle.wins(self.now)
        process = self.any()
        assert process.do(process.preemption.win(QUEUE)) == int(expected)
        self.oracle.yields += expected
        self.won += expected

    @rule()
    def a_node_gives_up_its_slot(self) -> None:
        """It may or may not have won a token."""
        self.gone += 1
        process = self.any()
        process.do(process.preemption.yielded(QUEUE, f"low {self.gone}"))
        self.oracle.yielded(f"low {self.gone}", self.now)

    @precondition(lambda self: self.counted)
    @rule(at=st.integers(0, 20))
    def a_node_is_claimed(self, at: int) -> None:
        """The claim may be late, or a repeated one."""
        node = self.counted[-(at % len(self.counted)) - 1]
        self.any().preemption.settle(QUEUE, node)
        if node in self.oracle.waiting:
            self.oracle.claimed(node)

    @rule()
    def redis_is_away_for_one_process(self) -> None:
        process = self.any()
        process.store.lost = True
        assert process.preemption.announce(QUEUE, ["lost"]) == ()
        process.preemption.insist(QUEUE, self.counted[-1:])
        process.preemption.settle(QUEUE, "lost")
        process.store.lost = False

    @rule(seconds=st.sampled_from([1 / 64, 1 / 16, 1 / 4, 1.0, TTL_MS / 2000, TTL_MS / 1000]))
    def time_passes(self, seconds: float) -> None:
        self.world.sleep(seconds)
        self.oracle.now_is(self.now)

    @invariant()
    def open_tokens_equal_those_of_the_oracle(self) -> None:
        assert self.processes[0].open() == len(self.oracle.waiting) - self.oracle.yields

    @invariant()
    def no_node_yields_needlessly(self) -> None:
        assert self.oracle.yields <= len(self.oracle.waiting), (
            "yields are for nodes that still wait"
        )
        assert self.won <= len(self.counted) + self.renewed, (
            "one yield at most for each time that a node was announced"
        )


TestPreemptionAgainstAnOracle = PreemptionMachine.TestCase
TestPreemptionAgainstAnOracle.settings = settings(max_examples=60, stateful_step_count=40)
