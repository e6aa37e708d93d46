"""Urgent work starts now: running nodes of less urgent jobs make room, as many as are needed, and nothing is lost by it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rlm_tasks import Adaptive, Client, embedded
from rlm_tasks.job import Job
from tests.integration.conftest import SLOTS, client_of, environment_of
from tests.support import wait_until

ITEM_S = 0.1
SUBMISSIONS = 100
LONG = Adaptive(target_execution_time_ms=60_000)


@pytest.fixture(scope="module")
def own(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a worker of this module's own."""
    environment = environment_of(server.url, "preempt", RLM_OPERATIONS="tests.integration.pressed_ops")
    log = tmp_path_factory.mktemp("preempt") / "worker.log"
    with embedded.worker(environment, log=log, slots=SLOTS), client_of(environment) as client:
        yield client


def busy(client: Client, items: int, **fields: object) -> Job:
    """Fill all slots with nodes that would run for a minute each."""
    job = client.submit(
        operation="nap",
        items=[ITEM_S] * items,
        priority="low",
        strategy=LONG,
        **fields,  # type: ignore[arg-type]
    )
    wait_until(lambda: sum(node.state == "running" for node in job.tree()) == SLOTS)
    return job


def yields(job: Job) -> int:
    return sum(node.state == "cut" and node.why == "more urgent work waits for a slot" for node in job.tree())


def test_critical_work_starts_within_an_item_while_every_slot_runs_long_nodes(
    own: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    low = busy(own, 2000)
    started = []

    for _ in range(SUBMISSIONS):
        wait_until(lambda: sum(node.state == "running" for node in low.tree()) == SLOTS)
        asked = time.time()
        [began] = own.submit(operation="stamp", items=[0], priority="critical").get(timeout=30)
        started.append(began - asked)

    late = sorted(started)
    with capsys.disabled():
        print(f"\ncritical starts: p50 {late[49]:.3f} s, p95 {late[94]:.3f} s, p99 {late[98]:.3f} s, max {late[99]:.3f} s")
    assert late[98] <= ITEM_S + 0.5
    assert SUBMISSIONS * 0.9 <= yields(low) <= SUBMISSIONS
    low.cancel()
