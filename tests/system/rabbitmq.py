"""A private RabbitMQ node for tests, with its own name, ports, folders and Erlang port mapper."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from rlm_tasks.testing import embedded
from tests.support import wait_until

DEBIAN = Path("/usr/lib/rabbitmq/bin")
"""Debian's wrapper on PATH works for root only, and changes the user; these programs do not."""
MISSING = "RabbitMQ is not installed: apt-get install --no-install-recommends rabbitmq-server"


class Missing(Exception):
    """RabbitMQ is not installed on this machine."""


def program(name: str) -> str:
    """Return the path of a program of RabbitMQ or Erlang.  Raises Missing."""
    found = shutil.which(name, path=f"{DEBIAN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise Missing(MISSING)
    return found


class Node:
    """One RabbitMQ node, on loopback only."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, list[subprocess.Popen[bytes]]()
        self.port, mapper, distribution = (embedded.free_port() for _ in range(3))
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._environment = {
            **os.environ,
            "HOME": str(folder),  # the folder of Erlang's cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(mapper),
            "RABBITMQ_NODENAME": f"rlm{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        }

    def start(self) -> None:
        """Start the node, and wait until it accepts connections.  Raises Missing."""
        (self._folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\n", encoding="utf-8"
        )
        (self._folder / "plugins").write_text("[].\n", encoding="utf-8")
        self._run(program("epmd"), "-port", self._environment["ERL_EPMD_PORT"])
        server = self._run(program("rabbitmq-server"))

        def listens() -> bool:
            output = self._folder / "output"
            assert server.poll() is None, output.read_text(encoding="utf-8")[-2000:]
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
            return False

        wait_until(listens, within_s=60)

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._folder / "output").open("ab") as output:
            process = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
        self._processes.append(process)
        return process

    def ctl(self, *words: str) -> str:
        """Run a command of ``rabbitmqctl``, and return its output."""
        command = [program("rabbitmqctl"), "--quiet", *words]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def stop(self) -> None:
        """End the node and its port mapper."""
        for process in reversed(self._processes):
            embedded.end(process, signal.SIGTERM)
