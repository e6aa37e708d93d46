"""A Redis that refuses counts as an outage: each call says so, and no job is lost.

The states are real: a full server, a replica, a busy script, a wrong password."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import (
    StoreFull,
    StoreInCluster,
    StoreReadOnly,
    StoreUnauthorised,
    StoreUnavailable,
)
from resilience.store import Store
from rlm_tasks import Client, Job, RlmError
from rlm_tasks.diagnosis.doctor import examine
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell
from tests.faults.refusals import STATES, Refusing, failed_over, filled, flickered, forgotten
from tests.integration.conftest import client_of, environment_of

SECRET = "item-that-must-not-be-told"
Prepared = tuple[Client, Job, Job, Refusing]

WRITES: dict[str, Callable[[Client, Job, Job], Any]] = {
    "submit": lambda client, *_: client.submit(operation="echo", items=[1, 2]),
    "submit of large items": lambda client, *_: client.submit(
        operation="echo", items=[SECRET * 1000 for _ in range(100)]
    ),
    "batch_submit": lambda client, *_: client.batch_submit(
        [{"operation": "echo", "items": [SECRET]}] * 2
    ),
    "batch_execute": lambda client, *_: client.batch_execute(
        [{"operation": "echo", "items": [1]}], timeout=0.1
    ),
    "execute": lambda client, *_: client.execute(operation="echo", items=[1], timeout=0.1),
    "cancel": lambda _client, queued, _: queued.cancel(),
    "retry_failed": lambda _client, _queued, failed: failed.retry_failed(),
    "force": lambda client, *_: client.pressure.force("high", for_s=60),
}
READS: dict[str, Callable[[Client, Job, Job], Any]] = {
    "breaker.open": lambda client, *_: client.breakers.get("service").open(),
    "check": lambda client, *_: client.check(),
    "job": lambda client, queued, _: client.job(queued.id),
    "jobs": lambda client, *_: client.jobs(),
    "listed": lambda client, *_: client.listed(),
    "quarantine": lambda client, *_: client.quarantine(),
    "status": lambda client, *_: client.status(),
    "queues": lambda client, *_: client.queues(),
    "limits": lambda client, *_: client.limits(),
    "at_work": lambda client, *_: client.at_work(),
    "breakers": lambda client, *_: client.breakers.status(),
    "usage": lambda client, *_: client.usage.all(),
    "alerts": lambda client, *_: client.alerts.history(),
    "events": lambda client, *_: client.events.recent(5),
    "snapshots": lambda client, *_: client.snapshots("echo"),
    "fault_patterns": lambda client, *_: client.fault_patterns(),
    "recovery": lambda client, *_: client.recovery_success_rate(),
    "optimization": lambda client, *_: client.get_optimization_stats(),
    "progress": lambda _client, queued, _: queued.progress(),
    "explain": lambda _client, queued, _: queued.explain(),
    "tree": lambda _client, queued, _: queued.tree(),
    "status of a job": lambda _client, queued, _: queued.status,
    "failures": lambda _client, _queued, failed: failed.failures(),
    "partial": lambda _client, queued, _: queued.partial(),
    "outputs": lambda _client, _queued, failed: list(failed.outputs()),
    "wait": lambda _client, queued, _: queued.wait(timeout=0.05),
    "result": lambda _client, queued, _: queued.result(timeout=0.05),
    "result of an ended job": lambda _client, _queued, failed: failed.result(timeout=0.05),
    "recall": lambda client, *_: client.recall(),
}
KINDS = {
    "full": StoreFull,
    "replica": StoreReadOnly,
    "lost_primary": StoreUnavailable,
    "few_replicas": StoreReadOnly,
    "disk": StoreReadOnly,
    "busy": StoreUnavailable,
    "password": StoreUnauthorised,
    "away": StoreUnavailable,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """A client, a job that waits for a worker, a job that failed, and the server's states."""
    folder = tmp_path_factory.mktemp("refusing")
    server = embedded.Server(folder)
    server.start()
    url = server.url.replace("//", "//:wrong@")
    environment = environment_of(url, "outages", RLM_GUARD_TIMEOUT_S="1")
    try:
        with client_of(environment) as client:
            with embedded.worker(environment, log=folder / "worker.log"):
                failed = client.submit(operation="fail_odd", items=[1, 2], continue_on_error=True)
                failed.wait(timeout=30)
            queued = client.submit(operation="echo", items=[SECRET])
            yield client, queued, failed, Refusing(server, folder)
    finally:
        server.stop(kill=True)


class ClusterNode(embedded.Server):
    """A server in cluster mode."""

    def _command(self) -> list[str]:
        bus = ["--cluster-port", str(embedded.free_port())]
        return [*super()._command(), "--cluster-enabled", "yes", *bus]


@pytest.mark.parametrize("state", STATES)
def test_each_public_call_raises_only_our_errors_while_redis_refuses(
    prepared: Prepared, state: str
) -> None:
    client, queued, failed, refusing = prepared
    told: dict[str, Exception] = {}
    with getattr(refusing, state)():
        for name, call in {**WRITES, **READS}.items():
            try:
                call(client, queued, failed)
            except Exception as error:
                told[name] = error
        health = [client.health_check(), client.health_check(detailed=True)]
        if state == "password":
            with pytest.raises(StoreUnauthorised):
                queued.wait()  # not for ever: waiting does not help

    raw = {name: repr(error) for name, error in told.items() if not isinstance(error, RlmError)}
    assert raw == {}
    texts = [str(error) for error in told.values()]
    assert [text for text in texts if SECRET in text or "wrong" in text] == []
    assert [text for text in texts if "Command #" in text] == []
    wrong_kind = {
        name: told.get(name) for name in WRITES if not isinstance(told.get(name), KINDS[state])
    }
    assert wrong_kind == {}
    assert [each["status"] for each in health] == ["failing", "failing"]
    assert client.submit(operation="echo", items=[1]).id, "afterwards all is well"


def test_writes_that_are_refused_for_moments_fail_no_job(
    durable: embedded.Server, on_durable: Cell, tmp_path: Path
) -> None:
    refusing = Refusing(durable, tmp_path / "server")

    assert flickered(on_durable, refusing, seconds=3.0, seed=1) == 6
    assert on_durable.workers[0].poll() is None, "the worker keeps its process"
    log = on_durable.log.read_text()
    assert [each for each in ("failed outside", "Traceback") if each in log] == [], log


@pytest.mark.parametrize(
    "point", [CrashPoint.AFTER_CLAIM, CrashPoint.BEFORE_FINISH, CrashPoint.BEFORE_CLOSE]
)
def test_a_full_redis_stops_a_job_and_room_lets_it_go_on(
    durable: embedded.Server, on_durable: Cell, tmp_path: Path, point: CrashPoint
) -> None:
    refusing = Refusing(durable, tmp_path / "server")

    assert filled(on_durable, refusing, point, size=20_000) < 10.0


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "reset"])
def test_a_failover_that_leaves_the_old_primary_alive(tmp_path: Path, keeps: bool) -> None:
    """Its connections stay open, or are reset; plain URLs without sentinels."""
    assert failed_over(tmp_path, keeps=keeps) < 10.0


def test_connections_that_the_network_forgets_are_dropped_together(tmp_path: Path) -> None:
    assert forgotten(tmp_path) < 10.0


def test_a_node_of_a_cluster_is_named_by_submit_worker_and_doctor(tmp_path: Path) -> None:
    server = ClusterNode(tmp_path)
    server.start()
    environment, sentence = environment_of(server.url, "clustered"), "is one node of a cluster"
    try:
        with client_of(environment) as client:
            with pytest.raises(StoreInCluster, match=sentence):
                client.submit(operation="echo", items=[1])
            [fault] = [each for each in examine(client, client.app) if sentence in each.found]
        command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "worker"]
        worker = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        server.stop(kill=True)

    assert (fault.check, fault.state) == ("redis", "fault")
    assert worker.returncode == 1
    output = worker.stdout + worker.stderr
    assert sentence in output
    assert "Traceback" not in output


def test_a_database_that_does_not_exist_is_named(server: embedded.Server) -> None:
    with pytest.raises(StoreUnavailable, match=r"has no such database .*; correct the number in"):
        Store(server.url.replace("/0", "/99")).check()


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Run a server that gives one answer to whatever it reads, and return its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as peer, suppress(OSError):
                    while peer.recv(65_536):
                        peer.sendall(answer)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$" + SECRET.encode() + b"\r\n",
        b"\xff\xfe\r\n",
        b"*1\r\n$2\r\nxx\r\n",
    ],
    ids=["a web server", "no number", "binary", "no handshake"],
)
def test_a_server_that_is_no_redis_is_told(answer: bytes) -> None:
    with answering(answer) as url:
        store = Store(url)
        for call in (store.check, lambda: store.call(lambda client: client.ping())):
            with pytest.raises(StoreUnavailable, match="answers, but not as Redis does; ") as told:
                call()
            assert SECRET not in str(told.value)
        store.close()


def test_a_server_without_free_connections_is_told(prepared: Prepared) -> None:
    client, _, _, refusing = prepared
    with refusing.settings(maxclients=1):
        refusing.admin.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(StoreUnavailable, match="takes no more connections; raise its maxcl"):
            client.listed()


def test_the_doctor_and_explain_say_that_redis_is_full(prepared: Prepared) -> None:
    client, _, _, refusing = prepared
    queued = client.submit(operation="echo", items=[1])
    with refusing.full():
        found = {each.check: each for each in examine(client, client.app)}
        why = queued.explain()

    assert found["writes"].state == "fault"
    assert "is full (" in found["writes"].found
    assert "No job goes on: Redis at" in why
    assert "is full (" in why
    assert "No job" not in queued.explain(), "afterwards all is well"
