"""Workers of two releases share running jobs.

A message that is too new for a worker goes back to its queue unchanged."""

from __future__ import annotations

import json
import subprocess

import msgspec

from rlm_tasks import Job, JobRequest, NWay
from rlm_tasks.jobs.spec import SCHEMA
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell
from tests.support import wait_until


def submit_as(own: Cell, schema: int, items: int = 400) -> Job:
    """Submit a job as a client with this schema number does."""
    request = JobRequest(
        operation="journalled",
        items=range(items),
        params={"ms": 2, "journal": str(own.folder / "journal")},
        strategy=NWay(split_factor=4, min_chunk_size=10),
    )
    submission = own.client._submission
    spec, staged = submission.store_items(request)
    [id] = submission.start([(msgspec.structs.replace(spec, schema=schema), staged)])
    return own.client.job(id)


def older(own: Cell) -> subprocess.Popen[bytes]:
    """Start a worker of the previous schema."""
    return own.stack.enter_context(
        embedded.worker(
            own.environment,
            log=own.folder / "older.log",
            app="tests.faults.older",
            options=["-n", "older@test"],
        )
    )


def test_workers_of_two_schemas_share_a_job(on_shared: Cell) -> None:
    older(on_shared)
    on_shared.worker()
    job = submit_as(on_shared, SCHEMA - 1)

    on_shared.check(job)
    assert {node.worker for node in job.tree() if node.worker} == {"older@test", "w0@test"}


def test_a_message_of_a_newer_schema_goes_back_untouched(on_shared: Cell) -> None:
    older(on_shared)
    job = submit_as(on_shared, SCHEMA)
    log = on_shared.folder / "older.log"
    message = "go back to their queue untouched: jobs of schema"
    wait_until(lambda: message in log.read_text())
    untouched = on_shared.client.ledger.store.client.hget(
        on_shared.client.ledger.keys.of(job.id).nodes, "root"
    )
    assert json.loads(untouched)["e"] == 0, "no worker has claimed it"
    assert submit_as(on_shared, SCHEMA - 1).result(timeout=20).done == 400, (
        "it goes on with messages that it can read"
    )

    on_shared.worker()
    on_shared.check(job)
    assert {node.worker for node in job.tree() if node.worker} == {"w0@test"}
    # Each of its two processes logs it once.
    assert 1 <= log.read_text().count(message) <= 2


def test_a_job_waits_for_a_worker_with_its_operations_version(
    on_shared: Cell,
) -> None:
    environment = {**on_shared.environment, "TEST_VERSION": "1"}
    log = on_shared.folder / "older.log"
    on_shared.stack.enter_context(
        embedded.worker(environment, log=log, options=["-n", "older@test"])
    )
    old = on_shared.client.submit(operation="versioned", items=range(10))
    new = JobRequest(
        operation="versioned", items=range(100), strategy=NWay(split_factor=4, min_chunk_size=10)
    )
    submission = on_shared.client._submission
    spec, staged = submission.store_items(new)
    [id] = submission.start([(msgspec.structs.replace(spec, version=2), staged)])
    job = on_shared.client.job(id)
    assert old.get(timeout=20) == [1] * 10
    wait_until(lambda: "version 2 of operation 'versioned'; this worker has 1" in log.read_text())
    assert job.tree()[0].attempts == 0

    environment = {**on_shared.environment, "TEST_VERSION": "2"}
    on_shared.stack.enter_context(
        embedded.worker(
            environment, log=on_shared.folder / "newer.log", options=["-n", "newer@test"]
        )
    )
    assert job.get(timeout=30) == [2] * 100
    assert {node.worker for node in job.tree() if node.worker} == {"newer@test"}
