"""Workers of two releases share jobs in flight; what is too new for one goes back to its queue as
it came.
"""

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
    """Open a job as a client of a schema does."""
    request = JobRequest(
        operation="journalled",
        items=range(items),
        params={"ms": 2, "journal": str(own.folder / "journal")},
        strategy=NWay(split_factor=4, min_chunk_size=10),
    )
    spec, staged = own.client.session.stored(request)
    [job] = own.client._start([(msgspec.structs.replace(spec, schema=schema), staged)])
    return job


def older(own: Cell) -> subprocess.Popen[bytes]:
    """A worker of the previous schema."""
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
    said = "go back to their queue untouched: jobs of schema"
    wait_until(lambda: said in log.read_text())
    untouched = on_shared.client.ledger.store.client.hget(
        on_shared.client.ledger.keys.of(job.id).nodes, "root"
    )
    assert json.loads(untouched)["e"] == 0, "nobody has claimed it"
    assert submit_as(on_shared, SCHEMA - 1).result(timeout=20).done == 400, (
        "what it can read, it goes on with"
    )

    on_shared.worker()
    on_shared.check(job)
    assert {node.worker for node in job.tree() if node.worker} == {"w0@test"}
    # Once by each of its two processes.
    assert 1 <= log.read_text().count(said) <= 2


def test_a_job_of_a_newer_version_of_an_operation_waits_for_a_worker_that_has_it(
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
    spec, staged = on_shared.client.session.stored(new)
    [job] = on_shared.client._start([(msgspec.structs.replace(spec, version=2), staged)])
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
