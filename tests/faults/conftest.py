"""Cells of the fault matrix: a job, a worker with a fault at one crash point, and the final checks.

The fault tests use the fixtures `on_shared` and `on_durable`; begin with `Cell`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rlm_tasks import Client, Job, NWay
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of
from tests.support import wait_until

LEASE_S, SWEEP_S = 2.0, 0.5
ITEMS = 60
RECOVERED: list[tuple[str, str, float]] = []
"""(fault, crash point, seconds from the fault to the job's end), for the summary."""


@dataclass
class Cell:
    """One job, its workers, one fault, and the checks of the result."""

    client: Client
    environment: dict[str, str]
    folder: Path
    log: Path
    stack: ExitStack
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def worker(
        self, *, fault: tuple[str, str] | None = None, nth: int = 1, options: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a worker; `fault` is a crash point and the name of a function of `app`."""
        environment = dict(self.environment)
        if fault is not None:
            point, action = fault
            environment |= {
                "FAULT_POINT": point,
                "FAULT_DO": action,
                "FAULT_NTH": str(nth),
                "FAULT_FOLDER": str(self.folder),
            }
        app = "rlm_tasks" if fault is None else "tests.faults.app"
        process = self.stack.enter_context(
            embedded.worker(
                environment,
                log=self.log,
                app=app,
                options=["-n", f"w{len(self.workers)}@test", *options],
            )
        )
        self.workers.append(process)
        return process

    def submit(self, items: int = ITEMS, ms: float = 2.0) -> Job:
        """Submit the job that every cell runs: chords, tail calls, and a journal of its items."""
        return self.client.submit(
            operation="journalled",
            items=range(items),
            params={"ms": ms, "journal": str(self.folder / "journal")},
            strategy=NWay(split_factor=3, min_chunk_size=items // 6),
        )

    def journal(self, job: Job) -> list[int]:
        """Return the index of each item that ran, once for each run."""
        path = self.folder / f"journal.{job.id}"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_fault(self) -> float:
        """Wait until the crash point is reached; return that time, in seconds since the epoch."""
        wait_until((self.folder / "reached").exists)
        return (self.folder / "reached").stat().st_mtime

    def go(self) -> None:
        """Let a process that waits in `hold` continue."""
        (self.folder / "go").touch()

    def check(
        self,
        job: Job,
        *,
        since: float | None = None,
        what: str = "",
        point: str = "",
        within_s: float = 30.0,
    ) -> float:
        """Wait for the job's end and check its result, events and keys.

        Return the seconds since the fault at `since`, 0.0 without one.
        """
        result = job.result(timeout=within_s)
        took = time.time() - since if since is not None else 0.0
        n = result.total
        assert result.output == list(range(n)), "the right answer"
        assert (result.done, result.failed_count, result.skipped) == (n, 0, 0), (
            "every index counted once"
        )
        assert set(self.journal(job)) == set(range(n)), "every item has run"
        events = self.client.ledger.store.client.xrange(self.client.ledger.keys.of(job.id).events)
        closed = [entry for _, entry in events if entry[b"event"] == b"closed"]
        assert [entry[b"detail"] for entry in closed] == [b"succeeded"], "one final result"
        self.check_keys(job)
        if since is not None:
            RECOVERED.append((what, point, took))
        return took

    def check_keys(self, job: Job) -> None:
        """Assert that all keys of the job expire, and that no key of running jobs is left."""
        client, keys = self.client.ledger.store.client, self.client.ledger.keys.of(job.id)
        own = list(client.scan_iter(f"{self.client.settings.namespace}:*{job.id}*", count=10_000))
        assert [key for key in own if client.ttl(key) == -1] == [], "no key without expiry"
        assert client.exists(keys.due, keys.waiting, keys.inflight, keys.splits, keys.deaths) == 0


@contextmanager
def cell(
    server: embedded.Server, name: str, folder: Path, log: Path, **more: str
) -> Iterator[Cell]:
    """Run a cell on a server, in a private namespace."""
    usual = {
        "RLM_OPERATIONS": "tests.integration.ops,tests.faults.ops",
        "RLM_LEDGER__LEASE_S": str(LEASE_S),
        "RLM_LEDGER__SWEEP_S": str(SWEEP_S),
        "RLM_NODE__SLICE_MS": "5",
    }
    environment = environment_of(server.url, name, **{**usual, **more})
    del environment["RLM_LEDGER__GRACE_S"]
    with client_of(environment) as client, ExitStack() as stack:
        own = Cell(client, environment, folder, log, stack)
        yield own
        for worker in own.workers:
            # The checks are over; a drain of each worker would cost minutes in total.
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def resend(client: Client, job: str, nodes: Sequence[str]) -> None:
    """Send the messages of a job's nodes again, with their merges, if the job is known."""
    if (spec := client.ledger.spec(job)) is not None:
        client.session.dispatcher.resend(spec, nodes, merges=True)


def name_of(request: pytest.FixtureRequest) -> str:
    """Return a namespace for one test."""
    return f"f{abs(hash(request.node.nodeid)) % 10**10}"


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.Server]:
    """The server of all cells whose fault does not concern Redis."""
    with embedded.server() as own:
        yield own


@pytest.fixture
def on_shared(
    server: embedded.Server, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Cell]:
    """A cell on the shared server."""
    with cell(server, name_of(request), tmp_path, tmp_path / "worker.log") as own:
        yield own


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[embedded.Server]:
    """A private server for one test, with an append-only file."""
    folder = tmp_path / "server"
    folder.mkdir()
    own = embedded.Server(folder, durable=True)
    own.start()
    yield own
    own.stop()


@pytest.fixture
def on_durable(
    durable: embedded.Server, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Cell]:
    """A cell on the durable server."""
    with cell(durable, name_of(request), tmp_path, tmp_path / "worker.log") as own:
        yield own


@pytest.fixture(autouse=True)
def report_recovery(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pass recovery times to the summary through the report; xdist prints it in another process."""
    RECOVERED.clear()
    yield
    request.node.user_properties += [
        ("recovered", [what, str(point), took]) for what, point, took in RECOVERED
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long recovery took, by fault; docs/reliability.md quotes it."""
    ended = [report for report in terminalreporter.stats.get("", []) if report.when == "teardown"]
    recovered = [
        value for report in ended for name, value in report.user_properties if name == "recovered"
    ]
    if not recovered:
        return
    terminalreporter.section("recovery, seconds from the fault to the end of the job")
    for what in dict.fromkeys(what for what, _, _ in recovered):
        took = sorted(seconds for each, _, seconds in recovered if each == what)
        median, slowest = took[len(took) // 2], took[-1]
        terminalreporter.write_line(
            f"{what:42} {len(took):3} cells   median {median:5.2f}   slowest {slowest:5.2f}"
        )
