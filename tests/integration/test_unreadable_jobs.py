"""A job whose specification this release cannot read hides no other job."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from rlm_tasks import Client, Job
from rlm_tasks.errors import JobUnreadable
from rlm_tasks.flower import pages
from rlm_tasks.jobs.spec import UNREADABLE
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.integration.test_cli import rlm

BROKEN = b'{"job":"x","operation":"sum","emits":{"shop.a":null}}'


def broken(client: Client, **fields: bytes) -> Job:
    """Return a job whose record in Redis has these fields."""
    job = client.submit(operation="sum", items=range(7), description="to be broken")
    client.ledger.store.client.hset(client.ledger.keys.of(job.id).job, mapping=fields)
    return job


def test_lists_show_it_beside_all_others(server: embedded.Server) -> None:
    environment = environment_of(server.url, "unreadable")
    with client_of(environment) as client:
        good = client.submit(operation="sum", items=range(3))
        bad = broken(client, spec=BROKEN)
        gone = broken(client, n=b"", state=b"a later state")
        newest = client.submit(operation="sum", items=range(3))

        listed = client.listed()
        shown = [(spec.job, spec.operation, spec.priority, at.total) for spec, at in listed]
        assert shown == [
            (newest.id, "sum", "normal", 3),
            (bad.id, UNREADABLE, "normal", 7),
            (good.id, "sum", "normal", 3),
        ]
        assert "JobUnreadable" not in listed[1][0].description
        page = json.dumps(pages.jobs(client).to_dict())
        assert all(job.id in page for job in (good, bad, newest))
        assert gone.id not in page
        printed = rlm(environment, "jobs", "--json")
        assert printed.returncode == 0, printed.stderr
        assert [each["operation"] for each in json.loads(printed.stdout)] == [
            "sum",
            UNREADABLE,
            "sum",
        ]


READS: list[Callable[[Job], Any]] = [
    lambda job: job.result(timeout=5),
    lambda job: job.get(timeout=5),
    lambda job: job.partial(),
    lambda job: list(job.outputs()),
    lambda job: job.retry_failed(),
    lambda job: job.spent(),
    lambda job: job.trace_id,
]


@pytest.mark.parametrize("spec", [BROKEN, b"", b"\xff\x00", b"[]"])
def test_each_method_that_needs_it_names_the_job(
    client_without_worker: Client, spec: bytes
) -> None:
    job = broken(client_without_worker, spec=spec or b"{")

    assert job.cancel() == "cancelled"
    assert job.status == "cancelled"
    assert job.progress().total == 7
    assert job.explain()
    for read in READS:
        with pytest.raises(JobUnreadable, match=f"specification of job {job.id} cannot be read"):
            read(job)
