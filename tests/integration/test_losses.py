"""Lost messages and processes at any depth: the job still ends with the right answer."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from celery.result import AsyncResult

from rlm_tasks import Binary, Client, JobCancelled, NWay, Status
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

ClientAndWorker = tuple[Client, subprocess.Popen[bytes]]


@pytest.fixture
def private(
    server: embedded.Server, logs: Path, request: pytest.FixtureRequest
) -> Iterator[ClientAndWorker]:
    """A private worker with a hard time limit, which the test may kill, and its client."""
    name = "loss-" + str(abs(hash(request.node.nodeid)) % 10**8)
    environment = environment_of(server.url, name)
    with (
        client_of(environment) as client,
        embedded.worker(
            environment, log=logs / f"{name}.log", options=["--time-limit", "3"]
        ) as process,
    ):
        yield client, process


def test_items_of_a_killed_pool_process_run_again(private: ClientAndWorker, tmp_path: Path) -> None:
    client, _ = private
    items = [{"i": i, "marker": str(tmp_path / "died") if i == 37 else ""} for i in range(64)]

    result = client.execute(
        operation="die_once", items=items, timeout=30, strategy=Binary(min_chunk_size=4)
    )

    assert result.output == list(range(64))
    assert (tmp_path / "died").exists()


def test_an_item_that_always_kills_its_process_fails_alone(private: ClientAndWorker) -> None:
    client, _ = private
    items = [{"i": i, "poison": i == 20} for i in range(50)]

    result = client.execute(
        operation="die_always", items=items, continue_on_error=True, timeout=60, type="sequential"
    )

    assert [failure.index for failure in result.failed] == [20]
    assert "its process died 3 times" in result.failed[0].message
    assert result.output == [i for i in range(50) if i != 20]


def test_an_item_over_the_hard_time_limit_fails_and_the_others_are_done(
    private: ClientAndWorker,
) -> None:
    client, _ = private
    items = [1.0] * 10 + [60_000.0] + [1.0] * 10

    result = client.execute(
        operation="nap",
        items=items,
        continue_on_error=True,
        timeout=60,
        strategy=NWay(split_factor=3, min_chunk_size=7),
    )

    assert [failure.index for failure in result.failed] == [10]
    assert result.done == 20


def test_a_revoked_leaf_cancels_its_job(private: ClientAndWorker) -> None:
    client, _ = private
    job = client.submit(operation="nap", items=[50.0] * 100, strategy=Binary(min_chunk_size=10))
    wait_until(lambda: any(node.state == "queued" and node.depth >= 2 for node in job.tree()))
    # The last node in the queue cannot start before the worker receives the revocation.
    record = max(
        (each for each in client.ledger.all_records(job.id) if each.state == "q"),
        key=lambda each: each.lo,
    )

    client.app.control.revoke(record.slot.task)

    with pytest.raises(JobCancelled, match="by a revoke of Celery: "):
        job.result(timeout=20)
    assert job.progress().done + job.progress().skipped == 100


@pytest.mark.parametrize("how", ["control", "result", "terminated", "beside odd ids"])
def test_a_revoked_id_of_a_job_that_has_fanned_out_cancels_the_job(
    client: Client, how: str
) -> None:
    job = client.submit(operation="nap", items=[50.0] * 400, strategy=Binary(min_chunk_size=10))
    wait_until(lambda: any(node.depth >= 2 for node in job.tree()))

    if how == "control":
        client.app.control.revoke([job.id, "an-id-of-a-task"])
    elif how == "beside odd ids":
        client.app.control.revoke([job.id, 5, None], terminate=True, signal="NOPE")
    else:
        AsyncResult(job.id, app=client.app).revoke(terminate=how == "terminated")

    with pytest.raises(JobCancelled, match="by a revoke of Celery: "):
        job.result(timeout=20)
    assert job.progress().done + job.progress().skipped == 400


def test_a_revoked_id_of_an_ended_job_is_named_in_the_log(client: Client, logs: Path) -> None:
    job = client.submit(operation="sum", items=range(10))
    assert job.get(timeout=30) == 45

    client.app.control.revoke(job.id)

    said = f"Job {job.id} was revoked, but not cancelled: it has succeeded"
    wait_until(lambda: said in (logs / "worker.log").read_text())
    assert job.get(timeout=30) == 45


def test_a_killed_worker_loses_no_item(server: embedded.Server, logs: Path) -> None:
    environment = environment_of(server.url, "killed")
    items = [{"i": i, "ms": 5} for i in range(600)]
    with client_of(environment) as client:
        with embedded.worker(environment, log=logs / "killed.log") as process:
            job = client.submit(operation="spin_then_collect", items=items)
            wait_until(lambda: job.progress().done > 60)
            for each in (
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ):
                os.kill(each.pid, signal.SIGKILL)
        assert not job.ready()
        with embedded.worker(environment, log=logs / "killed.log"):
            assert job.result(timeout=30).output == list(range(600))


def test_a_stopping_worker_hands_its_nodes_over(server: embedded.Server, logs: Path) -> None:
    environment = environment_of(server.url, "drained", RLM_NODE__TARGET_MS="60000")
    with client_of(environment) as client:
        with embedded.worker(environment, log=logs / "drained.log") as process:
            job = client.submit(
                operation="spin_then_collect", items=[{"i": i, "ms": 5} for i in range(1200)]
            )
            wait_until(lambda: job.progress().done > 100)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=5)
        before = job.progress()
        assert not before.status.final
        assert any("draining" in node.why for node in job.tree())
        with embedded.worker(environment, log=logs / "drained.log"):
            result = job.result(timeout=30)
            attempts = {node.attempts for node in job.tree()}
    assert result.output == list(range(1200))
    assert attempts == {1}, "no node runs again"


def test_a_worker_with_many_small_nodes_stops_within_seconds(
    server: embedded.Server, logs: Path
) -> None:
    environment = environment_of(server.url, "prompt")
    with client_of(environment) as client:
        with embedded.worker(environment, log=logs / "prompt.log") as process:
            job = client.submit(
                operation="collect", items=list(range(600)), type="parallel", chunk_size=1
            )
            wait_until(lambda: job.progress().nodes > 200)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=5)
        with embedded.worker(environment, log=logs / "prompt.log"):
            assert job.get(timeout=60) == list(range(600))


def test_lost_messages_are_sent_again(server: embedded.Server, logs: Path) -> None:
    environment = environment_of(server.url, "lost")
    with client_of(environment) as client:
        job = client.submit(operation="sum", items=range(1000), strategy=Binary(min_chunk_size=100))
        client.ledger.store.client.delete("lost:lost.normal")
        with embedded.worker(environment, log=logs / "lost.log"):
            assert job.result(timeout=20).output == 499_500


def test_a_doubled_message_counts_once(client: Client) -> None:
    job = client.submit(
        operation="spin_then_collect",
        items=[{"i": i, "ms": 2} for i in range(300)],
        strategy=Binary(min_chunk_size=20),
    )
    dispatcher, spec = client.session.dispatcher, client.ledger.spec(job.id)
    for _ in range(3):
        dispatcher.resend(spec, [node.id for node in job.tree()], merges=True)

    result = job.result(timeout=30)

    assert result.output == list(range(300))
    dispatcher.resend(spec, [node.id for node in job.tree()], merges=True)
    assert job.progress().done == 300


def test_a_waiting_client_survives_an_outage(logs: Path, tmp_path: Path) -> None:
    server = embedded.Server(tmp_path, durable=True)
    server.start()
    environment = environment_of(server.url, "outage")
    try:
        with client_of(environment) as client:
            job = client.submit(operation="sum", items=range(100))
            server.stop()
            import threading

            outcome: list[Status] = []
            waiting = threading.Thread(target=lambda: outcome.append(job.wait(30)))
            waiting.start()
            server.start()
            with embedded.worker(environment, log=logs / "outage.log"):
                waiting.join(30)
            assert outcome == [Status.SUCCEEDED]
    finally:
        server.stop()
