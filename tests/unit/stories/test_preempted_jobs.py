"""Jobs that yield to each other at random, in the middle of their items.

Each job is exact, and no node yields needlessly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any

import fakeredis
import fakeredis.commands_mixins.server_mixin as server_clock
import pytest

from resilience.store import Call
from rlm_tasks import Adaptive, Binary, Context, JobRequest, NWay, Options, operation
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.jobs.splitting import Reason
from rlm_tasks.results import Status
from rlm_tasks.worker.queue_order import QueueOrder
from rlm_tasks.worker.supervisor import Supervisor
from scheduler.preemption import Preemption, rank_of
from tests.support import examples
from tests.unit.harness import Platform

SEEDS, AT_ONCE = examples(50), 25
SLOTS = 3
URGENT_JOBS = 2


class BusyPlatform(Platform):
    """A platform that does something else between two items.

    Another slot works, a client submits, or the supervisor makes an exchange.
    """

    def __init__(self, seed: int) -> None:
        # fakeredis, because the clock of its scripts can be that of the platform.
        super().__init__(
            seed, slots=SLOTS, client=fakeredis.FakeRedis(server=fakeredis.FakeServer())
        )
        self.supervisor = Supervisor(self.runtime, {}, lambda: SLOTS, lambda: self.queues)
        self.depth, self.jobs, self.runs = 0, list[JobSpec](), Counter[tuple[str, int]]()
        self.store.call(self.slots.publish("unit", SLOTS, 0, self.queues))

    def time(self) -> float:
        """Return the time; the platform stands in place of the module `time` in fakeredis."""
        return 1_800_000_000.0 + self.clock.now

    def open(self, n: int, priority: str, preempts: bool | None, **fields: Any) -> JobSpec:
        options = Options(priority=priority, preempt_lower_priority=preempts)  # type: ignore[arg-type]  # it is checked at run time
        self.jobs.append(
            self.submit(
                JobRequest(operation="unit_pressed", items=range(n), options=options, **fields)
            )
        )
        return self.jobs[-1]

    def meanwhile(self) -> None:
        """Let something happen, with some probability."""
        random = self.random
        if random.random() < 0.15 and len(self.jobs) <= URGENT_JOBS:
            priority, preempts = random.choice(
                [("critical", None), ("critical", False), ("high", True), ("normal", True)]
            )
            self.open(
                random.choice([1, 1, 3, 8]),
                priority,
                preempts,
                strategy=random.choice([None, Adaptive()]),
            )
        if self.mailbox.asked and random.random() < 0.3:
            self.supervisor.make_room(self.mailbox.asked.pop())
        if random.random() < 0.1:
            self.supervisor._set_urgent(self.store.call(*self.supervisor._tokens()))
        if random.random() < 0.2 and self.mailbox.messages and self.depth < SLOTS - 1:
            self.depth += 1
            self.step()
            self.depth -= 1


_platforms: list[BusyPlatform] = []


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


@operation("unit_pressed", merge=_concatenated)
def unit_pressed(item: int, ctx: Context) -> list[int]:
    """Take some time on the clock of the platform, while other things happen."""
    platform = _platforms[-1]
    platform.runs[ctx.job_id, item] += 1
    platform.clock.now += platform.random.choice([0.001, 0.01, 0.1])
    platform.meanwhile()
    return [item]


SHAPES: list[dict[str, Any]] = [
    {"type": "sequential"},
    {"type": "parallel"},
    {"type": "parallel", "chunk_size": 10},
    {"strategy": Adaptive(target_execution_time_ms=60_000)},
    {"strategy": Binary(min_chunk_size=16)},
    {"strategy": NWay(split_factor=3, min_chunk_size=12)},
]


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The nodes that were ever announced as waiting for room, by queue."""
    nodes_of: dict[str, set[str]] = {}
    ask = Preemption.ask

    def counting(self: Preemption, queue: str, nodes: Sequence[str], *, promised: int) -> Call:
        nodes_of.setdefault(queue, set()).update(nodes)
        return ask(self, queue, nodes, promised=promised)

    monkeypatch.setattr(Preemption, "ask", counting)
    monkeypatch.setattr(
        QueueOrder, "facts", QueueOrder.facts
    )  # a supervisor sets the facts of its worker
    return nodes_of


@pytest.fixture
def make_platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes a platform without other workers; its server has its clock."""

    def make(seed: int) -> BusyPlatform:
        platform = BusyPlatform(seed)
        monkeypatch.setattr(server_clock, "time", platform)
        platform.store.call(platform.slots.publish("unit", SLOTS, 0, platform.queues))
        _platforms.append(platform)
        return platform

    yield make
    _platforms.clear()


def run(platform: BusyPlatform, seed: int) -> None:
    """Run one or two less urgent jobs, and all that comes between."""
    random = Random(seed)
    for _ in range(random.choice([1, 1, 2])):
        n, priority = random.choice([6, 16, 30]), random.choice(["low", "low", "normal", "high"])
        platform.open(n, priority, None, **random.choice(SHAPES))
    while platform.mailbox.messages:
        platform.step()


def yields(platform: BusyPlatform, spec: JobSpec) -> int:
    return sum(
        r.state == "c" and r.why == Reason.PREEMPTED for r in platform.ledger.all_records(spec.job)
    )


def tiles(platform: BusyPlatform, spec: JobSpec) -> bool:
    """Return whether the nodes of a job have done every item once."""
    done = sorted(
        (r.lo, r.mid)
        for r in platform.ledger.all_records(spec.job)
        if r.mid > r.lo and r.id != "merge"
    )
    return [lo for lo, _ in done] + [spec.n] == [0] + [mid for _, mid in done]


@pytest.mark.parametrize("block", range(0, SEEDS, AT_ONCE))
def test_jobs_that_yield_at_random_are_exact_and_no_node_yields_needlessly(
    make_platform: Any, announced: dict[str, set[str]], block: int
) -> None:
    made_room = 0
    for seed in range(block, block + AT_ONCE):
        announced.clear()
        platform = make_platform(seed)
        run(platform, seed)

        for spec in platform.jobs:
            assert platform.ledger.facts(spec.job)["state"] == Status.SUCCEEDED, seed
            assert platform.output(spec) == list(range(spec.n)), seed
            assert tiles(platform, spec), seed
        assert set(platform.runs.values()) == {1}, (seed, "each item ran once")
        made = {spec.job: yields(platform, spec) for spec in platform.jobs}
        made_room += any(made.values())
        assert sum(made.values()) <= sum(map(len, announced.values())), seed
        for spec in platform.jobs:
            above = [
                queue
                for queue in announced
                if rank_of(queue.rpartition(".")[2]) < rank_of(spec.priority)
            ]
            assert made[spec.job] <= sum(len(announced[queue]) for queue in above), (
                seed,
                "nodes yield only to more urgent work",
            )
        assert platform.store.call(*platform.supervisor._tokens()) == [0] * len(platform.queues), (
            seed,
            "no node waits",
        )
    assert made_room >= AT_ONCE / 5, "some nodes have yielded"


# --- the supervisor ---------------------------------------------------------------------------


def test_a_request_for_room_during_an_exchange_is_not_lost(
    make_platform: Any, announced: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = make_platform(1)
    stock = platform.store.call

    def run_and_request_room(*calls: Call) -> list[Any]:
        answers = stock(*calls)
        platform.supervisor.make_room("unit.critical")
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(platform.supervisor._ledger.store, "call", run_and_request_room)
        platform.supervisor._exchange(0.0)
    assert platform.runtime.page.urgent == rank_of("critical"), "room was requested after the read"

    platform.supervisor._exchange(10.0)
    assert platform.runtime.page.urgent == 0, "no node waits any more"
