"""Preemption survives kills of processes and of Redis, on both sides.

The low-priority node yields its slot; the critical job gets it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlm_tasks import Adaptive, Job
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell, cell, name_of
from tests.faults.test_redis import restart
from tests.integration import preempted_ops
from tests.support import wait_until

MODULES = f"tests.integration.ops,tests.faults.ops,{preempted_ops.__name__}"
LONG = {
    "RLM_NODE__TARGET_MS": "60000",
    "RLM_PRESSURE__ENABLED": "0",  # a busy machine would run fewer nodes than there are slots
}
PREEMPTED = "more urgent work waits for a slot"
SOON_S = 10.0
"""A lease and a sweep, or Celery's 5 s to notice a death, plus the delay of a busy machine.

A low-priority node would run for a minute.
"""


@pytest.fixture
def shared_cell(
    server: embedded.Server, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Cell]:
    """A cell on the shared server, with the operations of the preemption tests."""
    with cell(server, name_of(request), tmp_path, tmp_path / "worker.log", **LONG) as own:
        own.environment |= {"RLM_OPERATIONS": MODULES}
        yield own


@pytest.fixture
def durable_cell(
    durable: embedded.Server, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Cell]:
    """The same cell on the durable server."""
    with cell(durable, name_of(request), tmp_path, tmp_path / "worker.log", **LONG) as own:
        own.environment |= {"RLM_OPERATIONS": MODULES}
        yield own


def submit(own: Cell, items: int, priority: str, *, s: float = 0.02, **fields: Any) -> Job:
    """Submit a job whose items take `s` seconds each, until `enough` is called."""
    params = {"s": s, "journal": str(own.folder / "journal"), "enough": str(own.folder / "enough")}
    return own.client.submit(
        operation="p_until_enough", items=range(items), params=params, priority=priority, **fields
    )


def enough(own: Cell) -> None:
    """Let the remaining items of all jobs end at once."""
    (own.folder / "enough").touch()


def running(job: Job, worker: str = "") -> int:
    return sum(node.state == "running" and node.worker.startswith(worker) for node in job.tree())


def one_on_each_slot(own: Cell, slots: int = 2) -> list[Job]:
    """Fill the slots with jobs of one node each; the node that yields finishes first."""
    jobs = [submit(own, 5000, "low", type="sequential") for _ in range(slots)]
    wait_until(lambda: sum(running(job) for job in jobs) == slots)
    return jobs


def over_all_slots(own: Cell, slots: int = 2, s: float = 0.02) -> Job:
    """Fill the slots with one job whose nodes would run for a minute each."""
    job = submit(own, 12_000, "low", s=s, strategy=Adaptive())
    wait_until(lambda: running(job) == slots)
    return job


def yields(job: Job) -> int:
    return sum(node.state == "cut" and node.why == PREEMPTED for node in job.tree())


def repeated(own: Cell, job: Job) -> int:
    """Return the number of repeated item runs."""
    return sum(times - 1 for times in Counter(own.journal(job)).values())


def tokens(own: Cell) -> tuple[str, str]:
    """Return the keys of the critical nodes that wait for a slot."""
    return own.client.ledger.keys.preemption(f"{own.client.settings.namespace}.critical")


def no_node_waits_for_a_slot(own: Cell) -> bool:
    return own.client.ledger.store.client.exists(*tokens(own)) == 0


# --- kills ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [CrashPoint.BEFORE_FINISH, CrashPoint.BEFORE_PUBLISH])
@pytest.mark.parametrize("action", ["kill_process", "kill_worker"])
def test_critical_work_starts_when_the_process_that_yields_is_killed(
    shared_cell: Cell, point: CrashPoint, action: str
) -> None:
    shared_cell.worker(fault=(point, action))
    lows = one_on_each_slot(shared_cell)
    critical = submit(shared_cell, 1, "critical")

    since = shared_cell.wait_for_fault()
    if action == "kill_worker":
        shared_cell.worker()
    shared_cell.check(
        critical, since=since, what=f"{action} during a yield", point=point, within_s=SOON_S
    )

    wait_until(lambda: no_node_waits_for_a_slot(shared_cell))
    enough(shared_cell)
    for low in lows:
        shared_cell.check(low)


def test_a_kill_during_a_yield_repeats_only_that_nodes_items(
    shared_cell: Cell,
) -> None:
    shared_cell.worker(fault=(CrashPoint.BEFORE_FINISH, "kill_process"))
    lows = one_on_each_slot(shared_cell)
    for _ in range(6):
        wait_until(lambda: sum(running(low) for low in lows) == 2)
        submit(shared_cell, 1, "critical").result(timeout=SOON_S)

    assert sum(yields(low) for low in lows) == 5, "the sixth slot came from the death"
    enough(shared_cell)
    for low in lows:
        shared_cell.check(low)
    assert min(repeated(shared_cell, low) for low in lows) == 0, "the other job repeats nothing"


def test_critical_work_of_a_killed_worker_preempts_on_another(shared_cell: Cell) -> None:
    shared_cell.worker(options=["-n", "first@test"])
    low = over_all_slots(shared_cell)
    critical = submit(shared_cell, 60, "critical", s=0.1, type="sequential")
    wait_until(lambda: running(critical) == 1)
    assert yields(low) == 1
    shared_cell.worker(options=["-n", "second@test"])
    wait_until(lambda: running(low, "second") == 2)

    os.killpg(shared_cell.workers[0].pid, signal.SIGKILL)
    since = time.time()

    wait_until(lambda: running(critical, "second") == 1, SOON_S)
    assert yields(low) == 2
    enough(shared_cell)
    shared_cell.check(
        critical, since=since, what="kill -9 of a worker with critical work, others busy"
    )
    shared_cell.check(low)
    assert no_node_waits_for_a_slot(shared_cell)


def test_critical_work_of_a_killed_process_gets_a_slot_again(shared_cell: Cell) -> None:
    # The first finish is the yield, the second that of the critical node.
    shared_cell.worker(fault=(CrashPoint.BEFORE_FINISH, "kill_process"), nth=2)
    lows = one_on_each_slot(shared_cell)

    critical = submit(shared_cell, 1, "critical")
    since = shared_cell.wait_for_fault()
    shared_cell.check(
        critical, since=since, what="SIGKILL of critical work, others busy", within_s=SOON_S
    )

    assert sum(yields(low) for low in lows) <= 2, "one for each message of the critical node"
    enough(shared_cell)
    for low in lows:
        shared_cell.check(low)
        assert repeated(shared_cell, low) == 0


# --- Redis ------------------------------------------------------------------------------------


def test_critical_work_preempts_after_redis_was_killed(
    durable: embedded.Server, durable_cell: Cell
) -> None:
    own = durable_cell
    worker = own.worker()
    low = over_all_slots(own)
    critical = [submit(own, 1, "critical") for _ in range(3)]
    since = time.time()
    restart(durable)

    for job in critical:
        own.check(
            job, since=since, what="kill -9 of Redis while critical work waits", within_s=SOON_S
        )

    assert worker.poll() is None
    enough(own)
    own.check(low)
    wait_until(lambda: no_node_waits_for_a_slot(own))


def test_critical_work_preempts_although_its_waiting_keys_were_deleted(shared_cell: Cell) -> None:
    shared_cell.worker()
    low = over_all_slots(shared_cell, s=0.5)

    critical = submit(shared_cell, 1, "critical")
    assert shared_cell.client.ledger.store.client.delete(*tokens(shared_cell)), (
        "before the end of an item"
    )

    shared_cell.check(critical, within_s=SOON_S)
    enough(shared_cell)
    shared_cell.check(low)
    assert repeated(shared_cell, low) == 0
