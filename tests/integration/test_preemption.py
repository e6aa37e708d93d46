"""Urgent work starts now: running nodes of less urgent jobs make room, as many as are needed, and nothing is lost by it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks import Adaptive, Client, embedded
from rlm_tasks.dispatch import Dispatcher
from rlm_tasks.job import Job
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.support import wait_until

ITEM_S = 0.1
SUBMISSIONS = 100
MANY_SLOTS = 3
PREEMPTED = "more urgent work waits for a slot"
LONG = Adaptive(target_execution_time_ms=60_000)
OPERATIONS = "tests.integration.pressed_ops,tests.integration.preempted_ops"


@pytest.fixture(scope="module")
def own(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a worker of this module's own."""
    environment = environment_of(server.url, "preempt", RLM_OPERATIONS=OPERATIONS)
    log = tmp_path_factory.mktemp("preempt") / "worker.log"
    with embedded.worker(environment, log=log, slots=SLOTS), client_of(environment) as client:
        yield client


@pytest.fixture(scope="module")
def wide(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a worker with more slots."""
    environment = environment_of(server.url, "preempt-wide", RLM_OPERATIONS=OPERATIONS)
    log = tmp_path_factory.mktemp("wide") / "worker.log"
    with embedded.worker(environment, log=log, slots=MANY_SLOTS), client_of(environment) as client:
        yield client


def running(job: Job) -> int:
    return sum(node.state == "running" for node in job.tree())


def fills(job: Job, slots: int) -> None:
    """Wait until a job runs on so many slots."""
    wait_until(lambda: running(job) == slots)


def busy(client: Client, items: int, *, slots: int = SLOTS, item_s: float = ITEM_S, **fields: Any) -> Job:
    """Fill slots with nodes that would run for a minute each."""
    job = client.submit(**{"operation": "nap", "items": [item_s] * items, "priority": "low", "strategy": LONG, **fields})
    fills(job, slots)
    return job


def cut(job: Job) -> list[str]:
    """Return the worker of each node that has made room."""
    return [node.worker for node in job.tree() if node.state == "cut" and node.why == PREEMPTED]


def yields(job: Job) -> int:
    return len(cut(job))


def goes_on(job: Job, items: int) -> None:
    """Wait until a job has done so many more items: each was an occasion to make room."""
    done = job.progress().done
    wait_until(lambda: job.progress().done >= done + items)


def at_once(intervals: Sequence[tuple[int, float, float]]) -> int:
    """Return how many items ran at the same time, at most."""
    edges = sorted([(began, 1) for _, began, _ in intervals] + [(ended, -1) for _, _, ended in intervals])
    return max(sum(step for _, step in edges[: i + 1]) for i in range(len(edges)))


def test_critical_work_starts_within_an_item_while_every_slot_runs_long_nodes(
    own: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    low = busy(own, 2000)
    started = []

    for _ in range(SUBMISSIONS):
        fills(low, SLOTS)
        asked = time.time()
        [began] = own.submit(operation="stamp", items=[0], priority="critical").get(timeout=30)
        started.append(began - asked)

    late = sorted(started)
    with capsys.disabled():
        print(f"\ncritical starts: p50 {late[49]:.3f} s, p95 {late[94]:.3f} s, p99 {late[98]:.3f} s, max {late[99]:.3f} s")
    assert late[98] <= ITEM_S + 0.5
    assert SUBMISSIONS * 0.9 <= yields(low) <= SUBMISSIONS
    low.cancel()


# --- as many as are needed ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_as_many_nodes_yield_as_critical_jobs_find_no_slot(wide: Client, k: int) -> None:
    low = busy(wide, 3000, slots=MANY_SLOTS, item_s=0.02)

    jobs = wide.batch_submit([{"operation": "nap", "items": [0.6], "options": {"priority": "critical"}}] * k)

    for job in jobs:
        assert job.get(timeout=20) == 1
    fills(low, MANY_SLOTS)
    goes_on(low, 30)
    assert yields(low) == min(k, MANY_SLOTS)
    low.cancel()


@pytest.mark.parametrize(("critical", "needed"), [(1, 0), (2, 1), (3, 2)])
def test_a_free_slot_is_used_before_anybody_yields(wide: Client, critical: int, needed: int) -> None:
    lows = [busy(wide, 600, slots=1, item_s=0.02, type="sequential", strategy=None) for _ in range(MANY_SLOTS - 1)]
    wait_until(lambda: free(wide) == 1)

    jobs = wide.batch_submit([{"operation": "nap", "items": [0.6], "options": {"priority": "critical"}}] * critical)

    for job in jobs:
        assert job.get(timeout=20) == 1
    for low in lows:
        goes_on(low, 10)
    assert sum(yields(low) for low in lows) == needed
    for low in lows:
        low.cancel()


def free(client: Client) -> int:
    """Return how many slots are on offer."""
    return sum(host["free"] for host in offers(client))


def test_a_critical_job_takes_all_slots_it_can_use_and_gives_them_back(wide: Client) -> None:
    low = busy(wide, 3000, slots=MANY_SLOTS, item_s=0.02)

    critical = wide.submit(operation="where_and_when", items=[0.2] * 15, priority="critical")
    intervals = critical.get(timeout=20)

    assert at_once(intervals) == MANY_SLOTS
    fills(low, MANY_SLOTS)
    goes_on(low, 30)
    assert yields(low) == MANY_SLOTS
    low.cancel()


def test_a_critical_job_that_finds_free_slots_as_it_grows_makes_nobody_yield(wide: Client) -> None:
    low = busy(wide, 2000, slots=1, item_s=0.005, type="sequential", strategy=None)

    critical = wide.submit(operation="where_and_when", items=[0.2] * 10, priority="critical")

    assert at_once(critical.get(timeout=20)) == MANY_SLOTS - 1
    assert yields(low) == 0
    low.cancel()
