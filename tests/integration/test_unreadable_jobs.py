"""A job whose specification this release cannot read hides no other job."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from resilience.keys import JobKeys
from rlm_tasks import Client, Job
from rlm_tasks.errors import JobUnreadable, RlmError
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


CALLS: dict[str, Callable[[Client, Job], Any]] = {
    "status": lambda _, job: job.status,
    "progress": lambda _, job: job.progress(),
    "explain": lambda _, job: job.explain(),
    "tree": lambda _, job: list(job.tree()),
    "events": lambda _, job: job.events(),
    "failures": lambda _, job: job.failures(),
    "receipt": lambda _, job: job.receipt(),
    "rounds": lambda _, job: job.rounds(),
    "result": lambda _, job: job.result(timeout=0.05),
    "partial": lambda _, job: job.partial(),
    "outputs": lambda _, job: list(job.outputs()),
    "retry_failed": lambda _, job: job.retry_failed(),
    "page": lambda client, job: pages.job(client, job.id),
    "listed": lambda client, _: client.listed(),
    "at_work": lambda client, _: client.at_work(),
    "health": lambda client, _: client.health_check(detailed=True),
    "status of all": lambda client, _: client.status(),
    "jobs page": lambda client, _: pages.jobs(client).to_dict(),
    "submit": lambda client, _: client.submit(operation="sum", items=range(2)).cancel(),
    "cancel": lambda _, job: job.cancel(),
}
OF_ALL = {"listed", "at_work", "health", "status of all", "jobs page", "submit"}
DAMAGES: dict[str, Callable[[Any, JobKeys], Any]] = {
    "another type": lambda r, keys: (r.delete(keys.job), r.rpush(keys.job, "x")),
    "no state": lambda r, keys: r.hdel(keys.job, "state"),
    "no queue": lambda r, keys: r.hdel(keys.job, "queue"),
    "a state of a later release": lambda r, keys: r.hset(keys.job, "state", "sleeping"),
    "a count that is no number": lambda r, keys: r.hset(keys.job, "nodes", "1e400"),
    "a number of 5,000 digits": lambda r, keys: r.hset(keys.job, "done", "9" * 5000),
    "an error that is no JSON": lambda r, keys: r.hset(keys.job, "error", "{"),
    "a field that is no text": lambda r, keys: r.hset(keys.job, b"\xff", b"\xff"),
    "parked": lambda r, keys: r.hset(keys.job, mapping={"parked": "x", "why:a": "x"}),
    "nodes of another type": lambda r, keys: (r.delete(keys.nodes), r.set(keys.nodes, "x")),
    "waiting of another type": lambda r, keys: (r.delete(keys.waiting), r.set(keys.waiting, "x")),
    "events": lambda r, keys: [r.xadd(keys.events, each) for each in ({"ms": "x"}, {b"\xff": 1})],
    "inflight": lambda r, keys: r.hset(keys.inflight, mapping={"a": "x", "b": "1:2"}),
    "failed items": lambda r, keys: r.zadd(keys.failed, {"{}": 1}),
    "partials": lambda r, keys: r.zadd(keys.pieces, {"x": 0}),
    "an answer that is cut off": lambda r, keys: r.hset(keys.blobs, "output", b"\x00\x93\x01"),
    "an answer of many levels": lambda r, keys: r.hset(
        keys.blobs, "output", b"\x00" + b"\x91" * 100_000 + b"\xc0"
    ),
    "an answer that does not unpack": lambda r, keys: r.hset(keys.blobs, "output", b"\x01junk"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_of_an_ended_job_harms_no_other(client: Client, damage: str) -> None:
    good, bad = (client.submit(operation="echo", items=range(3)) for _ in range(2))
    for job in (good, bad):
        job.result(timeout=20)
    harms_no_other(client, bad, good, damage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_of_an_open_job_harms_no_other(
    client_without_worker: Client, damage: str
) -> None:
    client = client_without_worker
    good, bad = (client.submit(operation="echo", items=range(3)) for _ in range(2))
    harms_no_other(client, bad, good, damage)


def harms_no_other(client: Client, bad: Job, good: Job, damage: str) -> None:
    """Damage a job and the lists of jobs; each call answers, or raises an RlmError."""
    store, keys = client.ledger.store.client, client.ledger.keys
    DAMAGES[damage](store, keys.of(bad.id))
    store.zadd(keys.jobs, {b"\xff": 9e15, bad.id: "inf"})
    store.zadd(keys.due, {b"\xff": 0})
    for name, call in CALLS.items():
        try:
            call(client, bad)
        except RlmError:
            assert name not in OF_ALL, name
    assert good.id in [spec.job for spec, _ in client.listed()]
    store.zrem(keys.jobs, b"\xff", bad.id)
    store.zrem(keys.due, b"\xff", bad.id)


def test_damaged_records_that_all_jobs_share_cost_no_job(client: Client) -> None:
    store, keys = client.ledger.store.client, client.ledger.keys
    shared = (
        *keys.usage("echo"),
        *keys.bulkhead("nodes:echo"),
        keys.timing("echo"),
        *keys.faults,
        keys.slots,
        keys.pressure().hosts,
        keys.pressure().history,
        keys.events,
        *keys.preemption("test.normal"),
    )
    kept = {key: store.dump(key) for key in shared}
    for key in shared:
        store.delete(key)
        store.set(key, "x")
    try:
        job = client.submit(operation="echo", items=range(9))
        assert job.result(timeout=30).done == 9
    finally:
        for key, value in kept.items():
            store.delete(key)
            if value is not None:
                store.restore(key, 60_000, value)
