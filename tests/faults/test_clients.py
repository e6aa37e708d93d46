"""Clients that die, and clients that submit the same request twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from resilience.store import MAX_CONNECTIONS
from rlm_tasks import InvalidRequest, JobRequest
from tests.faults.conftest import Cell
from tests.support import wait_until

SUBMIT_AND_DIE = """
import os, signal, sys
from rlm_tasks import Client
job = Client().submit(operation="sum", items=range(1000))
print(job.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
DIE_BEFORE_THE_MESSAGE = """
import os, signal
from rlm_tasks import Client
client = Client()
client.session.dispatcher.send_root = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
client.submit(operation="sum", items=range(1000), idempotency_key="once")
"""
DIE_BEFORE_THE_JOB_IS_OPEN = """
import os, signal
from rlm_tasks import Client
client = Client()
client.ledger.open = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
client.submit(operation="sum", items=list(range(1000)), idempotency_key="once")
"""


def run(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a client in a separate process that ends by SIGKILL."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done


def test_a_job_outlives_its_submitter(on_shared: Cell) -> None:
    id = run(SUBMIT_AND_DIE, on_shared.environment).stdout.strip()
    on_shared.worker()

    assert on_shared.client.job(id).result(timeout=20).output == 499_500


def test_a_job_whose_submitter_died_before_its_message_is_run_by_the_sweep(on_shared: Cell) -> None:
    run(DIE_BEFORE_THE_MESSAGE, on_shared.environment)
    [job] = on_shared.client.jobs()
    on_shared.worker()

    assert job.get(timeout=20) == 499_500
    again = on_shared.client.submit(operation="sum", items=range(1000), idempotency_key="once")
    assert again.id == job.id


def test_items_of_a_submitter_that_died_before_the_job_was_open_expire(on_shared: Cell) -> None:
    run(DIE_BEFORE_THE_JOB_IS_OPEN, on_shared.environment)
    on_shared.worker()
    store, prefix = on_shared.client.ledger.store.client, on_shared.client.settings.namespace
    staged = list(store.scan_iter(f"{prefix}:*staged*"))
    assert staged
    assert all(store.ttl(key) > 0 for key in staged)

    job = on_shared.client.submit(operation="sum", items=list(range(1000)), idempotency_key="once")
    assert job.get(timeout=20) == 499_500


def test_one_key_gives_one_job(on_shared: Cell) -> None:
    client = on_shared.client
    with ThreadPoolExecutor(8) as pool:
        jobs = list(
            pool.map(
                lambda _: client.submit(
                    operation="collect", items=list(range(5000)), idempotency_key="k"
                ),
                range(16),
            )
        )
    assert len({job.id for job in jobs}) == len(client.jobs()) == 1
    on_shared.worker()
    assert jobs[0].get(timeout=20) == list(range(5000))
    assert not list(client.ledger.store.client.scan_iter(f"{client.settings.namespace}:*staged*"))

    request = JobRequest(operation="collect", items=list(range(5000)))
    assert client.submit(request, idempotency_key="k").id == jobs[0].id
    assert (
        client.submit(
            {"operation": "collect", "items": list(range(5000)), "options": {"idempotencyKey": "k"}}
        ).id
        == jobs[0].id
    )
    assert client.submit(request, idempotency_key="another").id != jobs[0].id
    assert client.execute(request, idempotency_key="k", timeout=5).output == list(range(5000))


def test_a_key_used_for_another_request_is_refused(on_shared: Cell) -> None:
    first = on_shared.client.submit(operation="sum", items=range(10), idempotency_key="k")

    with pytest.raises(
        InvalidRequest,
        match=f"idempotency_key='k': names job {first.id}, which differs in source, n, params",
    ):
        on_shared.client.submit(operation="sum", items=[1], params={"x": 1}, idempotency_key="k")
    assert len(on_shared.client.jobs()) == 1
    assert on_shared.client.ledger.facts(first.id)["n"] == "10"


def test_a_mistaken_key_in_a_batch_delays_no_other_job(on_shared: Cell) -> None:
    client = on_shared.client
    client.submit(operation="sum", items=range(10), idempotency_key="k")
    store, prefix = client.ledger.store.client, client.settings.namespace

    with pytest.raises(InvalidRequest, match="idempotency_key"):
        client.batch_submit(
            [
                {"operation": "sum", "items": [1], "options": {"idempotency_key": "k"}},
                {"operation": "sum", "items": range(20)},
            ]
        )

    assert store.llen(f"{prefix}:{prefix}.normal") == 2, "the message of the open job is sent"


def test_many_threads_wait_for_one_job_and_for_many(on_shared: Cell) -> None:
    one = on_shared.client.submit(operation="journalled", items=[1], params=_journal(on_shared))
    many = on_shared.client.batch_submit(
        [
            {"operation": "journalled", "items": [n], "params": _journal(on_shared)}
            for n in range(80)
        ]
    )
    server = on_shared.client.session.store.client
    with ThreadPoolExecutor(210) as threads:
        waiting = [threads.submit(one.result, 60) for _ in range(130)]
        waiting += [threads.submit(job.result, 60) for job in many]
        wait_until(lambda: any(each["cmd"] == "xread" for each in server.client_list()))
        connections = len(on_shared.client.session.store.client.connection_pool._connections)
        on_shared.worker()
        answers = [each.result(60).output for each in waiting]

    assert answers == [[1]] * 130 + [[n] for n in range(80)]
    assert connections <= MAX_CONNECTIONS


def _journal(cell: Cell) -> dict[str, object]:
    return {"ms": 1, "journal": str(cell.folder / "journal")}
