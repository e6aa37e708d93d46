"""Starts the workers of a test session as forks of a process that has imported Celery.

These imports are more than half of a worker's start.  A fork imports the code of this project anew,
in its own environment.  tests/conftest.py uses `Starter`."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.fixups.django",
    "celery.worker.components",
    "celery.worker.consumer",
    "kombu.transport.redis",
    "msgspec",
    "prometheus_client",
    "psutil",
    "pydantic_settings",
    "redis.asyncio",
    "zstandard",
)
"""Modules of other projects that each worker imports."""
_SIZE = 1 << 20
"""The largest message between the two processes, in bytes."""


class Process:
    """A worker that the warm process has started, with the methods of `subprocess.Popen`."""

    def __init__(self, pid: int, args: Sequence[str], ended: Callable[[int, float], int | None]):
        self.pid, self.args, self._ended = pid, args, ended
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status if the process has ended."""
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status when the process has ended.  Raises subprocess.TimeoutExpired."""
        if (status := self._wait(timeout if timeout is not None else 3600.0)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def _wait(self, seconds: float) -> int | None:
        if self.returncode is None:
            self.returncode = self._ended(self.pid, seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if the process has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Starter:
    """The side of the tests: asks the warm process for workers, and hears of their ends."""

    def __init__(self) -> None:
        self._lock, self._statuses = Lock(), dict[int, int]()
        self._connection: socket.socket | None = None
        self._warm: subprocess.Popen[bytes] | None = None

    def __call__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes],
        stderr: IO[bytes],
        start_new_session: bool,
        env: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        """Start a worker as `subprocess.Popen` does; an unusual one gets a new interpreter."""
        if not _is_usual(command, env):
            return subprocess.Popen(
                command, stdout=stdout, stderr=stderr, start_new_session=start_new_session, env=env
            )
        request = json.dumps([list(command), dict(env), str(Path.cwd())]).encode()
        with self._lock:
            socket.send_fds(self._connected(), [request], [stdout.fileno()])
            while (pid := self._read()) is None:
                pass
        return cast("subprocess.Popen[bytes]", Process(pid, command, self._ended))

    def _connected(self) -> socket.socket:
        """Return the connection to the warm process; start it before the first worker."""
        if self._connection is None:
            self._connection, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with there:
                self._warm = subprocess.Popen(
                    [sys.executable, "-m", "tests.warm", str(there.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                    start_new_session=True,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
        return self._connection

    def close(self) -> None:
        """End the warm process."""
        if self._connection is not None and self._warm is not None:
            self._connection.close()
            self._warm.wait(5)

    def _read(self) -> int | None:
        """Read one message: return the id of a started process, or note the end of one."""
        pid, status = json.loads(self._connected().recv(_SIZE))
        if status is None:
            self._statuses.pop(pid, None)  # that of an earlier process with the same id
            return int(pid)
        self._statuses[pid] = status
        return None

    def _ended(self, pid: int, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                if pid in self._statuses:
                    return self._statuses[pid]
                left = min(0.05, max(0.0, until - time.monotonic()))
                with selectors.DefaultSelector() as selector:
                    selector.register(self._connected(), selectors.EVENT_READ)
                    if selector.select(left):
                        self._read()
                    elif left == 0.0:
                        return None


def _is_usual(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Return whether the imported modules are those that the command would import."""
    return (
        "-P" not in command
        and all(
            env.get(name) == os.environ.get(name)
            for name in {*env, *os.environ}
            if name.startswith(("OTEL_", "PYTHON")) and name != "PYTHONPATH"
        )
        and env.get("PYTHONPATH") == str(ROOT)
    )


# --- the warm process ---------------------------------------------------------------------------


def _serve(connection: socket.socket) -> list[Any] | None:
    """Fork for each request, and report each end; return a request only in its own process."""
    with connection, selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    _report_end(connection, key.data)
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    continue
                data, files, _, _ = socket.recv_fds(connection, _SIZE, 1)
                if not data:
                    return None
                if (pid := os.fork()) == 0:
                    for each in selector.get_map().values():
                        if each.data is not None:
                            os.close(each.fd)
                    _take(files[0])
                    return list(json.loads(data))
                os.close(files[0])
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                connection.send(json.dumps([pid, None]).encode())


def _report_end(connection: socket.socket, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    connection.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())


def _take(log: int) -> None:
    """Make this process the leader of a session that writes to a log file."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def main() -> None:
    """Import the modules, then serve; a fork returns from `_serve` and runs its command."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        [_, _, module, *options], environment, folder = request
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0] = folder
        sys.argv = [module, *options]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
