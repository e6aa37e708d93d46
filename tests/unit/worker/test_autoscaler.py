"""The autoscaler of a worker, on a pool of Celery."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from celery.worker import state

from resilience.degradation import Level
from rlm_tasks.worker.autoscaler import PressureAutoscaler
from scheduler.settings import AutoscaleSettings


class FakeProcess:
    """A pool process: its number is the file descriptor of its pipe."""

    def __init__(self, number: int) -> None:
        self.inqW_fd = number  # billiard's name
        self.sentinels: list[None] = []
        self.inq = SimpleNamespace(put=self.sentinels.append)
        self._controlled_termination = False


class FakePool:
    """The parts of Celery's and billiard's pool that an autoscaler uses."""

    active = True

    def __init__(self, size: int, *, starting: int = 0) -> None:
        self.processes = [FakeProcess(number) for number in range(size + starting)]
        self._pool = SimpleNamespace(
            _pool=self.processes,
            _all_inqueues=set(range(size)),
            _busy_workers=set(),
            _active_writes=set(),
            _processes=size + starting,
            _putlock=SimpleNamespace(shrink=lambda: None),
        )

    @property
    def num_processes(self) -> int:
        return int(self._pool._processes)

    def grow(self, n: int) -> None:
        self._pool._processes += n

    def maintain_pool(self) -> None:
        """Celery starts missing processes here."""

    @property
    def left(self) -> list[int]:
        return [each.inqW_fd for each in self.processes if each.sentinels]


def autoscaled(
    pool: FakePool,
    *,
    level: Level = Level.NORMAL,
    ready: int | None = 0,
    bounds: tuple[int, int] = (8, 1),
) -> tuple[PressureAutoscaler, list[int]]:
    """Return an autoscaler, and the list of its changes to the prefetch count of its worker."""
    changes: list[int] = []
    runtime = SimpleNamespace(page=SimpleNamespace(level=level), clock=time.monotonic)
    app: Any = SimpleNamespace(
        rlm_runtime=lambda: runtime, rlm_settings=SimpleNamespace(autoscale=AutoscaleSettings())
    )
    if ready is not None:
        app.rlm_queued = lambda: ready
    worker = SimpleNamespace(
        app=app, consumer=SimpleNamespace(_update_prefetch_count=changes.append)
    )
    return PressureAutoscaler(pool, *bounds, worker=worker), changes


def test_only_idle_processes_that_have_started_are_asked_to_leave() -> None:
    pool = FakePool(6, starting=1)
    pool._pool._busy_workers |= {1, 5}  # one of them has a message that it has not yet accepted
    pool._pool._active_writes |= {2}
    pool.processes[3]._controlled_termination = True
    scaler, _ = autoscaled(pool, level=Level.EMERGENCY)
    scaler.maybe_scale()

    assert pool.left == [0, 4]
    assert pool.num_processes == 5
    assert all(pool.processes[each]._controlled_termination for each in pool.left), (
        "their exit is no error"
    )
    assert pool._pool._busy_workers == {0, 1, 4, 5}, "no more messages are written to them"
    scaler.maybe_scale()
    assert pool.left == [0, 4]


def test_the_youngest_processes_leave_first() -> None:
    pool = FakePool(4)
    autoscaled(pool, level=Level.CRITICAL)[0].maybe_scale()

    assert pool.left == [3]


def test_a_pool_takes_as_many_messages_as_it_has_processes() -> None:
    pool = FakePool(2)
    scaler, changes = autoscaled(pool, ready=100)
    scaler.maybe_scale()
    scaler.maybe_scale()

    assert pool.num_processes == 4
    assert changes == [4 - 8], "Celery began with the largest number of processes"


def test_without_a_gauge_the_prefetch_count_of_celery_stays() -> None:
    """The prefetched messages are then the only sign of waiting work."""
    pool = FakePool(1)
    scaler, changes = autoscaled(pool, ready=None)
    waiting = [Waiting() for _ in range(6)]
    state.reserved_requests.update(waiting)
    scaler.maybe_scale()
    state.reserved_requests.clear()

    assert (pool.num_processes, changes) == (3, [])


class Waiting:
    """A message that waits in this worker for a process."""


def test_a_pool_that_is_stopping_is_not_changed() -> None:
    pool = FakePool(4)
    scaler, _ = autoscaled(pool, level=Level.EMERGENCY)
    assert scaler.reach == 4
    pool.active = False
    scaler.maybe_scale()

    assert pool.left == []
    assert scaler.reach == 0


def test_bounds_set_by_remote_control_hold_and_keep_one_process() -> None:
    pool = FakePool(4)
    scaler, _ = autoscaled(pool, bounds=(8, 0))

    assert (scaler.max_concurrency, scaler.min_concurrency) == (8, 1)
    assert scaler.update(max=2) == (2, 1)
    assert scaler.update(min=0) == (2, 1)
    scaler.maybe_scale()
    assert pool.num_processes == 2
