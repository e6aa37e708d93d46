"""Each kind of death at each crash point.

The answer is exact, every index counts once, the job has one final result, and no key is left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

import psutil
import pytest

from rlm_tasks.client.job import Job
from rlm_tasks.engine.crashpoints import CrashPoint
from tests.faults.conftest import LEASE_S, SWEEP_S, Cell
from tests.support import wait_until

# The lease, the sweep and the grace (one sweep by default) limit the recovery time.  The other 4 s
# are for the start of a new worker and for the job.
BOUND_S = LEASE_S + 2 * SWEEP_S + 4.0
NTH = {CrashPoint.BEFORE_CLAIM: 3, CrashPoint.AFTER_CLAIM: 3, CrashPoint.BEFORE_FINISH: 3}
"""At these points the third node dies, not the root, which every job passes first."""
points = pytest.mark.parametrize(
    "point", list(CrashPoint), ids=lambda point: point.replace(" ", "-")
)


def faulted(
    cell: Cell, point: CrashPoint, action: str, options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a worker with a fault at the point."""
    return cell.worker(fault=(point, action), nth=NTH.get(point, 1), options=options)


def submitted(cell: Cell, point: CrashPoint) -> Job:
    """Submit the job; for the point between two slices, with nodes longer than one slice."""
    return cell.submit(ms=8.0 if point == CrashPoint.MID_SLICE else 2.0)


@points
def test_a_pool_process_is_killed(on_shared: Cell, point: CrashPoint) -> None:
    faulted(on_shared, point, "kill_process")
    job = submitted(on_shared, point)

    assert (
        on_shared.check(
            job, since=on_shared.wait_for_fault(), what="SIGKILL of a pool process", point=point
        )
        < 6.0
    )


@points
def test_a_process_runs_out_of_memory_outside_of_items(on_shared: Cell, point: CrashPoint) -> None:
    faulted(on_shared, point, "starve")
    job = submitted(on_shared, point)

    assert (
        on_shared.check(
            job, since=on_shared.wait_for_fault(), what="MemoryError outside of items", point=point
        )
        < BOUND_S
    )


@points
def test_a_whole_worker_is_killed(on_shared: Cell, point: CrashPoint) -> None:
    worker = faulted(on_shared, point, "kill_worker")
    job = submitted(on_shared, point)
    since = on_shared.wait_for_fault()
    worker.wait(5)
    on_shared.worker()

    assert (
        on_shared.check(job, since=since, what="SIGKILL of the only worker", point=point) < BOUND_S
    )


@points
def test_a_worker_is_suspended_for_longer_than_its_lease(
    on_shared: Cell, point: CrashPoint
) -> None:
    worker = psutil.Process(faulted(on_shared, point, "stop_worker").pid)
    job = submitted(on_shared, point)
    since = on_shared.wait_for_fault()
    processes = [worker, *worker.children()]
    wait_until(lambda: all(each.status() == psutil.STATUS_STOPPED for each in processes))
    on_shared.worker()

    took = on_shared.check(
        job, since=since, what="SIGSTOP of a worker beyond its lease", point=point
    )
    before = on_shared.client.ledger.facts(job.id)
    for each in processes:
        os.kill(each.pid, signal.SIGCONT)

    assert took < BOUND_S
    again = on_shared.submit()
    on_shared.check(again)
    wait_until(lambda: not any(held for held in on_shared.client.jobs() if not held.ready()))
    assert on_shared.client.ledger.facts(job.id) == before, (
        "a finish from the stale holder is ignored"
    )
    assert worker.is_running()


@points
@pytest.mark.parametrize("action", ["term_worker", "term_group"])
def test_a_worker_gets_sigterm(on_shared: Cell, point: CrashPoint, action: str) -> None:
    worker = faulted(on_shared, point, action)
    job = submitted(on_shared, point)
    since = on_shared.wait_for_fault()
    assert worker.wait(5) == 0
    on_shared.worker()

    what = (
        "SIGTERM to the main process" if action == "term_worker" else "SIGTERM to the process group"
    )
    took = on_shared.check(job, since=since, what=what, point=point)

    assert took < BOUND_S
    ran = on_shared.journal(job)
    assert len(ran) == len(set(ran)), "no item runs again"


@points
def test_a_process_runs_into_the_hard_time_limit(on_shared: Cell, point: CrashPoint) -> None:
    faulted(on_shared, point, "exceed", options=["--time-limit", "2"])
    job = submitted(on_shared, point)

    on_shared.check(
        job, since=on_shared.wait_for_fault(), what="hard time limit of 2 s", point=point
    )
