"""Jobs that make room for each other at random, in the middle of their items: each is exact, and
nobody yields for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any

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
from tests.unit.harness import Platform

SEEDS, AT_ONCE = 125, 25
SLOTS = 3
URGENT_JOBS = 2


class PressedPlatform(Platform):
    """A platform that does something else between two items: another slot works, somebody submits,
    the guard looks.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed, slots=SLOTS)
        self.guard = Supervisor(self.runtime, {}, lambda: SLOTS, lambda: self.queues)
        self.depth, self.jobs, self.runs = 0, list[JobSpec](), Counter[tuple[str, int]]()
        self.store.call(self.slots.publish("unit", SLOTS, 0, self.queues))

    def time(self) -> float:
        """Stand where the module `time` does in fakeredis."""
        return 1_800_000_000.0 + self.clock.now

    def open(self, n: int, priority: str, preempts: bool | None, **fields: Any) -> JobSpec:
        options = Options(priority=priority, preempt_lower_priority=preempts)  # type: ignore[arg-type]  # it is checked there
        self.jobs.append(
            self.submit(
                JobRequest(operation="unit_pressed", items=range(n), options=options, **fields)
            )
        )
        return self.jobs[-1]

    def meanwhile(self) -> None:
        """Let something happen, as often as not."""
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
            self.guard.make_room(self.mailbox.asked.pop())
        if random.random() < 0.1:
            self.guard._see_urgent(self.store.call(*self.guard._tokens()))
        if random.random() < 0.2 and self.mailbox.messages and self.depth < SLOTS - 1:
            self.depth += 1
            self.step()
            self.depth -= 1


_platforms: list[PressedPlatform] = []


def _concatenated(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


@operation("unit_pressed", merge=_concatenated)
def unit_pressed(item: int, ctx: Context) -> list[int]:
    """Take a time of our clock, in which other things happen."""
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
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Which nodes have been counted as waiting for room, ever, by queue."""
    nodes_of: dict[str, set[str]] = {}
    ask = Preemption.ask

    def counting(self: Preemption, queue: str, nodes: Sequence[str], *, promised: int) -> Call:
        nodes_of.setdefault(queue, set()).update(nodes)
        return ask(self, queue, nodes, promised=promised)

    monkeypatch.setattr(Preemption, "ask", counting)
    monkeypatch.setattr(QueueOrder, "facts", QueueOrder.facts)  # a guard tells it of its worker
    return nodes_of


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What makes a platform on which nobody else works, and whose server has its clock."""

    def make(seed: int) -> PressedPlatform:
        platform = PressedPlatform(seed)
        monkeypatch.setattr(server_clock, "time", platform)
        platform.store.call(platform.slots.publish("unit", SLOTS, 0, platform.queues))
        _platforms.append(platform)
        return platform

    yield make
    _platforms.clear()


def run(platform: PressedPlatform, seed: int) -> None:
    """Run a job or two of little urgency, and whatever comes between."""
    random = Random(seed)
    for _ in range(random.choice([1, 1, 2])):
        n, priority = random.choice([6, 16, 30]), random.choice(["low", "low", "normal", "high"])
        platform.open(n, priority, None, **random.choice(SHAPES))
    while platform.mailbox.messages:
        platform.step()


def yields(platform: PressedPlatform, spec: JobSpec) -> int:
    return sum(
        r.state == "c" and r.why == Reason.PREEMPTED for r in platform.ledger.all_records(spec.job)
    )


def tiles(platform: PressedPlatform, spec: JobSpec) -> bool:
    """Say whether what the nodes of a job have worked through is every item, once."""
    done = sorted(
        (r.lo, r.mid)
        for r in platform.ledger.all_records(spec.job)
        if r.mid > r.lo and r.id != "merge"
    )
    return [lo for lo, _ in done] + [spec.n] == [0] + [mid for _, mid in done]


@pytest.mark.parametrize("block", range(0, SEEDS, AT_ONCE))
def test_jobs_that_make_room_at_random_are_exact_and_nobody_yields_for_nothing(
    pressed: Any, counted: dict[str, set[str]], block: int
) -> None:
    made_room = 0
    for seed in range(block, block + AT_ONCE):
        counted.clear()
        platform = pressed(seed)
        run(platform, seed)

        for spec in platform.jobs:
            assert platform.ledger.facts(spec.job)["state"] == Status.SUCCEEDED, seed
            assert platform.output(spec) == list(range(spec.n)), seed
            assert tiles(platform, spec), seed
        assert set(platform.runs.values()) == {1}, (seed, "each item once")
        made = {spec.job: yields(platform, spec) for spec in platform.jobs}
        made_room += any(made.values())
        assert sum(made.values()) <= sum(map(len, counted.values())), seed
        for spec in platform.jobs:
            above = [
                queue
                for queue in counted
                if rank_of(queue.rpartition(".")[2]) < rank_of(spec.priority)
            ]
            assert made[spec.job] <= sum(len(counted[queue]) for queue in above), (
                seed,
                "only to more urgent work",
            )
        assert platform.store.call(*platform.guard._tokens()) == [0] * len(platform.queues), (
            seed,
            "nobody waits",
        )
    assert made_room >= AT_ONCE / 5, "it happens"


# --- what the guard knows ---------------------------------------------------------------------


def test_who_asks_for_room_while_the_guard_looks_is_not_forgotten(
    pressed: Any, counted: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = pressed(1)
    stock = platform.store.call

    def call_and_be_asked(*calls: Call, **more: Any) -> list[Any]:
        answers: list[Any] = stock(*calls, **more)
        platform.guard.make_room("unit.critical")
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(platform.guard._ledger.store, "call", call_and_be_asked)
        platform.guard._exchange(0.0)
    assert platform.runtime.page.urgent == rank_of("critical"), "it was asked for after the look"

    platform.guard._exchange(10.0)
    assert platform.runtime.page.urgent == 0, "nobody waits any more"
