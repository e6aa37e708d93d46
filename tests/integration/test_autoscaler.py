"""A real pool of one to four processes grows with work, and shrinks when idle or under pressure.

It ends no process that runs a node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlm_tasks import Client
from rlm_tasks.client.job import Job
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

MOST, LEAST = 4, 1


@dataclass
class Pool:
    """A worker, and the client whose jobs it runs."""

    client: Client
    process: psutil.Process
    log: Path

    @property
    def size(self) -> int:
        return len(self.process.children())

    def drill(self, level: str) -> None:
        """Force a level, and wait until the worker has logged it."""
        if self.logged_level() != level:
            self.client.pressure.force(level)
            wait_until(lambda: self.logged_level() == level)

    def logged_level(self) -> str:
        """Return the level that the worker has logged last."""
        _, _, found = self.log.read_text().rpartition("Pressure is ")
        return found.splitlines()[0].partition(":")[0] if found else ""

    def wait_for(self, size: int) -> None:
        wait_until(lambda: self.size == size)

    def naps(self, count: int, milliseconds: float) -> Job:
        return self.client.submit(
            operation="nap",
            items=[milliseconds] * count,
            type="parallel",
            chunk_size=1,
            priority="critical",
        )

    def stats(self) -> dict[str, Any]:
        [host] = self.client.status().hosts
        inspect = self.client.app.control.inspect(destination=[host.worker], timeout=10)
        return dict(inspect.stats()[host.worker])


@pytest.fixture(scope="module")
def shared(server: embedded.Server, logs: Path) -> Iterator[Pool]:
    """The module's worker."""
    environment, log = (
        environment_of(server.url, "autoscaled", pressed=True),
        logs / "autoscaled.log",
    )
    options, app = [f"--autoscale={MOST},{LEAST}"], "tests.integration.autoscaled_app:app"
    with (
        client_of(environment) as client,
        embedded.worker(environment, log=log, app=app, options=options) as worker,
    ):
        pool = Pool(client, psutil.Process(worker.pid), log)
        pool.drill("high")  # the worker logs "normal" only after another level
        yield pool


@pytest.fixture
def pool(shared: Pool) -> Iterator[Pool]:
    """The same worker at normal level and idle; its log must not report a killed process."""
    shared.drill("normal")
    shared.wait_for(LEAST)
    yield shared
    log = shared.log.read_text()
    assert not [
        text for text in ("Traceback", "WorkerLost", "died of", "exited with") if text in log
    ]


def test_a_pool_grows_while_messages_wait_and_shrinks_when_idle(pool: Pool) -> None:
    job = pool.naps(40, 200)
    pool.wait_for(MOST)

    assert job.result(timeout=30).output == [200.0] * 40
    pool.wait_for(LEAST)
    assert pool.stats()["pool"]["processes"] == [pool.process.children()[0].pid]


def test_a_pool_grows_for_a_job_that_splits_for_free_slots(pool: Pool) -> None:
    job = pool.client.submit(operation="nap", items=[50.0] * 200)
    pool.wait_for(MOST)

    assert job.result(timeout=30).output == [50.0] * 200


def test_at_high_pressure_a_pool_stays_small_and_prefetches_less(pool: Pool) -> None:
    pool.drill("high")
    job = pool.naps(100, 100)
    sizes = set()
    while job.progress().done < 20:
        sizes.add(pool.size)

    assert sizes == {LEAST}
    assert pool.stats()["prefetch_count"] == LEAST
    pool.drill("normal")
    pool.wait_for(MOST)
    assert pool.stats()["prefetch_count"] == MOST
    assert job.result(timeout=30).output == [100.0] * 100


def test_a_shrinking_pool_ends_no_busy_process(pool: Pool) -> None:
    seen = set()
    job = pool.naps(1500, 20)
    for _ in range(2):
        pool.wait_for(MOST)
        seen |= {child.pid for child in pool.process.children()}
        pool.drill("critical")
        pool.wait_for(LEAST)
        pool.drill("normal")

    assert job.result(timeout=60).output == [20.0] * 1500
    assert len(seen) > MOST, "it has grown again"


def test_in_an_emergency_processes_end_after_their_node(pool: Pool) -> None:
    job = pool.naps(4, 8000)
    pool.wait_for(MOST)
    wait_until(lambda: pool.client.status().active == {"nap": MOST})
    pool.drill("emergency")
    busy = pool.size
    pool.wait_for(LEAST)

    assert busy == MOST
    assert job.result(timeout=40).output == [8000.0] * 4


def test_the_bounds_can_change_while_the_pool_runs(pool: Pool) -> None:
    control = pool.client.app.control
    control.autoscale(3, 2)
    pool.wait_for(2)
    job = pool.naps(60, 100)
    pool.wait_for(3)

    assert job.result(timeout=30).output == [100.0] * 60
    control.autoscale(MOST, LEAST)
    pool.wait_for(LEAST)
