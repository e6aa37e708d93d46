"""Parked nodes survive kills of processes and of Redis, end with their job, and wake in turn."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from resilience.breaker_storage import BreakerConfig
from resilience.bulkhead import Bulkhead
from resilience.store import guard_store
from rlm_tasks import Binary, Job, Status
from rlm_tasks.testing import embedded
from tests.faults import waiting_ops
from tests.faults.conftest import Cell, cell, name_of
from tests.faults.test_redis import restart
from tests.support import wait_until

MODULES = f"tests.integration.ops,tests.faults.ops,{waiting_ops.__name__}"


def _with_operations(own: Cell) -> Cell:
    own.environment["RLM_OPERATIONS"] = MODULES
    own.environment["RLM_GUARD_TIMEOUT_S"] = "1"  # a delay on a busy machine is no outage
    return own


@pytest.fixture
def waiting(
    server: embedded.Server, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Cell]:
    """A cell on the shared server, with the operations of `waiting_ops`."""
    with cell(server, name_of(request), tmp_path, tmp_path / "worker.log") as own:
        yield _with_operations(own)


def submit(
    own: Cell, operation: str, items: Any, *, params: dict[str, Any] | None = None, **fields: Any
) -> Job:
    """Submit a job with the cell's folder among its parameters."""
    return own.client.submit(
        operation=operation,
        items=items,
        params={"folder": str(own.folder), **(params or {})},
        **fields,
    )


def parked(job: Job) -> int:
    """Return the number of parked nodes."""
    return sum(node.state == "parked" for node in job.tree())


def all_parked(job: Job, at_least: int = 1) -> bool:
    """Return whether at least `at_least` nodes are parked, and none runs or is queued."""
    states = Counter(node.state for node in job.tree())
    return states["parked"] >= at_least and not states["running"] and not states["queued"]


def noted_events(own: Cell) -> list[tuple[str, int, int]]:
    """Return the events that operations noted, in order: event, index, process."""
    file = own.folder / "events"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(event, int(index), int(pid)) for event, index, pid in map(str.split, lines)]


def no_permit_is_held(own: Cell, service: str) -> bool:
    """Return whether all permits of a bulkhead are free."""
    return Bulkhead(service, guard_store(own.client.settings)).status()["used"] == 0


# --- kills ------------------------------------------------------------------------------------


def _kill_a_pool_process(own: Cell, random: Random) -> None:
    pids = [
        child.pid
        for worker in own.workers
        if worker.poll() is None
        for child in psutil.Process(worker.pid).children()
    ]
    if pids:
        os.kill(random.choice(pids), signal.SIGKILL)


def _kill_a_worker(own: Cell, random: Random) -> None:
    alive = [worker for worker in own.workers if worker.poll() is None]
    os.killpg(random.choice(alive).pid, signal.SIGKILL)
    own.worker()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_guarded_job_is_exact_after_kills(waiting: Cell, seed: int) -> None:
    random, n = Random(seed), 240
    for _ in range(2):
        waiting.worker()
    job = submit(waiting, "w_flaky", range(n), params={"ms": 8}, chunk_size=6)
    for step, kill in enumerate(
        [_kill_a_pool_process, _kill_a_worker, _kill_a_pool_process, _kill_a_worker], 1
    ):
        wait_until(lambda step=step: len(waiting.journal(job)) > step * n // 6)
        kill(waiting, random)

    waiting.check(job, within_s=60)

    runs = Counter(waiting.journal(job))
    assert all(runs[index] >= 3 for index in range(0, n, 10)), "two failures and a success each"


# --- Redis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["w_gate", "w_gate_guarded"])
def test_parked_nodes_wake_after_redis_was_killed(
    durable: embedded.Server, on_durable: Cell, operation: str
) -> None:
    own = _with_operations(on_durable)
    (own.folder / "shut").touch()
    worker = own.worker()
    job = submit(own, operation, range(40), params={"wait_s": 1.5}, chunk_size=4)
    wait_until(lambda: all_parked(job, 10))
    restart(durable)
    (own.folder / "shut").unlink()

    own.check(job)

    assert sorted(own.journal(job)) == list(range(40)), "no item ran twice"
    assert worker.poll() is None


# --- the end of a job whose nodes wait --------------------------------------------------------


def test_a_cancelled_job_that_only_waits_ends_at_once(waiting: Cell) -> None:
    (waiting.folder / "shut").touch()
    waiting.worker()
    job = submit(waiting, "w_gate_guarded", range(60), params={"wait_s": 60}, chunk_size=2)
    wait_until(lambda: all_parked(job, 30))

    began = time.monotonic()
    job.cancel()
    assert job.wait(timeout=5) == Status.CANCELLED

    assert time.monotonic() - began < 1.0
    assert parked(job) == 0
    waiting.check_keys(job)


def test_a_job_that_only_waits_expires_at_its_deadline(waiting: Cell) -> None:
    (waiting.folder / "shut").touch()
    waiting.worker()
    job = submit(waiting, "w_gate", range(60), params={"wait_s": 60}, chunk_size=2, timeout=2.0)
    began = time.monotonic()
    wait_until(lambda: all_parked(job, 30))
    facts = waiting.client.ledger.facts(job.id)

    wait_until(lambda: waiting.client.ledger.facts(job.id)["state"] == "expired", 10)

    late_ms = int(waiting.client.ledger.facts(job.id)["closed_ms"]) - int(facts["deadline"])
    assert 0 <= late_ms < 1000, time.monotonic() - began
    assert parked(job) == 0
    waiting.check_keys(job)


def test_the_turn_of_a_cancelled_job_goes_to_the_next_waiter(waiting: Cell) -> None:
    (waiting.folder / "hold").touch()
    waiting.worker(options=["-c", "2"])
    holder = submit(waiting, "w_narrow", [0])
    wait_until((waiting.folder / "first").exists)
    cancelled, next_one = (submit(waiting, "w_narrow", range(3)) for _ in range(2))
    wait_until(lambda: all_parked(cancelled) and all_parked(next_one))
    cancelled.cancel()

    began = time.monotonic()
    (waiting.folder / "hold").unlink()

    assert holder.get(timeout=10) == [0]
    assert next_one.get(timeout=20) == [0, 1, 2]
    assert time.monotonic() - began < 3.0, "no node has waited for the lease of 60 s"


# --- permits ----------------------------------------------------------------------------------


def test_the_permit_of_a_killed_process_goes_to_the_next_waiter(waiting: Cell) -> None:
    (waiting.folder / "hold").touch()
    waiting.worker(options=["-c", "2"])
    holder = submit(waiting, "w_narrow", [0])
    wait_until((waiting.folder / "pid").exists)
    wait_until(lambda: (waiting.folder / "pid").read_text() != "")
    waits = submit(waiting, "w_narrow", range(5))
    wait_until(lambda: all_parked(waits))

    began = time.monotonic()
    os.kill(int((waiting.folder / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: len(waiting.journal(waits)) > 0)

    assert time.monotonic() - began < 2.5
    assert (holder.get(timeout=20), waits.get(timeout=20)) == ([0], list(range(5)))
    wait_until(lambda: no_permit_is_held(waiting, "w_narrow"))


def test_async_items_behind_a_narrow_bulkhead_wait_for_permits_not_leases(
    waiting: Cell,
) -> None:
    waiting.worker(options=["-c", "2"])
    jobs = [submit(waiting, "w_narrow_async", range(45), type="sequential") for _ in range(2)]

    for job in jobs:
        waiting.check(job, within_s=15)  # 90 calls of 20 ms, three at a time, take 0.6 s

    assert no_permit_is_held(waiting, "w_narrow_async")


def test_retried_items_wait_for_permits_not_leases(waiting: Cell) -> None:
    waiting.worker(options=["-c", "2"])
    jobs = [submit(waiting, "w_narrow_flaky", range(8), type="sequential") for _ in range(2)]

    for job in jobs:
        waiting.check(job, within_s=15)  # 32 calls of 10 ms, one at a time

    assert no_permit_is_held(waiting, "w_narrow_flaky")


# --- drains -----------------------------------------------------------------------------------


def _drained(own: Cell) -> float:
    began = time.monotonic()
    own.workers[-1].send_signal(signal.SIGTERM)
    assert own.workers[-1].wait(10) == 0
    return time.monotonic() - began


def test_a_worker_with_parked_nodes_ends_within_two_seconds(waiting: Cell) -> None:
    (waiting.folder / "shut").touch()
    waiting.worker()
    job = submit(waiting, "w_gate_guarded", range(60), params={"wait_s": 0.5}, chunk_size=3)
    wait_until(lambda: parked(job) >= 15)

    assert _drained(waiting) < 2.0

    (waiting.folder / "shut").unlink()
    waiting.worker()
    waiting.check(job)
    assert sorted(waiting.journal(job)) == list(range(60))


def test_a_worker_with_waiting_async_items_ends_within_two_seconds(
    waiting: Cell,
) -> None:
    waiting.worker()
    job = submit(
        waiting,
        "w_sleepers",
        range(40),
        params={"wait_s": 1.5},
        strategy=Binary(min_chunk_size=40),
        continue_on_error=True,
    )
    wait_until(lambda: {5, 25} <= set(waiting.journal(job)))

    assert _drained(waiting) < 2.0

    waiting.worker()
    result = job.result(timeout=30)
    assert result.output == [index for index in range(40) if index != 25]
    assert [failure.index for failure in result.failed] == [25]
    runs = Counter(waiting.journal(job))
    assert max(runs.values()) <= 4, runs
    waiting.check_keys(job)


# --- many in flight ---------------------------------------------------------------------------


def _most_in_flight(events: list[tuple[str, int, int]]) -> int:
    most, now = 0, Counter[int]()
    for event, _, pid in events:
        now[pid] += 1 if event == "begin" else -1
        most = max(most, now[pid])
    return most


def test_async_items_succeed_once_while_others_wait(waiting: Cell) -> None:
    waiting.worker(options=["-c", "1"])
    job = submit(waiting, "w_many", range(200), type="sequential")
    wait_until(lambda: len(noted_events(waiting)) > 120)
    (waiting.folder / "down").touch()
    breaker = waiting.client.breakers.get("w-many")
    wait_until(lambda: breaker.state == "open")
    (waiting.folder / "down").unlink()

    waiting.check(job)

    events = noted_events(waiting)
    assert _most_in_flight(events) in range(2, 21)
    twice = {
        index: count
        for index, count in Counter(index for event, index, _ in events if event == "ok").items()
        if count > 1
    }
    assert twice == {}, "an item that has succeeded does not run again"
    log = waiting.log.read_text()
    assert "never retrieved" not in log
    assert "was destroyed" not in log


@pytest.mark.parametrize("kind", ["sequential", "recursive"])
def test_items_done_behind_a_waiting_item_do_not_run_again(waiting: Cell, kind: str) -> None:
    waiting.worker(options=["-c", "2"])
    job = submit(waiting, "w_sleepers", range(25), params={"wait_s": 1.5}, type=kind)

    waiting.check(job)

    assert {
        index: count for index, count in Counter(waiting.journal(job)).items() if count > 1
    } == {5: 2}


# --- execution types --------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"type": "sequential"},
    "chunks": {"chunk_size": 7},
    "at the depth limit": {"strategy": Binary(min_chunk_size=10, max_depth=1)},
    "validated": {"type": "sequential", "conditions": {"validate_before_process": True}},
}


@pytest.mark.parametrize("operation", ["w_flaky", "w_flaky_batch"])
def test_waiting_and_retried_items_stay_in_order(waiting: Cell, operation: str) -> None:
    waiting.worker()
    jobs = {way: submit(waiting, operation, range(80), **fields) for way, fields in WAYS.items()}

    for way, job in jobs.items():
        result = job.result(timeout=30)
        assert (result.output, result.done) == (list(range(80)), 80), way
        assert operation != "w_flaky" or Counter(waiting.journal(job)) == Counter(
            {i: 1 if i % 10 else 3 for i in range(80)}
        ), way
        waiting.check_keys(job)


# --- a user's own guards ----------------------------------------------------------------------


def test_a_users_own_guards_park_the_job_until_they_allow(waiting: Cell) -> None:
    waiting.worker()
    breaker = waiting.client.breakers.get("own", BreakerConfig(recovery_timeout_s=1))
    breaker.open()
    began = time.monotonic()
    job = submit(waiting, "w_own_guards", range(40), chunk_size=5)
    wait_until(lambda: all_parked(job, 8))
    assert "circuit is open" in job.explain()

    waiting.check(job)

    assert time.monotonic() - began > 1.0 + 20 / 40
    assert sorted(waiting.journal(job)) == list(range(40)), "a refused item does not run"
