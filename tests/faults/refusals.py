"""A server that refuses: full, a replica, busy, without its disk, behind a password, or away.

`test_outages` puts one real server into each state of `STATES`; begin there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from rlm_tasks.testing import embedded
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


def flicker(refusing: Refusing, seconds: float, pause_s: Callable[[], float]) -> int:
    """Refuse and accept writes in turn, by two settings; return the number of refusals."""
    until, times = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        with refusing.few_replicas() if times % 2 else refusing.full():
            time.sleep(pause_s())  # the refusal itself
        times += 1
        time.sleep(pause_s())  # the time between two refusals
    return times
