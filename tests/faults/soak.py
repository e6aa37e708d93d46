"""The soak test: several jobs at once, a kill every 2 s, doubled messages, Redis restarts.

``make soak`` runs it for SOAK_S seconds (600 by default), with a restart of Redis each minute.
Then it runs the same faults against nested chords of plain Celery.  It prints a table of results;
``--json`` prints them as JSON.  The exit code is 1 when an answer is wrong, a job failed or hung,
or a harmless item is in quarantine.  Begin with `Storm.run`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import psutil
from celery.result import AsyncResult
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from resilience.errors import StoreUnavailable
from rlm_tasks import Adaptive, Binary, Client, Job, JobNotFound, NWay
from rlm_tasks.errors import JobEnded
from rlm_tasks.testing import embedded
from tests.faults import nested_chords
from tests.faults.conftest import resend
from tests.integration.conftest import ROOT, client_of, environment_of

LEASE_S, SWEEP_S = 2.0, 0.5
KILL_EVERY_S = 2.0
RESTART_EVERY_S = 60.0
DOUBLED = 0.05
JOBS_AT_ONCE = 4
WORKERS, SLOTS = 2, 2
CALM_S = 90.0
"""Seconds that jobs may take to end after the last fault; a job that takes longer counts as hung.
"""


@dataclass
class Report:
    """The results of one run."""

    system: str
    seconds: float
    jobs: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    hung: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    redis_restarts: int = 0
    workers_gone: list[str] = field(default_factory=list)  # log ends of workers that ended alone
    doubled: int = 0
    redispatched: int = 0
    poisoned: int = 0
    innocent_in_quarantine: int = 0
    slowest_recovery_s: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether no job was wrong, failed or hung, and no harmless item is in quarantine."""
        return not (self.wrong or self.failed or self.hung or self.innocent_in_quarantine)


class System(Protocol):
    """A system that the faults are tried on."""

    name: str
    app: str

    def submit(self, random: Random) -> Any:
        """Submit a job."""

    def outcome(self, job: Any) -> str:
        """Return "right", "wrong" or "failed", or "" while the job runs."""

    def poll(self, random: Random, running: list[Any], report: Report) -> None:
        """Double some messages and update the report; it is called a few times a second."""

    def hit(self, worker: str, running: list[Any]) -> None:
        """Record that a worker was hit by a fault."""


class Platform:
    """This platform."""

    name, app = "RLM Tasks", "rlm_tasks"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._expected: dict[str, tuple[int, set[int]]] = {}
        self._seen: set[tuple[str, str, int]] = set()
        self._hit: dict[tuple[str, str, int], float] = {}

    def submit(self, random: Random) -> Job:
        """Submit a job with a random strategy; one in six has an item that kills its process."""
        n, ms = random.randint(60, 400), random.choice([1, 3, 8])
        shape = random.choice(
            [
                {"strategy": Binary(min_chunk_size=random.choice([5, 40]))},
                {"strategy": NWay(split_factor=4, min_chunk_size=15)},
                {"strategy": Adaptive()},
                {"type": "parallel", "chunk_size": 10},
                {"type": "sequential"},
            ]
        )
        poison = {random.randrange(n)} if random.random() < 1 / 6 else set()
        job = self._client.submit(
            operation="poison",
            items=range(n),
            params={"ms": ms, "poison": sorted(poison)},
            continue_on_error=True,
            **shape,
        )
        self._expected[job.id] = n, poison
        return job

    def outcome(self, job: Job) -> str:
        """Compare the result with the expected one."""
        if not job.ready():
            return ""
        n, poison = self._expected[job.id]
        try:
            result = job.result(timeout=5)
        except (JobEnded, JobNotFound):
            return "failed"
        exact = (result.done, result.failed_count, result.skipped) == (
            n - len(poison),
            len(poison),
            0,
        )
        return (
            "right"
            if exact and result.output == [i for i in range(n) if i not in poison]
            else "wrong"
        )

    def hit(self, worker: str, running: list[Job]) -> None:
        """Record the nodes of the worker; a node has recovered when it is done or claimed again."""
        for job, record in self._running(running):
            if record.worker == worker:
                self._hit[job.id, record.id, record.epoch] = time.monotonic()

    def poll(self, random: Random, running: list[Job], report: Report) -> None:
        """Double some messages of running nodes, and find the hit nodes that have recovered."""
        by_id = {job.id: job for job in running}
        for job, record in self._running(running):
            key = (job.id, record.id, record.epoch)
            if key not in self._seen:
                self._seen.add(key)
                if random.random() < DOUBLED:
                    resend(self._client, job.id, [record.id])
                    report.doubled += 1
        for key, since in list(self._hit.items()):
            job_id, node, epoch = key
            records = self._client.ledger.records(job_id, [node]) if job_id in by_id else []
            if not records or records[0].epoch > epoch or records[0].state not in "qr":
                report.slowest_recovery_s = max(report.slowest_recovery_s, time.monotonic() - since)
                del self._hit[key]

    def finish(self, jobs: list[Job], report: Report) -> None:
        """Count the nodes that were sent again, and the items in quarantine."""
        for job in jobs:
            _, poison = self._expected[job.id]
            report.poisoned += len(poison)
            report.innocent_in_quarantine += len(
                {item.index for item in job.quarantined()} - poison
            )
            events = self._client.ledger.store.client.xrange(
                self._client.ledger.keys.of(job.id).events
            )
            report.redispatched += sum(
                entry[b"event"] in (b"lease lost", b"released") for _, entry in events
            )
            nodes = self._client.ledger.store.client.hvals(
                self._client.ledger.keys.of(job.id).nodes
            )
            report.redispatched += sum(json.loads(node)["rs"] for node in nodes)

    def _running(self, jobs: list[Job]) -> Iterator[tuple[Job, Any]]:
        for job in jobs:
            for record in self._client.ledger.all_records(job.id):
                if record.state == "r":
                    yield job, record


class NestedChords:
    """Plain Celery."""

    name, app = "nested Celery chords", "tests.faults.nested_chords"

    def __init__(self) -> None:
        self._expected: dict[str, int] = {}

    def submit(self, random: Random) -> AsyncResult:
        """Submit a job of the same size without poison, which plain Celery redelivers for ever."""
        n, ms = random.randint(60, 400), random.choice([1, 3, 8])
        result = nested_chords.work.apply_async((0, n, 15, ms), retry=False)
        self._expected[result.id] = n
        return AsyncResult(result.id, app=nested_chords.app)

    def outcome(self, job: AsyncResult) -> str:
        """Compare the result with the expected one."""
        if not job.ready():
            return ""
        if not job.successful():
            return "failed"
        return "right" if job.result == list(range(self._expected[job.id])) else "wrong"

    def hit(self, worker: str, running: list[Any]) -> None:
        """Do nothing: plain Celery does not record which worker has a task."""

    def poll(self, random: Random, running: list[Any], report: Report) -> None:
        """Sometimes double the last message of the queue."""
        client = nested_chords.app.backend.client
        if random.random() < DOUBLED and (message := client.lindex("nested", -1)):
            client.lpush("nested", message)
            report.doubled += 1


class Storm:
    """Faults for the workers and the server, and restarts of the workers that end."""

    def __init__(
        self,
        system: System,
        server: embedded.Server,
        environment: dict[str, str],
        folder: Path,
        seed: int,
    ) -> None:
        self._system, self._server, self._environment, self._folder = (
            system,
            server,
            environment,
            folder,
        )
        self._random = Random(seed)
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._hit: set[str] = set()
        self._stopped: list[tuple[float, list[int]]] = []

    def run(
        self,
        seconds: float,
        show_status: Any,
        enough: Callable[[Report], bool] = lambda _: False,
    ) -> Report:
        """Cause faults for some seconds, then wait up to CALM_S for the jobs; return the report.

        The faults end sooner when `enough` holds for the report.
        """
        report = Report(self._system.name, seconds)
        jobs: list[Any] = []
        open_: list[Any] = []
        began = time.monotonic()
        kill_at, restart_at = began + KILL_EVERY_S, began + RESTART_EVERY_S / 2
        end = began + seconds
        while (now := time.monotonic()) < end + CALM_S:
            if now < end and enough(report):
                end = now
            raging = now < end
            self._keep_alive(report)
            with suppress(RedisError, StoreUnavailable, OSError):
                while raging and len(open_) < JOBS_AT_ONCE:
                    open_.append(self._system.submit(self._random))
                    jobs.append(open_[-1])
                self._system.poll(self._random, open_, report)
                self._settle(open_, report)
            if not raging and not open_:
                break
            if raging and now >= kill_at:
                kill_at = now + KILL_EVERY_S
                self._kill(open_, report)
            if raging and now >= restart_at:
                restart_at = now + RESTART_EVERY_S
                self._server.stop(kill=True)
                time.sleep(self._random.uniform(0.1, 1.0))  # the outage
                self._server.start()
                report.redis_restarts += 1
            kills = sum(report.kills.values())
            show_status(
                f"{now - began:5.0f} s   {report.right} right, {len(open_)} open, {kills} kills"
            )
            time.sleep(0.1)  # ten polls a second
        report.jobs, report.hung = len(jobs), len(open_)
        if isinstance(self._system, Platform):
            self._system.finish(jobs, report)
        return report

    def _settle(self, open_: list[Any], report: Report) -> None:
        for job in list(open_):
            outcome = self._system.outcome(job)
            if outcome:
                open_.remove(job)
                setattr(report, outcome, getattr(report, outcome) + 1)

    def _keep_alive(self, report: Report) -> None:
        """Restart ended workers, as systemd or Kubernetes does; continue suspended ones in time."""
        for at, pids in list(self._stopped):
            if time.monotonic() >= at:
                self._stopped.remove((at, pids))
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
        for name in [f"w{i}@soak" for i in range(WORKERS)]:
            worker = self._workers.get(name)
            if worker is not None and worker.poll() is None:
                continue
            if worker is not None and name not in self._hit:
                log_end = (self._folder / f"{name}.log").read_text(errors="replace")[-3000:]
                report.workers_gone.append(f"{name} ended with {worker.returncode}:\n{log_end}")
            self._hit.discard(name)
            self._workers[name] = self._spawn(name)

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            self._system.app,
            "worker",
            "-c",
            str(SLOTS),
            "-l",
            "WARNING",
            "-n",
            name,
            "--without-gossip",
            "--without-mingle",
        ]
        ready = self._folder / f"{name}.ready"
        ready.unlink(missing_ok=True)
        environment = {**os.environ, **self._environment, "RLM_READY_FILE": str(ready)}
        with (self._folder / f"{name}.log").open("ab") as log:
            return embedded.start_worker(
                command, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def _kill(self, open_: list[Any], report: Report) -> None:
        name = self._random.choice(sorted(self._workers))
        fault = self._random.choice(
            ["pool process", "pool process", "worker", "stop", "term", "term group"]
        )
        try:
            main = psutil.Process(self._workers[name].pid)
            children = main.children()
        except psutil.NoSuchProcess:
            return
        if fault == "pool process" and not (self._folder / f"{name}.ready").exists():
            return  # Celery gives up when a pool process dies before its worker is ready
        with suppress(RedisError, StoreUnavailable, OSError):
            self._system.hit(name, open_)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            self._do(fault, name, main, children)
            report.kills[fault] += 1

    def _do(
        self, fault: str, name: str, main: psutil.Process, children: list[psutil.Process]
    ) -> None:
        if fault == "pool process":
            if children:
                self._random.choice(children).kill()
            return
        if fault == "stop":
            for each in (main, *children):
                each.suspend()
            self._stopped.append(
                (time.monotonic() + 1.5 * LEASE_S, [main.pid, *(each.pid for each in children)])
            )
            return
        self._hit.add(name)
        if fault == "worker":
            for each in (main, *children):
                each.kill()
        elif fault == "term":
            main.terminate()
        else:
            os.killpg(main.pid, signal.SIGTERM)

    def end(self) -> None:
        """Stop every worker."""
        for worker in self._workers.values():
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGCONT)
            embedded.end(worker, signal.SIGTERM, 10.0)


@contextmanager
def storm(which: str, seed: int) -> Iterator[Storm]:
    """Yield a storm on a private server with an append-only file."""
    with (
        tempfile.TemporaryDirectory(prefix="rlm-soak-") as folder,
        embedded.server(durable=True) as server,
    ):
        environment = environment_of(
            server.url,
            "soak",
            RLM_OPERATIONS="tests.faults.ops",
            RLM_LEDGER__LEASE_S=str(LEASE_S),
            RLM_LEDGER__SWEEP_S=str(SWEEP_S),
        )
        del environment["RLM_LEDGER__GRACE_S"]
        with client_of(environment) as client:
            system: System = Platform(client)
            if which == "control":
                nested_chords.app.conf.update(broker_url=server.url, result_backend=server.url)
                system = NestedChords()
            raging = Storm(system, server, environment, Path(folder), seed)
            try:
                yield raging
            finally:
                raging.end()


def show(reports: list[Report]) -> None:
    """Print the results of the systems side by side."""
    table = Table(
        "what", *(report.system for report in reports), title="The storm", title_justify="left"
    )
    for name in asdict(reports[0]):
        if name not in ("system", "kills", "workers_gone"):
            table.add_row(
                name.replace("_", " "), *(f"{getattr(report, name):,.4g}" for report in reports)
            )
    table.add_row(
        "workers that ended by themselves", *(str(len(report.workers_gone)) for report in reports)
    )
    table.add_row(
        "kills",
        *(", ".join(f"{count} {what}" for what, count in sorted(r.kills.items())) for r in reports),
    )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for log_end in reports[0].workers_gone:
        print(log_end)


def main() -> int:
    """Run the platform, then the control; return the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_S", "600")))
    options.add_argument(
        "--control", type=float, default=60.0, help="seconds of the control; 0 leaves it out"
    )
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    reports = []
    console = Console(stderr=True)
    for which, seconds in (
        ("platform", asked.seconds),
        ("control", min(asked.control, asked.seconds)),
    ):
        if seconds:
            with storm(which, asked.seed) as raging, console.status("") as status:
                reports.append(raging.run(seconds, lambda text, status=status: status.update(text)))
    print(json.dumps([asdict(report) for report in reports])) if asked.json else show(reports)
    return 0 if reports[0].clean else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
