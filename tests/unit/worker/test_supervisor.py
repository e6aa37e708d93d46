"""The supervisor of a worker, and pool processes that have died."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

import pytest

from resilience.connections import RecordUnreadable
from resilience.errors import StoreUnavailable
from rlm_tasks.engine.node import run_node
from rlm_tasks.jobs.spec import JobSpec
from rlm_tasks.ledger.records import MERGE, ROOT, SWEEP_AT_ONCE, Child, Report
from rlm_tasks.operations.registry import operation
from rlm_tasks.requests import JobRequest
from rlm_tasks.worker.lost_nodes import REAPED, give_back
from rlm_tasks.worker.supervisor import SWEEPS_IN_A_ROW, Supervisor
from tests.unit.harness import Platform

TOKEN = "00112233aabbccdd"
NO_CHILD = os.getppid()
"""A process that is no child of ours, as one that is already reaped."""


@pytest.mark.parametrize(("code", "died_of"), [(-9, "SIGKILL"), (70, "exit code 70")])
def test_a_process_that_billiard_has_reaped_is_known_by_its_exit_code(
    code: int, died_of: str
) -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    platform.ledger.claim(spec.job, ROOT, TOKEN, "unit")
    slot = platform.runtime.page.entry(0)
    slot.hold(NO_CHILD, spec.job, ROOT, TOKEN, 0.0)
    slot.start_item(3)

    Supervisor(platform.runtime, {}, lambda: 1, list, lambda _pid: code)._reap(0.0)

    assert (
        json.loads(platform.store.client.hget(platform.keys.of(spec.job).deaths, "3"))["by"]
        == died_of
    )
    assert list(platform.runtime.page.held()) == []


def test_a_dead_process_is_left_to_celery_for_a_while() -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    platform.ledger.claim(spec.job, ROOT, TOKEN, "unit")
    platform.runtime.page.entry(0).hold(NO_CHILD, spec.job, ROOT, TOKEN, 0.0)
    guard = Supervisor(platform.runtime, {}, lambda: 1, list)

    guard._reap(100.0)
    assert [held.pid for held in platform.runtime.page.held()] == [NO_CHILD]
    guard._reap(103.0)

    [record] = platform.ledger.records(spec.job, [ROOT])
    assert (record.state, record.lost_by) == ("q", REAPED)


def test_a_worker_reports_the_queues_that_it_begins_to_consume_at_once() -> None:
    platform, queues = Platform(), list[str]()
    supervisor = Supervisor(platform.runtime, {}, lambda: 1, lambda: queues)
    supervisor._tick(100.0)
    queues.append("unit.normal")
    supervisor._tick(100.1)
    assert [host.queues for host in platform.runtime.board.hosts()] == [()]

    supervisor.begin()
    supervisor._tick(100.2)

    assert [host.queues for host in platform.runtime.board.hosts()] == [("unit.normal",)]


def outage_in_merges(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """Return a job whose only node has lost Redis before it closed the job."""

    def away(*_: Any, **__: Any) -> None:
        raise StoreUnavailable(platform.store.url, "away")

    monkeypatch.setattr(platform.ledger, "close", away)
    spec = platform.submit(JobRequest(operation="sum", items=range(10)))
    platform.mailbox.messages.clear()
    with pytest.raises(StoreUnavailable):
        run_node(platform.runtime, spec.job, ROOT)
    return spec


@pytest.mark.parametrize("idle", [True, False])
def test_a_merge_that_loses_redis_again_and_again_is_not_quarantined(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform()
    spec = outage_in_merges(platform, monkeypatch)
    supervisor = Supervisor(platform.runtime, {}, lambda: 1, list)
    for _ in range(2 * platform.settings.ledger.death_limit):
        if idle:
            supervisor._reap(0.0)
            assert platform.mailbox.messages.pop() == (spec.job, MERGE)
        # A busy process gives the merge back before its next node.
        with pytest.raises(StoreUnavailable):
            run_node(platform.runtime, spec.job, MERGE)
    monkeypatch.undo()

    assert run_node(platform.runtime, spec.job, MERGE)

    facts = platform.ledger.facts(spec.job)
    assert (facts["state"], platform.output(spec)) == ("succeeded", sum(range(10)))
    assert list(platform.runtime.page.held()) == []


def unavailable(_: Any) -> int:
    """Raise the error of another server's outage."""
    raise StoreUnavailable("redis://another", "away")


operation("unit_finalize_unavailable", merge=sum, finalize=unavailable)(int)
operation("unit_merge_unavailable", merge=unavailable)(int)


@pytest.mark.parametrize("name", ["unit_finalize_unavailable", "unit_merge_unavailable"])
def test_a_job_fails_with_an_outage_of_another_server_in_its_merge(name: str) -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation=name, items=[1, 2]))

    facts = platform.run(spec)

    assert facts["state"] == "failed"
    assert "redis://another" in facts["error"]
    assert list(platform.runtime.page.held()) == []


def test_a_node_that_was_given_up_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform()
    spec = outage_in_merges(platform, monkeypatch)
    supervisor = Supervisor(platform.runtime, {}, lambda: 1, list)
    for _ in range(2):
        supervisor._reap(0.0)
    assert platform.mailbox.messages == [(spec.job, MERGE)]

    supervisor._due["beat"] = 0.0
    supervisor._tick(0.0)
    [record] = platform.ledger.records(spec.job, [MERGE])
    assert record.state == "q", "no lease of it is renewed"


def test_a_process_that_dies_after_an_outage_harms_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform()
    spec = outage_in_merges(platform, monkeypatch)
    monkeypatch.undo()
    [held] = platform.runtime.page.held()

    assert give_back(platform.runtime, held, "SIGKILL")

    assert run_node(platform.runtime, spec.job, MERGE)
    [record] = platform.ledger.records(spec.job, [MERGE])
    assert (record.losses, platform.ledger.facts(spec.job)["state"]) == (0, "succeeded")


def test_one_job_that_cannot_be_swept_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    platform = Platform()
    broken, well = (platform.submit(JobRequest(operation="sum", items=range(10))) for _ in range(2))
    store, keys = platform.store.client, platform.keys
    for spec in (broken, well):
        platform.ledger.claim(spec.job, ROOT, TOKEN, "unit")
        store.zadd(keys.of(spec.job).due, {ROOT: 1})
    store.hset(keys.of(broken.job).nodes, ROOT, "no JSON")
    supervisor = Supervisor(platform.runtime, {}, lambda: 1, list)

    for _ in range(2):
        store.zadd(keys.due, {broken.job: 1, well.job: 2})
        supervisor._sweep()

    assert [record.state for record in platform.ledger.records(well.job, [ROOT])] == ["q"]
    assert caplog.text.count(f"Job {broken.job} cannot be swept") == 1


def test_one_tick_sends_a_bounded_part_of_a_job_with_many_overdue_nodes() -> None:
    platform = Platform()
    spec = platform.submit(JobRequest(operation="sum", items=range(1100)))
    claim = platform.ledger.claim(spec.job, ROOT, TOKEN, "unit")
    kids = [Child(f"n{at}", at, at + 1, 1, "", 0, "t", "", wait_ms=0) for at in range(1100)]
    platform.ledger.finish(claim, Report(mid=0, kids=kids), b"")
    store, keys = platform.store.client, platform.keys
    store.zadd(keys.due, {spec.job: 1})
    sent = platform.mailbox.sent

    supervisor = Supervisor(platform.runtime, {}, lambda: 1, list)
    supervisor._sweep()

    assert platform.mailbox.sent - sent == SWEEPS_IN_A_ROW * SWEEP_AT_ONCE
    [next_ms] = platform.store.call(platform.ledger.due.first())
    assert next_ms <= 50, "the rest is sent at the next tick"


@pytest.mark.parametrize("damage", ["index", "slots", "hosts", "revoked job", "revoked record"])
def test_a_damaged_record_stops_neither_leases_nor_the_next_tick(damage: str) -> None:
    platform = Platform()
    client, keys = platform.store.client, platform.keys
    held, other = (
        platform.submit(JobRequest(operation="sum", items=range(10))).job for _ in range(2)
    )
    platform.ledger.claim(held, ROOT, TOKEN, "unit")
    platform.runtime.page.entry(0).hold(os.getpid(), held, ROOT, TOKEN, 0.0)
    supervisor = Supervisor(platform.runtime, {}, lambda: 1, list)
    if damage == "revoked record":
        client.hset(keys.of(other).job, "nodes", "many")
    else:
        damaged = {
            "index": keys.due,
            "slots": keys.slots,
            "hosts": keys.pressure().hosts,
            "revoked job": keys.of(other).job,
        }[damage]
        client.delete(damaged)
        client.rpush(damaged, "x")
    supervisor.revocations.add([other, held])
    client.zadd(keys.of(held).due, {ROOT: 1})

    with suppress(RecordUnreadable):  # the sweep, which is the last step, needs the index
        supervisor._tick(platform.clock())
    assert (client.zscore(keys.of(held).due, ROOT) or 0) > 1
    assert platform.ledger.facts(held)["stop"] == "cancelled"
