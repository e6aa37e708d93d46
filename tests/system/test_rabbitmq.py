"""RabbitMQ as the broker, Redis for state: the whole platform on a real node, with its outages."""

from __future__ import annotations

import json
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu.pools
import pytest
import trustme

from rlm_tasks import Adaptive, Client, NWay, QueueFull
from rlm_tasks.errors import BrokerUnavailable
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell, cell
from tests.faults.proxy import TlsProxy
from tests.integration.conftest import client_of, environment_of
from tests.integration.flowers import flower
from tests.support import wait_until
from tests.system.rabbitmq import Missing, Node

MODULES = "tests.integration.ops,tests.integration.guarded_ops,tests.faults.ops"
LONG_MS = 60_000
"""A node with this target does not end during a test by itself."""


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("rabbitmq"))
    try:
        node.start()
    except Missing as error:
        pytest.fail(str(error), pytrace=False)
    yield node
    node.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.Server]:
    with embedded.server() as own:
        yield own


@pytest.fixture(scope="module")
def platform(
    rabbitmq: Node, server: embedded.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cell]:
    """A client, and a worker that must survive every fault of RabbitMQ."""
    folder = tmp_path_factory.mktemp("platform")
    with cell(
        server,
        "rabbit",
        folder,
        folder / "worker.log",
        RLM_BROKER_URL=rabbitmq.url,
        RLM_OPERATIONS=MODULES,
    ) as own:
        own.worker()
        yield own


@pytest.fixture(autouse=True)
def the_worker_keeps_its_process(platform: Cell) -> Iterator[None]:
    yield
    assert platform.workers[0].poll() is None


def depth(client: Client, priority: str) -> int:
    """Return the number of messages in the queue of a priority."""
    return client.queues()[f"{client.settings.namespace}.{priority}"].depth


# --- jobs -------------------------------------------------------------------------------------


def test_jobs_split_and_merge_and_leave_no_message(platform: Cell) -> None:
    for _ in range(3):
        platform.check(platform.submit())

    wait_until(lambda: not any(report.depth for report in platform.client.queues().values()))
    assert {report.oldest_s for report in platform.client.queues().values()} == {None}, (
        "RabbitMQ does not report the age of messages"
    )


def test_a_node_that_waits_for_a_rate_limit_is_parked_and_woken(
    platform: Cell, tmp_path: Path
) -> None:
    job = platform.client.submit(
        operation="metered", items=range(20), params={"folder": str(tmp_path)}
    )

    result = job.result(timeout=30)

    assert result.output == list(range(20))
    assert result.metrics.yields > 0


def test_a_killed_workers_nodes_are_done_by_another(platform: Cell) -> None:
    lost = platform.worker()
    job = platform.submit(300, ms=10)
    wait_until(lambda: job.progress().done > 30)
    since = time.time()
    os.killpg(lost.pid, signal.SIGKILL)

    platform.check(job, since=since)


def test_a_worker_that_drains_takes_nothing_until_it_resumes(platform: Cell) -> None:
    control = platform.client.app.control
    assert control.broadcast("rlm_drain", reply=True, limit=1, timeout=10)
    job = platform.submit()
    wait_until(lambda: depth(platform.client, "normal") > 0)

    assert control.broadcast("rlm_resume", reply=True, limit=1, timeout=10)
    platform.check(job)


# --- urgent work ------------------------------------------------------------------------------


def urgent_work_starts(client: Client) -> None:
    """Fill all slots with nodes that do not end by themselves, with more of them in the queue.

    Assert that each of ten critical jobs gets a slot."""
    low = client.submit(
        operation="nap",
        items=[100] * 5000,
        priority="low",
        strategy=Adaptive(target_execution_time_ms=LONG_MS),
    )
    for _ in range(10):
        wait_until(lambda: sum(node.state == "running" for node in low.tree()) == 2)
        assert client.submit(operation="echo", items=[1], priority="critical").result(
            timeout=LONG_MS / 2000
        ).output == [1]
    assert low.progress().done < 5000
    low.cancel()
    wait_until(low.ready)


def test_a_yielded_slot_goes_to_urgent_work_without_queue_order(
    platform: Cell,
) -> None:
    urgent_work_starts(platform.client)


def test_a_yielded_slot_goes_to_urgent_work_with_prefetch_per_consumer(
    rabbitmq: Node, server: embedded.Server, tmp_path: Path
) -> None:
    environment = environment_of(
        server.url, "consumers", RLM_BROKER_URL=rabbitmq.url, RLM_NODE__SLICE_MS="5"
    )
    log = tmp_path / "worker.log"
    with (
        client_of(environment) as client,
        embedded.worker(environment, log=log, app="tests.system.per_consumer"),
    ):
        urgent_work_starts(client)


# --- faults of RabbitMQ -----------------------------------------------------------------------


def test_a_closed_connection_loses_no_message(
    platform: Cell, rabbitmq: Node, caplog: pytest.LogCaptureFixture
) -> None:
    platform.check(platform.submit())
    rabbitmq.ctl("close_all_connections", "by the test")

    with caplog.at_level(logging.INFO, "rlm_tasks"):
        job = platform.submit()
        assert depth(platform.client, "normal") >= 0
    assert caplog.messages == [], "the message was sent at once, not later by the sweep"
    platform.check(job)


def test_jobs_continue_after_an_outage_of_rabbitmq(platform: Cell, rabbitmq: Node) -> None:
    job = platform.submit(300, ms=10)
    wait_until(lambda: job.progress().done > 30)
    rabbitmq.ctl("stop_app")
    another = platform.submit()
    with pytest.raises(BrokerUnavailable, match=r"amqp://guest:\*\*\*@.* does not answer"):
        platform.client.queues()
    rabbitmq.ctl("start_app")

    platform.check(job)
    platform.check(another)


def test_an_item_longer_than_rabbitmqs_timeout_runs_once(platform: Cell, rabbitmq: Node) -> None:
    rabbitmq.ctl("eval", _consumer_timeout(1500, tick_ms=500))
    rabbitmq.ctl("close_all_connections", "so that the new timeout applies")
    try:
        params = {"ms": 4000, "journal": str(platform.folder / "journal")}
        job = platform.client.submit(
            operation="journalled",
            items=range(2),
            params=params,
            strategy=NWay(split_factor=2, min_chunk_size=1),
        )
        platform.check(job)
        assert sorted(platform.journal(job)) == [0, 1]
    finally:
        rabbitmq.ctl("eval", _consumer_timeout(1_800_000, tick_ms=60_000))
        rabbitmq.ctl("close_all_connections", "so that the old timeout applies")
    assert "PRECONDITION_FAILED" in platform.log.read_text(encoding="utf-8")


def _consumer_timeout(timeout_ms: int, *, tick_ms: int) -> str:
    """Return Erlang code that sets the consumer timeout, and how often it is checked."""
    return (
        f"application:set_env(rabbit, consumer_timeout, {timeout_ms}),"
        f" application:set_env(rabbit, channel_tick_interval, {tick_ms})."
    )


# --- several platforms, limits and TLS --------------------------------------------------------


def test_platforms_on_one_rabbitmq_do_not_receive_each_others_commands(platform: Cell) -> None:
    kombu.pools.reset()  # Celery itself does not see that RabbitMQ has closed its connections
    with (
        client_of(platform.environment) as one,
        client_of({**platform.environment, "RLM_NAMESPACE": "another"}) as another,
    ):
        # The test before has closed the worker's connections.  Until the worker is connected again,
        # it does not receive broadcasts.
        wait_until(lambda: len(one.app.control.ping(timeout=1, limit=1)) == 1)
        assert another.app.control.ping(timeout=0.5) == []


def test_a_deep_queue_accepts_no_more(platform: Cell) -> None:
    environment = {
        **platform.environment,
        "RLM_NAMESPACE": "deep",
        "RLM_ADMISSION__QUEUE_DEPTH": "3",
    }
    with client_of(environment) as first:
        first.batch_submit([{"operation": "echo", "items": [1]}] * 3)
        wait_until(lambda: depth(first, "normal") == 3)
    with client_of(environment) as second, pytest.raises(QueueFull):
        second.submit(operation="echo", items=[1])


def test_rabbitmq_is_used_over_tls_if_its_certificate_is_trusted(
    platform: Cell, rabbitmq: Node, tmp_path: Path
) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    proxy = TlsProxy(rabbitmq.port, context)
    url = f"amqps://guest:guest@127.0.0.1:{proxy.port}//"
    try:
        with client_of(
            {**platform.environment, "RLM_BROKER_URL": f"{url}?ssl_ca_certs={tmp_path}/ca.pem"}
        ) as client:
            assert depth(client, "normal") >= 0
        careless = client_of({**platform.environment, "RLM_BROKER_URL": url})
        with (
            careless as client,
            pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.queues()
    finally:
        proxy.close()


# --- reports ----------------------------------------------------------------------------------


def rlm_json(environment: dict[str, str], *arguments: str) -> Any:
    """Return the output of an rlm command with ``--json``, parsed."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "rlm", *arguments, "--json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_the_command_line_and_flower_show_rabbitmqs_queues(platform: Cell, tmp_path: Path) -> None:
    names = [f"rabbit.{each}" for each in ("critical", "high", "normal", "low")]

    assert [each["queue"] for each in rlm_json(platform.environment, "queues")] == names
    findings = rlm_json(platform.environment, "doctor")
    [broker] = [each for each in findings if each["check"] == "broker"]
    url = platform.environment["RLM_BROKER_URL"].replace(":guest@", ":***@")
    assert (broker["state"], broker["found"]) == ("ok", f"the broker at {url} answers")
    with flower(platform.environment, tmp_path / "flower.log") as flower_site:
        page = json.dumps(flower_site.data("/rlm/queues"))
    assert all(name in page for name in names)
