"""Messages that arrive twice or ten times, early, late or never.

Each index counts once, and the job has one result, the right one."""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlm_tasks import NWay
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.ledger.records import NodeRecord
from rlm_tasks.messaging.dispatch import body_of, group_id
from tests.faults.conftest import Cell, resend
from tests.integration.conftest import client_of
from tests.support import wait_until


def copies(own: Cell, job_id: str, times: int) -> int:
    """Send the message of every node again, `times` times; return the number of messages."""
    nodes = [record.id for record in own.client.ledger.all_records(job_id)]
    for _ in range(times):
        resend(own.client, job_id, nodes)
    return times * len(nodes)


@pytest.mark.parametrize("times", [1, 9])
def test_messages_doubled_while_the_job_runs_count_once(on_shared: Cell, times: int) -> None:
    on_shared.worker()
    job = on_shared.submit(300, ms=4)
    wait_until(lambda: len(job.tree()) > 6)

    sent = copies(on_shared, job.id, times)

    assert sent >= 6 * times
    on_shared.check(job)
    ran = on_shared.journal(job)
    assert len(ran) == len(set(ran)), "a copy that arrives while the first is running does not run"


def test_messages_doubled_after_the_end_change_nothing(on_shared: Cell) -> None:
    on_shared.worker()
    job = on_shared.submit()
    on_shared.check(job)
    before = on_shared.client.ledger.facts(job.id)

    copies(on_shared, job.id, 10)
    on_shared.check(on_shared.submit())

    assert on_shared.client.ledger.facts(job.id) == before
    on_shared.check(job)


def test_a_copy_of_a_claimed_message_leaves_the_chord_slot_to_the_holder(on_shared: Cell) -> None:
    """The part is counted when the holder returns, not when its copy finds the node busy."""
    on_shared.worker(options=["-c", "3"])
    job = on_shared.client.submit(
        operation="pid_after", items=[2.0, 0.0], strategy=NWay(split_factor=2, min_chunk_size=1)
    )
    ledger = on_shared.client.ledger

    def leaves() -> list[NodeRecord]:
        return [record for record in ledger.all_records(job.id) if record.hi - record.lo == 1]

    wait_until(lambda: sorted(each.state for each in leaves()) == ["d", "r"])
    [slow] = [each for each in leaves() if each.state == "r"]
    prefix, group = on_shared.client.settings.namespace, group_id(job.id, slow.slot.split)
    parts = f"{prefix}:celery-taskset-meta-{group}.j"
    store = ledger.store.client
    wait_until(lambda: store.zcard(parts) == 1)

    copies(on_shared, job.id, 3)
    queue = f"{prefix}:{prefix}.normal"
    wait_until(lambda: store.exists(queue) == 0)
    assert store.zcard(parts) == 1, "the slot of the running node is not filled by its copies"
    assert {record.state for record in leaves()} == {"d", "r"}

    result = job.result(timeout=20)
    assert result.done == 2
    assert len({tuple(pair) for pair in result.output}) == 2


@pytest.mark.parametrize("when", ["early and twice", "late", "never"])
def test_chord_bodies_at_any_time_leave_one_result(on_shared: Cell, when: str) -> None:
    """The test sends chord bodies early and late, or deletes the chords' counters."""
    client = on_shared.client
    on_shared.worker()
    job = on_shared.submit(240, ms=3)
    wait_until(lambda: client.ledger.store.client.hlen(client.ledger.keys.of(job.id).splits) > 0)
    splits = [
        json.loads(each)
        for each in client.ledger.store.client.hvals(client.ledger.keys.of(job.id).splits)
    ]

    def fire() -> None:
        for split in splits:
            found = client.ledger.split(job.id, split["id"])
            assert found is not None or job.ready()
            if found is not None:
                body = body_of(job.id, f"{client.settings.namespace}.normal", found)
                client.app.send_task(body["task"], body["args"], **body["options"])

    if when == "early and twice":
        fire()
        fire()
    if when == "never":
        for split in splits:
            counters = functools.partial(
                client.ledger.store.client.keys, f"*{group_id(job.id, split['id'])}*"
            )
            # The counters are set after the split is known.
            wait_until(lambda counters=counters: counters() or job.progress().done)
            if keys := counters():  # a small split may be merged already
                client.ledger.store.client.delete(*keys)
    on_shared.check(job)
    if when == "late":
        for split in splits:
            client.app.send_task(
                "rlm.merge", [job.id, split["id"]], queue=f"{client.settings.namespace}.normal"
            )
        on_shared.check(on_shared.submit())
    on_shared.check(job)


def test_concurrent_sweeps_send_each_node_once(on_shared: Cell) -> None:
    """Eight ledgers sweep one job with a hundred overdue nodes; each node is sent once."""
    job = on_shared.client.submit(
        operation="journalled",
        items=range(100),
        params={"ms": 0, "journal": str(on_shared.folder / "journal")},
        strategy=NWay(split_factor=100, min_chunk_size=1),
    )
    ledger, keys = on_shared.client.ledger, on_shared.client.ledger.keys.of(job.id)
    with client_of(on_shared.environment) as other:
        worker = on_shared.worker()
        wait_until(lambda: len(job.tree()) > 90)
        worker.kill()
        worker.wait(5)
        store = ledger.store.client
        queued = list(store.zrange(keys.waiting, 0, -1))
        running = list(store.zrange(keys.due, 0, -1))
        for id in (*queued, *running):
            store.zadd(keys.due, {id: 1})
        ledgers = [
            Ledger(other.ledger.store, other.ledger.keys, other.ledger.settings) for _ in range(8)
        ]
        with ThreadPoolExecutor(8) as pool:
            swept = list(pool.map(lambda each: each.sweep(job.id).send, ledgers))
    sent = [id for each in swept for id in each]

    assert len(sent) == len(set(sent))
    assert {id.decode() for id in (*queued, *running)} <= set(sent)
    resend(on_shared.client, job.id, sent)
    on_shared.worker()
    on_shared.check(job)


def test_one_lost_message_of_many_is_found_while_the_others_run(on_shared: Cell) -> None:
    """The lost message is sent again when a later one has arrived; no other message is."""
    store, prefix = on_shared.client.ledger.store.client, on_shared.client.settings.namespace
    on_shared.worker(options=["-c", "1"])
    job = on_shared.submit(600, ms=4)
    queue = f"{prefix}:{prefix}.normal"
    wait_until(lambda: store.llen(queue) >= 4)
    message = store.lindex(queue, -3)
    lost = json.loads(message)["headers"]["id"]
    assert store.lrem(queue, 1, message) == 1

    on_shared.check(job)

    ran = on_shared.journal(job)
    assert len(ran) == len(set(ran)) == 600
    again = [
        json.loads(each) for each in store.hvals(on_shared.client.ledger.keys.of(job.id).nodes)
    ]
    assert [each["t"] for each in again if each["rs"]] == [lost]


def test_a_long_queue_does_not_count_as_lost(on_shared: Cell) -> None:
    """A job that waits ten grace times behind other work gets few copies of its messages."""
    on_shared.worker(options=["-c", "1"])
    first = on_shared.submit(1000, ms=5)
    waiting = on_shared.submit(600, ms=0.1)
    on_shared.check(first, within_s=60)
    on_shared.check(waiting, within_s=60)

    store = on_shared.client.ledger.store.client
    copies_sent = [
        json.loads(each)["rs"]
        for each in store.hvals(on_shared.client.ledger.keys.of(waiting.id).nodes)
    ]
    assert sum(copies_sent) <= 5


def test_deleted_queues_of_a_thousand_messages_are_published_again(on_shared: Cell) -> None:
    store, prefix = on_shared.client.ledger.store.client, on_shared.client.settings.namespace
    job = on_shared.client.submit(
        operation="journalled",
        items=range(1000),
        params={"ms": 0, "journal": str(on_shared.folder / "journal")},
        type="parallel",
        chunk_size=1,
    )
    on_shared.worker()
    queue = f"{prefix}:{prefix}.normal"
    wait_until(lambda: store.llen(queue) > 500)
    since = time.time()
    store.delete(queue)

    on_shared.check(job, since=since, what="a queue of more than 500 messages deleted", within_s=60)


def test_parked_nodes_wake_in_time_at_default_settings(on_shared: Cell) -> None:
    """Fifty nodes wait for different times; any live worker wakes them, without an ETA message."""
    for name in ("LEASE_S", "SWEEP_S"):
        del on_shared.environment[f"RLM_LEDGER__{name}"]
    client = on_shared.stack.enter_context(client_of(on_shared.environment))
    jobs = client.batch_submit([{"operation": "echo", "items": [i]} for i in range(50)])
    store = client.ledger.store.client
    store.delete(f"{client.settings.namespace}:{client.settings.namespace}.normal")
    claims = [client.ledger.claim(job.id, "root", "00" * 8, "somebody") for job in jobs]
    on_shared.worker()
    on_shared.worker()
    due = {}
    for at, (job, claim) in enumerate(zip(jobs, claims, strict=True)):
        client.ledger.park(claim, 500 + 37 * at, "the test parks it")
        due[job.id] = store.zscore(client.ledger.keys.of(job.id).due, "root")

    late = sorted(
        json.loads(store.hget(client.ledger.keys.of(job.id).nodes, "root"))["at"] - due[job.id]
        for job in jobs
        if job.result(timeout=20).done
    )

    print(
        f"woken late by ms: median {late[25]:.0f}, 49 of 50 within {late[48]:.0f},"
        f" slowest {late[49]:.0f}"
    )
    assert late[0] >= 0
    assert late[25] <= 250
    assert late[48] <= 1000
