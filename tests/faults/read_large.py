"""Read a text file of many gigabytes, and print how much memory the worker's processes held.

``python -m tests.faults.read_large --mb 10240`` writes a file, runs a job over its lines, and
compares the answer with the file.  It exits with 1 if the answer is wrong, or if a process held
more than MOST_MB.  The tests have a small form: tests/unit/jobs/test_stored_items.py."""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import psutil
from rich.console import Console

from rlm_tasks import Lines
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of

MOST_MB = 150.0
LINE = b"2026-11-30T13:00:00Z worker-%07d INFO an ordinary line of a log, number %012d\n"
BLOCK_LINES = 10_000


def write(path: Path, size: int) -> int:
    """Write a file of at least `size` bytes, and return the number of its lines."""
    block = b"".join(LINE % (i, i) for i in range(BLOCK_LINES))
    blocks = -(-size // len(block))
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
    return blocks * BLOCK_LINES


class Watch(threading.Thread):
    """Samples the memory of a worker's pool processes, and keeps the most that one of them held."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._worker, self._ended = psutil.Process(pid), threading.Event()
        self.most_mb = 0.0

    def run(self) -> None:
        """Sample until the watch is stopped."""
        while not self._ended.wait(0.1):
            held = [each.memory_info().rss for each in self._worker.children(recursive=True)]
            self.most_mb = max(self.most_mb, *(each / 2**20 for each in held), 0.0)

    def stop(self) -> float:
        """Stop, and return the most MB that one process held."""
        self._ended.set()
        self.join()
        return self.most_mb


def main() -> int:
    """Run the job and print the figures; return the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mb", type=int, default=10_240, help="size of the file")
    asked = options.parse_args()
    embedded.clean_up_on_sigterm()
    with tempfile.TemporaryDirectory() as folder, embedded.server() as server:
        path = Path(folder) / "large.log"
        lines = write(path, asked.mb << 20)
        environment = environment_of(server.url, "large", RLM_LEDGER__LEASE_S="30")
        log = Path(folder) / "worker.log"
        with (
            client_of(environment) as client,
            embedded.worker(environment, log=log, slots=2) as worker,
        ):
            watch = Watch(worker.pid)
            watch.start()
            began = time.perf_counter()
            job = client.submit(operation="count_characters", items=Lines(path))
            submitted = time.perf_counter()
            found = job.get()
            ended = time.perf_counter()
            most_mb = watch.stop()
        wanted = path.stat().st_size - lines
    Console().print(
        f"{wanted + lines:,} bytes in {lines:,} lines: submitted in {submitted - began:.0f} s, "
        f"read in {ended - submitted:.0f} s; a process held {most_mb:.0f} MB at most "
        f"({MOST_MB:.0f}); "
        f"the answer is {'right' if found == wanted else 'WRONG'}"
    )
    return int(found != wanted or most_mb > MOST_MB)


if __name__ == "__main__":
    raise SystemExit(main())
