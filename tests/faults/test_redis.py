"""Each fault of Redis at each crash point.

Workers keep their process, reconnect, and finish with the exact answer."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import redis

from rlm_tasks import Job, JobNotFound
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.testing import embedded
from tests.faults.conftest import LEASE_S, Cell, cell
from tests.faults.proxy import Proxy
from tests.faults.test_matrix import NTH, points
from tests.support import wait_until


def held(cell: Cell, point: CrashPoint) -> tuple[subprocess.Popen[bytes], Job]:
    """Start a worker and a job that waits at the point; return both."""
    worker = cell.worker(fault=(point, "hold"), nth=NTH.get(point, 1))
    job = cell.submit()
    cell.wait_for_fault()
    return worker, job


def restart(server: embedded.Server, pause_s: float = 0.3) -> None:
    """Kill the server, and start it again from its append-only file after `pause_s`."""
    server.stop(kill=True)
    time.sleep(pause_s)  # the outage itself
    server.start()


@points
def test_redis_is_killed_and_restarted(
    durable: embedded.Server, on_durable: Cell, point: CrashPoint
) -> None:
    worker, job = held(on_durable, point)
    since = time.time()
    restart(durable)
    on_durable.go()

    on_durable.check(
        job, since=since, what="kill -9 of Redis and restart from its AOF", point=point
    )
    on_durable.check(on_durable.submit())
    assert worker.poll() is None, "the worker keeps its process"


@points
def test_redis_does_not_answer_for_a_while(
    durable: embedded.Server, on_durable: Cell, point: CrashPoint
) -> None:
    worker, job = held(on_durable, point)
    since = time.time()
    on_durable.client.ledger.store.client.client_pause(1500)
    on_durable.go()

    on_durable.check(job, since=since, what="CLIENT PAUSE of 1.5 s", point=point)
    assert worker.poll() is None


@points
def test_scripts_are_flushed_and_connections_killed(
    durable: embedded.Server, on_durable: Cell, point: CrashPoint
) -> None:
    worker, job = held(on_durable, point)
    since = time.time()
    server = on_durable.client.ledger.store.client
    server.script_flush()
    assert server.client_kill_filter(_type="normal", skipme=True) > 0
    on_durable.go()

    on_durable.check(job, since=since, what="SCRIPT FLUSH, CLIENT KILL of all", point=point)
    assert worker.poll() is None


@points
def test_queues_and_delivery_records_are_deleted(
    durable: embedded.Server, on_durable: Cell, point: CrashPoint
) -> None:
    worker, job = held(on_durable, point)
    since = time.time()
    name = on_durable.client.settings.namespace
    queues = [f"{name}:{name}.{priority}" for priority in ("critical", "high", "normal", "low")]
    wait_until(lambda: on_durable.client.ledger.store.client.exists(f"{name}:unacked") == 1)
    on_durable.client.ledger.store.client.delete(
        *queues, f"{name}:unacked", f"{name}:unacked_index"
    )
    on_durable.go()

    on_durable.check(job, since=since, what="queues, unacked, unacked_index deleted", point=point)
    on_durable.check(on_durable.submit())
    assert worker.poll() is None


def test_an_outage_longer_than_the_lease_repeats_no_item(
    durable: embedded.Server, on_durable: Cell
) -> None:
    worker = on_durable.worker()
    other = on_durable.worker()
    seconds = 3 * LEASE_S
    job = on_durable.client.submit(
        operation="journalled",
        items=range(3),
        params={"ms": seconds * 1000, "journal": str(on_durable.folder / "journal")},
        type="parallel",
        chunk_size=1,
    )
    wait_until(lambda: sum(node.state == "running" for node in job.tree()) == 3)
    restart(durable, pause_s=1.5 * LEASE_S)

    on_durable.check(job)
    assert sorted(on_durable.journal(job)) == [0, 1, 2]
    assert (worker.poll(), other.poll()) == (None, None)


def test_connections_are_reset_repeatedly(durable: embedded.Server, tmp_path: Path) -> None:
    proxy = Proxy(durable.port)
    through = embedded.Server(tmp_path, durable=True)
    through.port, through.url = proxy.port, f"redis://127.0.0.1:{proxy.port}/0"
    with cell(through, "resets", tmp_path, tmp_path / "worker.log") as own:
        worker = own.worker()
        job = own.submit(1500, ms=5)
        resets = 0
        until = time.monotonic() + 3
        while time.monotonic() < until:
            time.sleep(0.2)  # the rate of the resets
            resets += proxy.reset()
        since = time.time()

        own.check(job, since=since, what="TCP resets of all connections for 3 s", point="")
        assert resets > 10
        assert worker.poll() is None
        ran = own.journal(job)
        assert len(ran) < 1.5 * 1500, "little is computed twice"
        assert "Traceback" not in own.log.read_text()
    proxy.close()


@pytest.mark.parametrize("cut_s", [0.2, 0.5, 1.0, 1.5])
def test_the_last_second_is_cut_from_the_append_only_file(
    durable: embedded.Server, on_durable: Cell, tmp_path: Path, cut_s: float
) -> None:
    """After a power failure with `appendfsync everysec` the answer is right, or the job unknown."""
    worker = on_durable.worker()
    [file] = (tmp_path / "server" / "appendonlydir").glob("*.incr.aof")
    sizes: list[tuple[float, int]] = []
    jobs = [on_durable.submit(300, ms=5)]
    began = time.monotonic()
    while time.monotonic() - began < 1.7:
        sizes.append((time.monotonic(), file.stat().st_size))
        if len(jobs) == 1 and time.monotonic() - began > 1.2:
            jobs.append(on_durable.submit(300, ms=5))
        time.sleep(0.01)  # the resolution of the file's growth
    durable.stop(kill=True)
    keep = max(size for at, size in sizes if at <= time.monotonic() - cut_s)
    lost = file.stat().st_size - keep
    with file.open("rb+") as opened:
        opened.truncate(keep)
    durable.start()

    assert lost > 0
    known = 0
    for job in jobs:
        try:
            on_durable.check(job)
            known += 1
        except JobNotFound:
            assert cut_s >= 0.4, "a job from before the lost part of the file is known"
    assert known >= 1
    on_durable.check(on_durable.submit())
    assert worker.poll() is None


def test_a_replica_is_promoted_by_hand(durable: embedded.Server, tmp_path: Path) -> None:
    folder = tmp_path / "replica"
    folder.mkdir()
    replica = embedded.Server(folder, durable=True)
    replica.start()
    follower = redis.Redis.from_url(replica.url)
    follower.replicaof("127.0.0.1", durable.port)
    proxy = Proxy(durable.port)
    through = embedded.Server(tmp_path, durable=True)
    through.port, through.url = proxy.port, f"redis://127.0.0.1:{proxy.port}/0"
    try:
        wait_until(lambda: follower.info("replication")["master_link_status"] == "up")
        with cell(through, "failover", tmp_path, tmp_path / "worker.log") as own:
            worker = own.worker()
            job = own.submit(600, ms=5)
            wait_until(lambda: job.progress().done > 100)
            since = time.time()
            durable.stop(kill=True)
            follower.replicaof("NO", "ONE")
            proxy.target = replica.port
            proxy.reset()

            own.check(job, since=since, what="fail-over to a replica promoted by hand", point="")
            assert worker.poll() is None
    finally:
        proxy.close()
        replica.stop()
