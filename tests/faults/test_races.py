"""Cancellation, expiry and failure of a job while its tree splits.

No node starts after the end was decided, and every node ends."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from rlm_tasks import Binary, Job, Status
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell, cell
from tests.support import examples, wait_until

RACES = examples(200)
SLICE_MS = 5
KINDS = {"cancel": Status.CANCELLED, "expiry": Status.EXPIRED, "verdict": Status.FAILED}


def race(own: Cell, seed: int) -> tuple[str, Job]:
    """Run one job and end it at a random moment; return the kind of end, and the job."""
    random = Random(seed)
    kind = list(KINDS)[seed % 3]
    items = [{"i": i, "ms": 1, "fails": False} for i in range(64)]
    more = {}
    if kind == "expiry":
        more = {"timeout_ms": random.uniform(1, 60)}
    if kind == "verdict":
        items[random.randrange(64)]["fails"] = True
    job = own.client.submit(
        operation="spin_then_collect", items=items, strategy=Binary(min_chunk_size=4), **more
    )
    if kind == "cancel":
        time.sleep(random.uniform(0, 0.06))  # the moment of the race
        job.cancel()
    job.wait(30)
    return kind, job


def test_many_races(on_shared: Cell) -> None:
    on_shared.worker()
    with ThreadPoolExecutor(4) as pool:
        ran = list(pool.map(lambda seed: race(on_shared, seed), range(RACES)))
    ledger, store = on_shared.client.ledger, on_shared.client.ledger.store.client
    prefix = on_shared.client.settings.namespace
    wait_until(lambda: not store.exists(f"{prefix}:{prefix}.normal"))
    before = {job.id: ledger.facts(job.id) for _, job in ran}
    on_shared.check(on_shared.submit())

    ended: dict[str, int] = dict.fromkeys(KINDS, 0)
    for kind, job in ran:
        facts = ledger.facts(job.id)
        assert facts == before[job.id], "nothing happens to a job after its end"
        assert facts["state"] in (KINDS[kind], Status.SUCCEEDED)
        assert int(facts["done"]) + int(facts["failed"]) + int(facts["skipped"]) == 64
        ended[kind] += facts["state"] == KINDS[kind]
        if facts["state"] != Status.SUCCEEDED:
            records = [json.loads(each) for each in store.hvals(ledger.keys.of(job.id).nodes)]
            late = [node["at"] - int(facts["stop_ms"]) for node in records if node.get("at")]
            assert max(late, default=0) <= SLICE_MS, (
                "no node starts later than one slice after the end was decided"
            )
            assert {node["s"] for node in records} <= {"d", "c", "k"}, "every node has ended"
        on_shared.check_keys(job)
    assert all(count > RACES / 3 * 0.5 for count in ended.values()), (
        f"most races were close: {ended}"
    )
    print(f"races decided by {ended}")


def test_a_cancelled_tree_of_many_waiting_nodes_ends_at_once(on_shared: Cell) -> None:
    on_shared.worker()
    job = on_shared.client.submit(
        operation="nap", items=[5.0] * 5000, type="parallel", chunk_size=1
    )
    wait_until(lambda: job.progress().done > 20)

    job.cancel()

    assert job.wait(5) is Status.CANCELLED
    progress = job.progress()
    assert progress.done + progress.skipped == 5000


def test_an_item_cannot_hold_up_the_end_of_its_job(server: embedded.Server, tmp_path: Path) -> None:
    """Running nodes of an ended job are fenced after the stop grace, even within an item."""
    with cell(
        server, "stuck", tmp_path, tmp_path / "worker.log", RLM_LEDGER__STOP_GRACE_S="0.5"
    ) as own:
        own.worker()
        job = own.client.submit(operation="nap", items=[4000.0, 4000.0])
        wait_until(lambda: any(node.state == "running" for node in job.tree()))
        began = time.monotonic()
        job.cancel()
        assert job.wait(10) is Status.CANCELLED
        assert time.monotonic() - began < 3.5
        facts = own.client.ledger.facts(job.id)
        own.check(own.submit())
        assert own.client.ledger.facts(job.id) == facts
