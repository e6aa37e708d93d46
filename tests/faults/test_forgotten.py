"""Connections that the network forgets, without telling either end, and those that it resets.

A slow server, which also does not answer for a while, keeps its connections."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection

from resilience.bucket import Rate, TokenBucket
from resilience.errors import StoreUnavailable
from resilience.store import OnOutage, Store
from rlm_tasks.messaging.transports import leave_old_primaries
from rlm_tasks.testing import embedded
from tests.faults.conftest import name_of
from tests.faults.proxy import Proxy
from tests.support import wait_until

TIMEOUT_S = 1.0
"""The new connection is asked after half of it."""


@pytest.fixture
def proxy(server: embedded.Server) -> Iterator[Proxy]:
    own = Proxy(server.port)
    yield own
    own.close()


def through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


@contextmanager
def stopped(server: embedded.Server, seconds: float) -> Iterator[None]:
    """Stop the process of a server for a time."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(seconds, server.process.send_signal, (signal.SIGCONT,))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_a_call_is_repeated_and_all_other_connections_are_made_anew(proxy: Proxy) -> None:
    store = Store(through(proxy), timeout_s=TIMEOUT_S)
    pool = store.client.connection_pool
    for each in [pool.get_connection() for _ in range(3)]:
        pool.release(each)
    assert proxy.forget() == 3

    assert store.call(lambda client: client.ping())
    for each in [pool.get_connection() for _ in range(3)]:
        each.send_command("PING")
        assert each.read_response() == b"PONG"
        pool.release(each)
    assert proxy.forget() == 3 + 1 + 3, "one question, for all three"
    store.close()


@pytest.mark.parametrize("on_outage", ["raise", "answer", "patient"])
def test_a_call_whose_connection_is_reset_runs_once_more(
    server: embedded.Server, proxy: Proxy, on_outage: OnOutage
) -> None:
    store, admin = Store(through(proxy), timeout_s=TIMEOUT_S), redis.Redis.from_url(server.url)
    resets, seen = [True, True, False, True], set[str]()

    def blocked() -> set[str]:
        ids = {each["id"] for each in admin.client_list() if each["cmd"] == "blpop"} - seen
        seen.update(ids)
        return ids

    def reset() -> None:
        wait_until(blocked)
        proxy.reset()

    def command(client: redis.Redis) -> Any:
        if resets.pop():
            threading.Thread(target=reset).start()
            return client.blpop(["nothing"], timeout=TIMEOUT_S)
        return client.ping()

    assert store.call(command, on_outage=on_outage)
    with pytest.raises(StoreUnavailable):
        store.call(command, on_outage=on_outage)
    assert resets == [], "no third attempt"
    store.close()
    admin.close()


def test_a_guard_does_not_decide_alone(proxy: Proxy, request: pytest.FixtureRequest) -> None:
    store = Store.from_url(through(proxy), namespace=name_of(request), limit_timeout_s=TIMEOUT_S)
    bucket = TokenBucket("service", store, requests=Rate(10, per_s=60, burst=5))
    assert bucket.acquire(requests=1)
    proxy.forget()

    assert bucket.acquire(requests=1)
    assert not store.is_away
    store.close()


def test_a_slow_server_keeps_its_connections(tmp_path: Path) -> None:
    server = embedded.Server(tmp_path)
    server.start()
    store = Store(server.url, timeout_s=TIMEOUT_S)
    try:
        before = store.call(lambda client: client.client_id())
        with stopped(server, 0.8 * TIMEOUT_S):
            assert store.call(lambda client: client.client_id()) == before
        assert store.call(lambda client: client.client_id()) == before
    finally:
        store.close()
        server.stop(kill=True)


@pytest.mark.parametrize("seconds", [0.8, 1.3])
def test_a_server_that_delays_writes_takes_them(server: embedded.Server, seconds: float) -> None:
    """A managed failover pauses writes; reads, and new connections, are answered meanwhile."""
    store = Store(server.url, timeout_s=TIMEOUT_S)
    store.client.client_pause(int(seconds * 1000), all=False)

    assert store.refusal() is None
    store.close()


def test_kombu_without_a_timeout_does_not_wait_for_ever(proxy: Proxy) -> None:
    leave_old_primaries()
    with Connection(through(proxy)) as connection, connection.SimpleQueue("forgotten") as queue:
        queue.put(1)
        proxy.forget()

        with pytest.raises(connection.connection_errors, match="got no answer, and a new one did"):
            queue.put(2)
        queue.put(3)
        assert queue.get(timeout=10).payload == 1
