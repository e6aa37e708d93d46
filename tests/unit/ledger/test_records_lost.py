"""Jobs whose records are gone from Redis, as after an eviction or a partial restore."""

from __future__ import annotations

import json

import pytest
from redis.exceptions import ResponseError

from rlm_tasks import JobRequest, NWay
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.records import ROOT, Child, Report
from rlm_tasks.messaging.dispatch import new_id
from tests.unit.harness import Platform


@pytest.fixture
def platform() -> Platform:
    """A platform whose messages are not delivered."""
    return Platform()


@pytest.fixture
def spec(platform: Platform) -> JobSpec:
    """An open job, with one node that runs, one that waits and one that is parked."""
    spec = platform.submit(JobRequest(operation="sum", items=range(100), strategy=NWay()))
    claim = platform.ledger.claim(spec.job, ROOT, "mine", "w")
    kids = [
        Child(name, lo, lo + 30, 1, "", 0, "t", "")
        for name, lo in (("a", 10), ("b", 40), ("c", 70))
    ]
    platform.ledger.finish(claim, Report(mid=10, done=10, kids=kids), b"x")
    platform.ledger.claim(spec.job, "a", "mine", "w")
    parked = platform.ledger.claim(spec.job, "b", "other", "w")
    platform.ledger.park(parked, 60_000, "it waits")
    return spec


@pytest.mark.parametrize("gone", ["nodes", "due", "waiting"])
def test_a_job_whose_records_are_gone_fails_with_a_reason(
    platform: Platform, spec: JobSpec, gone: str
) -> None:
    keys = platform.keys.of(spec.job)
    platform.store.client.delete(getattr(keys, gone))
    if gone == "nodes":
        platform.store.client.zadd(keys.due, {"b": 1})

    assert platform.ledger.sweep(spec.job).state == "failed"

    facts = platform.ledger.facts(spec.job)
    assert "gone from Redis" in json.loads(facts["error"])["message"]
    assert int(facts["done"]) + int(facts["failed"]) + int(facts["skipped"]) == 100
    assert platform.store.client.zscore(platform.keys.due, spec.job) is None


def test_a_job_without_keys_leaves_the_index(platform: Platform, spec: JobSpec) -> None:
    platform.store.client.delete(*platform.keys.of(spec.job))

    assert platform.ledger.sweep(spec.job).state == "unknown"
    assert platform.store.client.zscore(platform.keys.due, spec.job) is None


def test_a_child_with_the_id_of_another_node_is_refused(platform: Platform, spec: JobSpec) -> None:
    claim = platform.ledger.claim(spec.job, "c", "third", "w")

    with pytest.raises(ResponseError, match="TAKEN"):
        platform.ledger.finish(
            claim, Report(mid=80, done=10, kids=[Child("a", 80, 100, 1, "", 0, "t", "")]), b"x"
        )
    assert platform.ledger.facts(spec.job)["done"] == "10", "nothing was written"


def test_ids_of_nodes_have_64_bits() -> None:
    assert len(bytes.fromhex(new_id())) == 8
