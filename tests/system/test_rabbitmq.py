"""Jobs over RabbitMQ, with Redis for the ledger: exact, whoever dies, and urgent work first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlm_tasks import Adaptive, Client, Job, NWay, embedded
from rlm_tasks.doctor import examine
from rlm_tasks.errors import BrokerUnavailable
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until
from tests.system.rabbitmq import Rabbit, rabbit

OPERATIONS = "tests.integration.ops,tests.faults.ops,tests.integration.pressed_ops,tests.integration.preempted_ops"
SLOTS = 2


@pytest.fixture(scope="module")
def broker() -> Iterator[Rabbit]:
    with rabbit() as own:
        yield own


@pytest.fixture(scope="module")
def server() -> Iterator[embedded.Server]:
    with embedded.server() as own:
        yield own


@pytest.fixture
def environment(server: embedded.Server, broker: Rabbit, request: pytest.FixtureRequest) -> dict[str, str]:
    name = f"r{abs(hash(request.node.nodeid)) % 10**8}"
    return environment_of(server.url, name, RLM_BROKER_URL=broker.url, RLM_OPERATIONS=OPERATIONS)


@pytest.fixture
def client(environment: dict[str, str]) -> Iterator[Client]:
    with client_of(environment) as own:
        yield own


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a worker; all of them end with the test."""
    with ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []

        def start() -> subprocess.Popen[bytes]:
            name = f"w{len(started)}"
            process = stack.enter_context(
                embedded.worker(environment, log=tmp_path / f"{name}.log", slots=SLOTS, options=["-n", f"{name}@test"])
            )
            started.append(process)
            return process

        yield start


def journalled(client: Client, tmp_path: Path, items: int = 400) -> Job:
    return client.submit(
        operation="journalled", items=range(items), params={"ms": 5, "journal": str(tmp_path / "journal")},
        strategy=NWay(split_factor=3, min_chunk_size=items // 6),
    )  # fmt: skip


def is_exact(job: Job, items: int = 400) -> None:
    result = job.result(timeout=40)
    assert result.output == list(range(items))
    assert (result.done, result.failed_count, result.skipped) == (items, 0, 0)


Worker = Callable[[], "subprocess.Popen[bytes]"]


def test_a_job_splits_merges_and_is_seen(client: Client, worker: Worker, environment: dict[str, str]) -> None:
    before = client.submit(operation="sum", items=range(10), priority="low")
    assert client.queues()[f"{environment['RLM_NAMESPACE']}.low"].depth == 1
    worker()
    job = client.submit(operation="collect", items=range(600), strategy=NWay(split_factor=4, min_chunk_size=10))

    assert (before.get(timeout=20), job.get(timeout=20)) == (45, list(range(600)))
    assert job.result().metrics.splits > 3

    waiting = client.queues()
    assert {report.depth for report in waiting.values()} == {0}
    assert {report.oldest_s for report in waiting.values()} == {None}
    [found] = [each for each in examine(client, client.app) if each.check == "broker"]
    assert (found.state, found.advice) == ("ok", ""), found
    told = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "inspect", "slots", "--json"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert list(json.loads(told)) == ["w0@test"]


def test_a_worker_killed_outright_loses_nothing(client: Client, worker: Worker, tmp_path: Path) -> None:
    first, _ = worker(), worker()
    job = journalled(client, tmp_path)
    wait_until(lambda: job.progress().done > 60)

    os.killpg(first.pid, signal.SIGKILL)

    is_exact(job)


def test_a_worker_told_to_stop_hands_over_and_goes(client: Client, worker: Worker, tmp_path: Path) -> None:
    first = worker()
    job = journalled(client, tmp_path)
    wait_until(lambda: job.progress().done > 60)

    first.terminate()

    assert first.wait(20) == 0
    worker()
    is_exact(job)
    ran = (tmp_path / f"journal.{job.id}").read_text().split()
    assert len(ran) == len(set(ran)) == 400, "nothing is computed again"


def test_messages_that_the_broker_has_lost_are_sent_again(
    client: Client, worker: Worker, broker: Rabbit, environment: dict[str, str], tmp_path: Path
) -> None:
    worker()
    job = journalled(client, tmp_path)
    wait_until(lambda: job.progress().done > 60)

    broker.ctl("purge_queue", f"{environment['RLM_NAMESPACE']}.normal")

    is_exact(job)


def test_critical_work_takes_the_slots_of_low_work(client: Client, worker: Worker) -> None:
    worker()
    low = client.submit(operation="nap", items=[0.05] * 4000, priority="low", strategy=Adaptive())
    wait_until(lambda: sum(node.state == "running" for node in low.tree()) == SLOTS)

    started = []
    for _ in range(5):
        asked = time.time()
        [began] = client.submit(operation="stamp", items=[0], priority="critical").get(timeout=30)
        started.append(began - asked)

    assert sorted(started)[-2] <= 0.05 + 0.5, "one may meet a busy machine"
    low.cancel()


def test_a_broker_that_goes_and_comes_back_loses_no_job(
    client: Client, worker: Worker, broker: Rabbit, environment: dict[str, str], tmp_path: Path
) -> None:
    process = worker()
    job = journalled(client, tmp_path, 600)
    wait_until(lambda: job.progress().done > 60)

    broker.ctl("stop_app")
    meanwhile = client.submit(operation="sum", items=range(10))
    with pytest.raises(BrokerUnavailable, match=r"amqp://guest:\*\*\*@127\.0\.0\.1"):
        client.queues()
    broker.ctl("start_app")

    is_exact(job, 600)
    assert meanwhile.get(timeout=30) == 45
    assert process.poll() is None
