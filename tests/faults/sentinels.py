"""A primary, a replica and three sentinels that watch them, all with passwords, as processes of a test's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from rlm_tasks import embedded
from tests.support import wait_until

MASTER = "rlm-primary"
PASSWORD, SENTINEL_PASSWORD = "of redis#1", "of-sentinels"
_QUORUM = 2
_CONFIGURATION = """
port {port}
bind 127.0.0.1
dir {folder}
requirepass {sentinel_password}
sentinel sentinel-pass {sentinel_password}
sentinel monitor {master} 127.0.0.1 {watched} {quorum}
sentinel auth-pass {master} "{password}"
sentinel down-after-milliseconds {master} 1000
sentinel failover-timeout {master} 1000
"""


@dataclass(frozen=True)
class Watched:
    """What runs, and how it is found."""

    servers: tuple[embedded.Server, embedded.Server]
    sentinels: list[redis.Redis]
    url: str

    @property
    def primary(self) -> embedded.Server:
        """The server that is written to now."""
        return next(each for each in self.servers if role(each) == "master")

    def settle(self) -> None:
        """Wait until the other server has all that was written so far, and could take over."""
        [other] = [each for each in self.servers if role(each) == "slave"]
        wait_until(lambda: asked(other).info("replication")["master_link_status"] == "up")
        wait_until(lambda: asked(self.primary).wait(1, 1000) == 1)

    def fail_over(self) -> None:
        """Have the sentinels promote the other server while the primary lives, as one does before maintenance."""
        self.sentinels[0].execute_command("SENTINEL", "FAILOVER", MASTER)  # type: ignore[no-untyped-call]  # redis-py's own


def asked(server: embedded.Server) -> redis.Redis:
    """Return a client of one of the two servers."""
    return redis.Redis(port=server.port, password=PASSWORD)


def role(server: embedded.Server) -> str:
    """Return what a server is at the moment, '' while it is away."""
    try:
        return str(asked(server).info("replication")["role"])
    except redis.ConnectionError:
        return ""


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """Run all of them for the length of a block; it begins when the sentinels know each other and both servers."""
    with ExitStack() as stack:
        primary, replica = (_server(stack, folder / name) for name in ("primary", "replica"))
        asked(replica).replicaof("127.0.0.1", primary.port)
        wait_until(lambda: asked(replica).info("replication")["master_link_status"] == "up")
        sentinels = [_sentinel(stack, folder / f"sentinel{n}", primary) for n in range(3)]
        wait_until(lambda: all(map(_is_ready, sentinels)))
        first, *others = [each.connection_pool.connection_kwargs["port"] for each in sentinels]
        url = f"sentinel://:of%20redis%231@127.0.0.1:{first}/0" + "".join(f";sentinel://127.0.0.1:{port}" for port in others)
        yield Watched((primary, replica), sentinels, url)


def _server(stack: ExitStack, folder: Path) -> embedded.Server:
    folder.mkdir()
    own = embedded.Server(folder, durable=True)
    own.start()
    stack.callback(own.stop)
    client = redis.Redis(port=own.port)
    client.config_set("repl-diskless-sync-delay", 0)
    client.config_set("masterauth", PASSWORD)
    client.config_set("requirepass", PASSWORD)
    return own


def _sentinel(stack: ExitStack, folder: Path, primary: embedded.Server) -> redis.Redis:
    folder.mkdir()
    port, file = embedded.free_port(), folder / "sentinel.conf"
    told = {"master": MASTER, "quorum": _QUORUM, "password": PASSWORD, "sentinel_password": SENTINEL_PASSWORD}
    file.write_text(_CONFIGURATION.format(port=port, folder=folder, watched=primary.port, **told), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        command = [embedded.server_binary(), str(file), "--sentinel"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    stack.callback(embedded.end, process)
    return redis.Redis(port=port, password=SENTINEL_PASSWORD)


def _is_ready(sentinel: redis.Redis) -> bool:
    try:
        known = sentinel.sentinel_masters().get(MASTER, {})
    except redis.ConnectionError:
        return False
    return bool(known.get("num-other-sentinels", 0) >= _QUORUM and known["num-slaves"] == 1)
