"""Shares of slots: the nodes that need a place of their operation, and the hosts on which they may
start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilience.bulkhead import LEASE_S
from resilience.degradation import Level
from rlm_tasks import JobRequest
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.engine.node import run_node
from rlm_tasks.engine.shared_page import SharedPage
from rlm_tasks.engine.slot_shares import SlotShares
from rlm_tasks.jobs.splitting import LONGEST_RUN
from rlm_tasks.ledger.records import MERGE, ROOT
from rlm_tasks.operations import registry
from rlm_tasks.operations.registry import Operation
from rlm_tasks.settings.model import Settings
from scheduler.allocation import ResourceAllocationPolicy
from scheduler.sampling import held_mb
from scheduler.settings import AllocationSettings
from tests.unit.harness import Platform
from tests.unit.world import CountingStore, World, world

__all__ = ["world"]


def operation(name: str = "op", **policy: Any) -> Operation:
    allocation = ResourceAllocationPolicy(executor_id=name, **policy) if policy else None
    return Operation(name, lambda item: item, allocation=allocation)


@pytest.fixture(autouse=True)
def own_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the operations that a test registers when it ends."""
    registry.import_operations(())
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    return


class Worker:
    """One process: its page, its store and its shares."""

    def __init__(self, world: World, settings: Settings | None = None, *, slots: int = 100) -> None:
        self.page, self.store = SharedPage(), world.store()
        self.page.slots = slots
        self.woken: list[str] = []
        self.shares = SlotShares(
            self.store, settings or Settings(namespace="unit"), self.page, self._wake
        )

    def _wake(self, waiters: Any) -> None:
        self.woken += waiters

    def of(
        self,
        operation: Operation,
        level: Level = Level.NORMAL,
        priority: str = "normal",
        target_s: float = 1.0,
    ) -> Any:
        return self.shares.of(operation, priority, level, target_s)


# --- when a place is needed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "declared", "bounded"),
    [
        (Level.NORMAL, False, False),
        (Level.ELEVATED, False, False),
        (Level.HIGH, False, True),
        (Level.EMERGENCY, False, True),
        (Level.NORMAL, True, True),
        (Level.CRITICAL, True, True),
    ],
)
def test_without_a_policy_nothing_is_bounded_below_high(
    world: World, level: Level, declared: bool, bounded: bool
) -> None:
    worker = Worker(world)
    found = worker.of(operation(max_workers=4) if declared else operation(), level)
    assert (found is not None) == bounded
    assert worker.store.round_trips == 0, "the question needs no round trip"


@pytest.mark.parametrize(
    ("level", "priority", "slots", "places"),
    [
        (Level.HIGH, "normal", 100, 18),
        (Level.EMERGENCY, "normal", 100, 4),
        (Level.EMERGENCY, "low", 100, 1),
        (Level.EMERGENCY, "critical", 100, 32),
        (Level.HIGH, "normal", 2, 2),
    ],
)
def test_places_shrink_with_pressure_and_never_exceed_the_slots(
    world: World, level: Level, priority: str, slots: int, places: int
) -> None:
    share = Worker(world, slots=slots).of(operation(), level, priority)
    granted = [share.acquire() for _ in range(places + 1)]
    assert [bool(each) for each in granted] == [True] * places + [False]


def test_a_share_is_held_over_all_workers(world: World) -> None:
    bounded = operation(min_workers=1, max_workers=2)
    first, second = Worker(world).of(bounded), Worker(world).of(bounded)
    places = [first.acquire(), second.acquire(), second.acquire()]
    assert [bool(each) for each in places] == [True, True, False]
    places[0].release()
    assert second.acquire()


def test_memory_bounds_the_nodes_of_one_host(world: World) -> None:
    worker = Worker(world)
    worker.page.available_mb = 2500.0
    share = worker.of(operation(max_workers=6, max_memory_mb=1000.0))
    assert [bool(share.acquire()) for _ in range(3)] == [True, True, False]
    assert share.acquire(host="elsewhere"), "another host has room"


def test_one_node_may_run_when_memory_is_short(world: World) -> None:
    worker = Worker(world)
    worker.page.available_mb = 1.0
    share = worker.of(operation(max_workers=6, max_memory_mb=1000.0))
    assert [bool(share.acquire()) for _ in range(2)] == [True, False]


def test_the_lease_of_a_place_follows_the_target_time_of_its_job(world: World) -> None:
    """Two jobs of one operation have leases of different length."""
    bounded, worker = operation(min_workers=1, max_workers=1), Worker(world)
    assert worker.of(bounded, target_s=1.0).acquire()
    world.sleep(LEASE_S + LONGEST_RUN + 1)
    assert worker.of(bounded, target_s=60.0).acquire()
    world.sleep(LEASE_S + LONGEST_RUN + 1)
    assert not worker.of(bounded, target_s=1.0).acquire(), "the node of the other job still runs"


def test_the_memory_of_a_process_does_not_grow_with_changing_figures(world: World) -> None:
    worker = Worker(world)
    for megabytes in range(1000, 3000):
        worker.page.available_mb = float(megabytes)
        worker.of(operation(), Level.HIGH)
    assert len(worker.shares._known) == 1


def test_while_redis_is_away_a_process_runs_one_node_at_a_time(world: World) -> None:
    worker = Worker(world)
    share = worker.of(operation(max_workers=6))
    worker.store.lost = True
    place = share.acquire()
    assert place
    assert not share.acquire()
    place.release()


def test_the_places_of_a_dead_process_are_free_again(world: World) -> None:
    registry.register(bounded := operation("bounded", min_workers=1, max_workers=1))
    worker = Worker(world)
    share = worker.of(bounded)
    assert share.acquire()
    assert not share.acquire(waiter="job node")
    worker.shares.forget(os.getpid())
    assert worker.woken == ["job node"]
    assert share.acquire()


# --- where a node may start -------------------------------------------------------------------


def test_a_node_starts_with_enough_free_memory_including_that_of_its_process(world: World) -> None:
    own = held_mb(os.getpid())
    bounded, worker = (
        operation("bounded", min_memory_mb=own + 500, max_memory_mb=own + 1000),
        Worker(world),
    )
    assert worker.shares.obstacle(bounded) == "", "memory is not yet measured"
    worker.page.free_mb = 600.0
    assert worker.shares.obstacle(bounded) == ""
    worker.page.free_mb = 300.0
    assert "min_memory_mb" in worker.shares.obstacle(bounded)
    worker.page.free_mb = 0.0
    assert "min_memory_mb" in worker.shares.obstacle(bounded), (
        "no free memory differs from unknown memory"
    )
    assert worker.shares.obstacle(operation()) == "", "without a policy any memory suffices"


def test_memory_held_by_other_nodes_is_not_free(world: World) -> None:
    worker = Worker(world)
    worker.page.free_mb, worker.page.available_mb = 10.0, 8000.0
    assert worker.shares.obstacle(operation(min_memory_mb=4000.0, max_memory_mb=4000.0))


def test_a_node_that_must_not_start_here_is_parked_with_the_reason() -> None:
    platform = Platform()
    registry.register(operation("hungry", min_memory_mb=1e6, max_memory_mb=1e6))
    platform.runtime.page.free_mb = 10.0
    spec = platform.submit(JobRequest(operation="hungry", items=range(10)))
    assert run_node(platform.runtime, spec.job, ROOT) is False
    [record] = platform.ledger.records(spec.job, [ROOT])
    assert (record.state, "min_memory_mb" in record.why) == ("p", True)


def test_a_node_that_parks_in_an_ended_job_sends_the_merge() -> None:
    platform = Platform()
    registry.register(operation("hungry", min_memory_mb=1e6, max_memory_mb=1e6))
    platform.runtime.page.free_mb = 10.0
    spec = platform.submit(JobRequest(operation="hungry", items=range(10)))
    platform.mailbox.messages.clear()

    def end_early(at: CrashPoint) -> None:
        if at is CrashPoint.AFTER_CLAIM:
            platform.ledger.stop(spec.job, "early")

    platform.runtime.reached = end_early
    run_node(platform.runtime, spec.job, ROOT)
    assert platform.mailbox.messages == [(spec.job, MERGE)]


# --- policies ---------------------------------------------------------------------------------


def with_file(tmp_path: Path, *entries: dict[str, Any]) -> Settings:
    path = tmp_path / "policies.json"
    path.write_text(json.dumps(entries))
    return Settings(namespace="unit", allocation=AllocationSettings(policies=str(path)))


def test_a_policy_for_all_others_bounds_from_high_pressure_on(world: World, tmp_path: Path) -> None:
    worker = Worker(
        world, with_file(tmp_path, {"operation": "*", "max_workers": 2, "min_workers": 1})
    )
    assert worker.of(operation(), Level.NORMAL) is None
    share = worker.of(operation(), Level.EMERGENCY)
    assert [bool(share.acquire()) for _ in range(2)] == [True, False]


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "extra"), [(Level.NORMAL, 0), (Level.ELEVATED, 0), (Level.HIGH, 2)]
)
def test_without_a_policy_a_place_costs_two_round_trips_from_high_pressure_on(
    world: World, level: Level, extra: int
) -> None:
    """Below that only CLAIM, the items, FINISH and the root merge need round trips."""

    def trips(at: Level) -> int:
        platform, store = Platform(), CountingStore("redis://fake", client=world.client())
        platform.runtime.shares = SlotShares(
            store, platform.settings, platform.runtime.page, lambda _: None
        )
        commands: list[int] = []
        pipelined = platform.store._pipelined
        platform.store._pipelined = lambda *args, **kwargs: (
            commands.append(1),
            pipelined(*args, **kwargs),
        )[1]  # type: ignore[method-assign]
        platform.runtime.page.level = at
        for _ in range(2):  # from the second job on the server has all scripts
            spec = platform.submit(JobRequest(operation="sum", items=range(10)))
            commands.clear()
            store.round_trips = 0
            run_node(platform.runtime, spec.job, ROOT)
            platform.mailbox.messages.clear()
        return len(commands) + store.round_trips

    assert trips(level) == trips(Level.NORMAL) + extra
