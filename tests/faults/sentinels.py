"""A primary, a replica and three sentinels that watch them, all with passwords, for one test.

The sentinel tests call it; begin with `watched`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from rlm_tasks.testing import embedded
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
    """The two servers, clients of the sentinels, and the URL for the platform."""

    servers: tuple[embedded.Server, embedded.Server]
    sentinels: list[redis.Redis]
    url: str

    @property
    def primary(self) -> embedded.Server:
        """The primary; this waits until there is exactly one."""
        found: list[embedded.Server] = []

        def one_is() -> bool:
            found[:] = [each for each in self.servers if replication(each).get("role") == "master"]
            return len(found) == 1

        wait_until(one_is)
        return found[0]

    def settle(self) -> None:
        """Wait until the replica has all writes so far, so that it can become the primary."""
        primary = self.primary
        [other] = {*self.servers} - {primary}
        wait_until(lambda: replication(other).get("master_link_status") == "up")
        with asked(primary) as client:
            wait_until(lambda: client.wait(1, 1000) == 1)


def asked(server: embedded.Server) -> redis.Redis:
    """Return a client of one of the two servers."""
    return redis.Redis(port=server.port, password=PASSWORD)


def replication(server: embedded.Server) -> dict[str, Any]:
    """Return the replication section of a server's INFO, {} while it is away."""
    with asked(server) as client:
        try:
            return client.info("replication")  # type: ignore[no-any-return]  # redis-py does not say
        except redis.ConnectionError:
            return {}


@contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """Run servers and sentinels for the length of a block.

    The block begins when the sentinels know each other and both servers."""
    with ExitStack() as stack:
        primary, replica = (_server(stack, folder / name) for name in ("primary", "replica"))
        with asked(replica) as client:
            client.replicaof("127.0.0.1", primary.port)
        wait_until(lambda: replication(replica).get("master_link_status") == "up")
        sentinels = [_sentinel(stack, folder / f"sentinel{n}", primary) for n in range(3)]
        wait_until(lambda: all(map(_is_ready, sentinels)))
        first, *others = [each.connection_pool.connection_kwargs["port"] for each in sentinels]
        url = f"sentinel://:of%20redis%231@127.0.0.1:{first}/0" + "".join(
            f";sentinel://127.0.0.1:{port}" for port in others
        )
        yield Watched((primary, replica), sentinels, url)


def _server(stack: ExitStack, folder: Path) -> embedded.Server:
    folder.mkdir()
    own = embedded.Server(folder, durable=True)
    own.start()
    stack.callback(own.stop)
    with redis.Redis(port=own.port) as client:
        client.config_set("repl-diskless-sync-delay", 0)
        client.config_set("masterauth", PASSWORD)
        client.config_set("requirepass", PASSWORD)
    return own


def _sentinel(stack: ExitStack, folder: Path, primary: embedded.Server) -> redis.Redis:
    folder.mkdir()
    port, file = embedded.free_port(), folder / "sentinel.conf"
    values = {
        "master": MASTER,
        "quorum": _QUORUM,
        "password": PASSWORD,
        "sentinel_password": SENTINEL_PASSWORD,
    }
    file.write_text(
        _CONFIGURATION.format(port=port, folder=folder, watched=primary.port, **values),
        encoding="utf-8",
    )
    with (folder / "log").open("wb") as log:
        command = [embedded.server_binary(), str(file), "--sentinel"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    stack.callback(embedded.end, process)
    return stack.enter_context(redis.Redis(port=port, password=SENTINEL_PASSWORD))


def _is_ready(sentinel: redis.Redis) -> bool:
    try:
        known = sentinel.sentinel_masters().get(MASTER, {})
    except redis.ConnectionError:
        return False
    return bool(known.get("num-other-sentinels", 0) >= _QUORUM and known["num-slaves"] == 1)
