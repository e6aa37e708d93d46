"""Jobs leave nothing behind in the worker, and no key without an expiry in the server."""

from __future__ import annotations

import socket
import threading
from typing import Any

import psutil
import pytest

from rlm_tasks import Binary, Client, JobNotFound, NWay
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until


def test_a_hundred_jobs_leave_nothing_behind(server: embedded.Server, logs: Any) -> None:
    environment = environment_of(server.url, "tidy")
    with (
        client_of(environment) as client,
        embedded.worker(environment, log=logs / "tidy.log") as process,
    ):
        store = client.ledger.store.client

        def run_some(count: int) -> None:
            for job in client.batch_submit(
                [
                    {
                        "operation": "collect",
                        "items": list(range(60)),
                        "strategy": Binary(min_chunk_size=10),
                    }
                ]
                * count
            ):
                assert job.get(timeout=60) == list(range(60))

        run_some(20)
        memory = sum(each.memory_info().rss for each in psutil.Process(process.pid).children())
        channels = store.pubsub_channels("tidy*")
        run_some(100)

        assert store.pubsub_channels("tidy*") == channels
        grown = (
            sum(each.memory_info().rss for each in psutil.Process(process.pid).children()) - memory
        )
        assert grown < 16 * 2**20
        # Celery's registry of queues and its delivery records stay as long as the queues.
        own = (
            "_kombu.binding",
            "unacked",
            "jobs",
            "tidy.critical",
            "tidy.high",
            "tidy.normal",
            "tidy.low",
        )
        wait_until(lambda: not store.exists("tidy:tidy.normal"))
        wait_until(lambda: store.zcard(client.ledger.keys.due) == 0)  # by the next sweep
        keys = [key.decode().removeprefix("tidy:") for key in store.scan_iter("tidy:*")]
        lasting = [
            key for key in keys if store.ttl(f"tidy:{key}") == -1 and not key.startswith(own)
        ]
        assert lasting == []
        assert not [
            key
            for key in keys
            if key.endswith((":items", ":blocks", ":due", ":inflight", ":splits"))
        ]


def test_an_open_job_lives_for_a_month_and_its_result_for_the_set_time(
    server: embedded.Server, logs: Any
) -> None:
    environment = environment_of(server.url, "brief", RLM_RESULT_TTL_S="60")
    with client_of(environment) as client:
        store = client.ledger.store.client

        def keys() -> list[bytes]:
            return list(store.scan_iter(f"brief:{{{job.id}}}*", count=10_000))

        job = client.submit(operation="sum", items=[1, 2, 3])
        assert min(store.ttl(key) for key in keys()) > 29 * 86_400
        with embedded.worker(environment, log=logs / "brief.log"):
            assert job.get(timeout=10) == 6
        assert {0 < store.ttl(key) <= 60 for key in keys()} == {True}
        for key in keys():
            store.pexpire(key, 1)
        wait_until(lambda: not keys())
        with pytest.raises(JobNotFound):
            job.result()
        assert client.jobs() == []


def test_two_namespaces_do_not_share_jobs(
    server: embedded.Server, client: Client, client_without_worker: Client
) -> None:
    """The session's worker serves namespace `test`; a job of another namespace waits."""
    mine = client.submit(operation="sum", items=range(10))
    other = client_without_worker.submit(operation="sum", items=range(10))

    assert mine.get(timeout=30) == 45
    assert not other.ready()
    assert other.id not in {job.id for job in client.jobs(1000)}
    with pytest.raises(JobNotFound):
        client.job(other.id)
    prefix = f"{client_without_worker.settings.namespace}:"
    assert client_without_worker.ledger.store.client.llen(f"{prefix}{prefix[:-1]}.normal") == 1


class Spy(threading.Thread):
    """Watch every message that is pushed to a queue of one namespace, by MONITOR."""

    def __init__(self, port: int, prefix: str) -> None:
        super().__init__(daemon=True)
        # redis-py's monitor is too slow here: it parses each of several hundred thousand lines.
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._push = f'"LPUSH" "{prefix}'.encode()
        self.sizes: list[int] = []
        self._socket.sendall(b"MONITOR\r\n")
        assert self._socket.recv(5) == b"+OK\r\n"
        self.start()

    def run(self) -> None:
        for line in self._socket.makefile("rb"):
            if self._push in line:
                self.sizes.append(len(line.replace(b'\\"', b'"')))

    def stop(self) -> None:
        self._socket.sendall(b"QUIT\r\n")
        self.join(10)
        self._socket.close()


def test_two_thousand_cuts_leave_every_message_under_4_kb(
    client: Client, server: embedded.Server
) -> None:
    spy = Spy(server.port, "test:test.")

    flat = client.execute(operation="collect", items=range(1200), type="sequential", timeout=100)
    deep = client.execute(
        operation="sum",
        items=list(range(1024)),
        strategy=Binary(min_chunk_size=1, max_depth=10),
        timeout=100,
    )
    tails = client.submit(
        {
            "operation": "collect",
            "items": range(600),
            "strategy": NWay(split_factor=2, min_chunk_size=1, max_depth=10),
        }
    ).result(timeout=100)
    spy.stop()

    assert flat.output == list(range(1200))
    assert deep.output == sum(range(1024))
    assert deep.metrics.max_depth == 10
    assert tails.output == list(range(600))
    assert len(spy.sizes) > 2000
    assert max(spy.sizes) < 4096


def test_a_job_of_two_thousand_tail_calls_keeps_its_messages_small(
    server: embedded.Server, logs: Any
) -> None:
    environment = environment_of(
        server.url, "tails", RLM_NODE__TARGET_MS="0.01", RLM_NODE__SLICE_MS="0.01"
    )
    with (
        client_of(environment) as client,
        embedded.worker(environment, log=logs / "tails.log", slots=1),
    ):
        spy = Spy(server.port, "tails:")
        result = client.execute(
            operation="collect", items=range(2100), type="sequential", timeout=100
        )
        spy.stop()

    assert result.output == list(range(2100))
    assert result.metrics.yields >= 2000
    assert max(spy.sizes) < 4096
    assert max(spy.sizes) - min(spy.sizes) < 64


def test_the_counts_of_chords_go_with_their_job(client: Client) -> None:
    store = client.ledger.store.client
    job = client.submit(
        operation="sum",
        items=list(range(256)),
        strategy=Binary(min_chunk_size=1, max_depth=10),
    )
    assert job.result(timeout=60).metrics.splits > 100

    def counts() -> list[bytes]:
        every = store.scan_iter(f"test:celery-taskset-meta-{job.id}-*", count=10_000)
        return [key for key in every if not key.endswith(b".c")]

    wait_until(lambda: not counts() and not store.exists("test:test.normal"))
    assert counts() == []
