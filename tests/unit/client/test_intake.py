"""A batch is opened no faster than workers take in its jobs, and never hangs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from resilience.keys import Keys
from rlm_tasks.client.intake import Intake
from scheduler.settings import BatchSettings
from tests.unit.world import World, world

__all__ = ["world"]


class Batch:
    """A batch of jobs, and workers that claim some of them in each pause."""

    def __init__(
        self, world: World, *, size: int = 5, claims: int = 1, slots: int = 2, **settings: object
    ) -> None:
        self._world, self._claims, self._keys = world, claims, Keys("unit")
        self.store = world.store()
        batch = BatchSettings(max_size=size, **settings)  # type: ignore[arg-type]  # fields of the settings
        self.session = SimpleNamespace(
            keys=self._keys,
            store=self.store,
            shared=self.store,
            settings=SimpleNamespace(batch=batch),
            admission=SimpleNamespace(batch_size=lambda: 2 * size, slots_of=lambda _: slots),
        )
        self.most_unclaimed = self.pauses = 0
        self.parts: list[int] = []
        self._pending: list[str] = []

    def sleep(self, seconds: float) -> None:
        """Let time pass, in which workers claim jobs."""
        self._world.sleep(seconds)
        self.pauses += 1
        claimed, self._pending = self._pending[: self._claims], self._pending[self._claims :]
        for job in claimed:
            self.store.client.hset(self._keys.of(job).job, "state", "running")

    def open(self, count: int) -> None:
        """Open a number of jobs as a client does."""
        intake = Intake(
            self.session,  # type: ignore[arg-type]  # the parts that it uses
            ["queue"],
            clock=self._world.time,
            sleep=self.sleep,
        )
        opened = 0
        while left := count - opened:
            room = intake.room(left)
            jobs = [f"job-{opened + each}" for each in range(room)]
            for job in jobs:
                self.store.client.hset(self._keys.of(job).job, "state", "pending")
            self._pending += jobs
            intake.opened(jobs)
            opened += room
            self.parts.append(room)
            self.most_unclaimed = max(self.most_unclaimed, len(self._pending))


def test_a_hundred_jobs_are_never_more_than_five_unclaimed_at_once(world: World) -> None:
    batch = Batch(world)
    batch.open(100)

    assert batch.most_unclaimed == 5
    assert sum(batch.parts) == 100
    assert max(batch.parts) == 5


def test_without_a_worker_nothing_is_waited_for(world: World) -> None:
    batch = Batch(world, slots=0)
    batch.open(100)

    assert (batch.pauses, batch.parts) == (0, [10] * 10)


@pytest.mark.parametrize("wait_s", [0.0, 3.0])
def test_behind_long_jobs_a_batch_waits_a_bounded_time_in_all(world: World, wait_s: float) -> None:
    batch = Batch(world, claims=0, wait_s=wait_s)
    began = world.now
    batch.open(100)

    assert sum(batch.parts) == 100
    assert wait_s <= world.now - began <= wait_s + 0.2


def test_a_batch_of_one_part_reads_nothing(world: World) -> None:
    batch = Batch(world)
    batch.session.store = None  # a read would raise
    batch.open(5)

    assert (batch.parts, batch.pauses) == ([5], 0)


def test_the_router_opens_a_thousand_jobs_a_second_where_it_is_on(world: World) -> None:
    batch = Batch(world, size=1000, slots=0, router=True)
    began = world.now
    batch.open(1100)

    assert max(batch.parts) == 100
    assert 0.9 <= world.now - began <= 1.5
