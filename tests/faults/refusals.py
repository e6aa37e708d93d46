"""A server that refuses: full, a replica, busy, without its disk, behind a password, or away.

`test_outages` puts one real server into each state of `STATES`; begin there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import redis

from resilience.store import Store
from rlm_tasks import Client, Job, NWay
from rlm_tasks.engine.crashpoints import CrashPoint
from rlm_tasks.ledger.ledger import Ledger
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell, cell
from tests.faults.proxy import Proxy
from tests.faults.test_matrix import NTH
from tests.support import wait_until

PASSWORD = "correct"


class Refusing:
    """One server, and the states that it can be put into."""

    def __init__(self, server: embedded.Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self.admin = redis.Redis.from_url(server.url, password=PASSWORD)

    @contextmanager
    def settings(self, **values: object) -> Iterator[None]:
        """Set values of the server's configuration for a while."""
        names = [name.replace("_", "-") for name in values]
        before = {name: self.admin.config_get(name)[name] for name in names}
        for name, value in zip(names, values.values(), strict=True):
            self.admin.config_set(name, str(value))
        try:
            yield
        finally:
            for name, value in before.items():
                self.admin.config_set(name, value)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Leave no memory for a write."""
        with self.settings(maxmemory=1):
            yield

    @contextmanager
    def replica(self) -> Iterator[None]:
        """Make the server a replica of nobody."""
        self.admin.replicaof("127.0.0.1", embedded.free_port())
        try:
            yield
        finally:
            self.admin.replicaof("NO", "ONE")

    @contextmanager
    def lost_primary(self) -> Iterator[None]:
        """Make it a replica that answers nothing without its primary."""
        with self.settings(replica_serve_stale_data="no"), self.replica():
            yield

    @contextmanager
    def few_replicas(self) -> Iterator[None]:
        """Require a replica that does not exist."""
        with self.settings(min_replicas_to_write=1):
            yield

    @contextmanager
    def disk(self) -> Iterator[None]:
        """Let its snapshots fail: a folder has the name of the file."""
        blocker = self._folder / "dump.rdb" / "full"
        blocker.mkdir(parents=True)
        with self.settings(save="3600 1"):
            self.admin.bgsave()
            wait_until(lambda: self.admin.info("persistence")["rdb_last_bgsave_status"] == "err")
            yield
            blocker.rmdir()
            blocker.parent.rmdir()
            self.admin.bgsave()
            wait_until(lambda: self.admin.info("persistence")["rdb_last_bgsave_status"] == "ok")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Run a script without an end."""
        runner = redis.Redis.from_url(self._server.url, password=PASSWORD, socket_timeout=60)

        def run() -> None:
            with suppress(redis.RedisError):
                runner.eval("while true do end", 0)

        with self.settings(busy_reply_threshold=1):
            thread = threading.Thread(target=run)
            thread.start()
            wait_until(self._is_busy)
            try:
                yield
            finally:
                self.admin.script_kill()
                thread.join()
                wait_until(lambda: not self._is_busy())

    def _is_busy(self) -> bool:
        try:
            self.admin.ping()
        except redis.RedisError as error:
            return "BUSY" in str(error)
        return False

    @contextmanager
    def password(self) -> Iterator[None]:
        """Require a password that clients do not know."""
        with self.settings(requirepass=PASSWORD):
            self.admin.client_kill_filter(_type="normal", skipme=True)
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """End the server, and start an empty one."""
        self._server.stop(kill=True)
        yield
        self._server.start()


STATES = ("full", "replica", "lost_primary", "few_replicas", "disk", "busy", "password", "away")


SIZES = (10, 1_000, 20_000)
"""Bytes of an item's output."""


def flicker(refusing: Refusing, seconds: float, random: Random) -> int:
    """Refuse writes for 5 to 100 ms, again and again, and return how often.

    Memory and the number of replicas are the reasons, in turn.
    """
    until, times = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        with refusing.few_replicas() if times % 2 else refusing.full():
            time.sleep(random.uniform(0.005, 0.1))  # the refusal itself
        times += 1
        time.sleep(random.uniform(0.005, 0.1))  # the time between two refusals
    return times


def sized_job(client: Client, *, size: int, guarded: bool = False, items: int = 60) -> Job:
    """Submit a job that splits, with outputs of a size."""
    return client.submit(
        operation="sized_and_guarded" if guarded else "sized",
        items=range(items),
        params={"bytes": size},
        strategy=NWay(split_factor=3, min_chunk_size=10),
    )


def check_sized(job: Job, *, within_s: float = 40.0) -> None:
    """Assert that the job ended right, with each item once."""
    result = job.result(timeout=within_s)
    assert [index for index, _ in result.output] == list(range(result.total))
    assert (result.done, result.failed_count, result.skipped) == (result.total, 0, 0)


def flickered(own: Cell, refusing: Refusing, *, seconds: float, seed: int) -> int:
    """Run jobs of all sizes while writes are refused now and then; return how many ended right."""
    own.worker()
    jobs = [
        sized_job(own.client, size=size, guarded=guarded, items=int(60 * seconds))
        for size in SIZES
        for guarded in (False, True)
    ]
    assert flicker(refusing, seconds, Random(seed)) > seconds
    for job in jobs:
        check_sized(job, within_s=60 + 10 * seconds)
    return len(jobs)


def filled(own: Cell, refusing: Refusing, point: CrashPoint, size: int) -> float:
    """Fill the server at a crash point, give it room, and return the seconds from then to the end.

    Asserts that the answer is right, and that the worker warned once.
    """
    worker = own.worker(fault=(point, "hold"), nth=NTH.get(point, 1))
    job = sized_job(own.client, size=size)
    own.wait_for_fault()
    with refusing.full():
        own.go()
        wait_until(lambda: "is full (" in own.log.read_text())
        time.sleep(0.5)  # longer than the first repeats
        assert not job.status.final
    since = time.monotonic()
    check_sized(job)
    took = time.monotonic() - since
    assert worker.poll() is None, "the worker keeps its process"
    log = own.log.read_text()
    assert "failed outside" not in log
    assert log.count("is full (") == 1, log
    return took


@contextmanager
def pair(folder: Path) -> Iterator[tuple[embedded.Server, embedded.Server, Proxy]]:
    """Run a primary, a replica that has caught up, and a proxy whose target is the primary."""
    servers = [embedded.Server(folder / name, durable=True) for name in ("one", "two")]
    for name, server in zip(("one", "two"), servers, strict=True):
        (folder / name).mkdir()
        server.start()
    proxy = Proxy(servers[0].port)
    try:
        with redis.Redis.from_url(servers[1].url) as follower:
            follower.replicaof("127.0.0.1", servers[0].port)
            wait_until(lambda: follower.info("replication")["master_link_status"] == "up")
        yield servers[0], servers[1], proxy
    finally:
        proxy.close()
        for server in servers:
            server.stop(kill=True)


def failed_over(folder: Path, *, keeps: bool) -> float:
    """Move the primary under load; the old one lives on as a replica of the new one.

    With `keeps`, open connections stay on the old primary, as behind a load balancer; without, they
    are reset.  Return the seconds from then to the first progress.  Asserts that the answer is
    right, and that the same client and the same worker go on.
    """
    with pair(folder) as (old, new, proxy):
        through = embedded.Server(folder)
        through.port, through.url = proxy.port, f"redis://127.0.0.1:{proxy.port}/0"
        with cell(
            through, "failover", folder, folder / "worker.log", RLM_NODE__TARGET_MS="200"
        ) as own:
            worker = own.worker()
            job = own.submit(1500, ms=5)
            wait_until(lambda: job.progress().done > 100)
            with (
                redis.Redis.from_url(new.url) as promoted,
                redis.Redis.from_url(old.url) as demoted,
            ):
                promoted.replicaof("NO", "ONE")
                demoted.replicaof("127.0.0.1", new.port)
            proxy.target = new.port
            if not keeps:
                proxy.reset()
            since = time.monotonic()
            ran = len(own.journal(job))
            behind = Ledger(Store(new.url), own.client.ledger.keys, own.client.settings.ledger)
            done = int(behind.facts(job.id)["done"])
            wait_until(lambda: int(behind.facts(job.id)["done"]) > done, within_s=20)
            took = time.monotonic() - since
            assert ran < 1500, "the failover came while items were left"
            own.check(job, within_s=60)
            own.check(own.submit(), within_s=30)
            assert worker.poll() is None, "the worker keeps its process"
            return took


def forgotten(folder: Path) -> float:
    """Let the network forget all connections under load; return the seconds until all is well.

    Asserts that the answers are right, that the client and the worker go on, and that no call was
    lost.
    """
    with embedded.server(durable=True) as server:
        proxy = Proxy(server.port)
        through = embedded.Server(folder)
        through.port, through.url = proxy.port, f"redis://127.0.0.1:{proxy.port}/0"
        try:
            with cell(through, "forgotten", folder, folder / "worker.log") as own:
                worker = own.worker()
                job = own.submit(300, ms=5)
                wait_until(lambda: job.progress().done > 50)
                assert proxy.forget() > 5
                since = time.monotonic()
                own.check(job, within_s=60)
                own.check(own.submit(), within_s=60)
                took = time.monotonic() - since
                assert worker.poll() is None, "the worker keeps its process"
                log = own.log.read_text()
                assert "Connection to broker lost" not in log, log
                assert "does not answer" not in log, log
                return took
        finally:
            proxy.close()
