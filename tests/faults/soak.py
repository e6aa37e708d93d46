"""The storm: several jobs at once, a kill every 2 s, doubled messages, Redis restarted every
minute.

``make soak`` runs it for SOAK_S seconds (600 by default), then the same storm against plain nested
chords, and prints what became of the jobs.  ``--json`` prints it for programs; the exit code is 1
when an answer was wrong, a job hung, or somebody innocent was quarantined."""

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
from collections.abc import Iterator
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
from tests.integration.conftest import ROOT, client_of, environment_of

LEASE_S, SWEEP_S = 2.0, 0.5
KILL_EVERY_S = 2.0
RESTART_EVERY_S = 60.0
DOUBLED = 0.05
JOBS_AT_ONCE = 4
WORKERS, SLOTS = 2, 2
CALM_S = 90.0
"""How long jobs may take to end once the storm is over; what has not ended then is hung."""


@dataclass
class Report:
    """What became of a storm."""

    system: str
    seconds: float
    jobs: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    hung: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    redis_restarts: int = 0
    workers_gone: list[str] = field(
        default_factory=list
    )  # the last words of those that ended by themselves
    doubled: int = 0
    redispatched: int = 0
    poisoned: int = 0
    innocent_in_quarantine: int = 0
    slowest_recovery_s: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether every promise was kept."""
        return not (self.wrong or self.failed or self.hung or self.innocent_in_quarantine)


class System(Protocol):
    """What the storm is let loose on."""

    name: str
    app: str

    def submit(self, random: Random) -> Any:
        """Open a job."""

    def outcome(self, job: Any) -> str:
        """Return right, wrong, failed, or '' while it runs."""

    def look(self, random: Random, running: list[Any], report: Report) -> None:
        """Do what is done a few times a second while jobs run."""

    def hit(self, worker: str, running: list[Any]) -> None:
        """Hear that a worker was hit."""


class Platform:
    """This platform."""

    name, app = "RLM Tasks", "rlm_tasks"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._expected: dict[str, tuple[int, set[int]]] = {}
        self._seen: set[tuple[str, str, int]] = set()
        self._hit: dict[tuple[str, str, int], float] = {}

    def submit(self, random: Random) -> Job:
        """Open a job of some shape; one in six has an item that kills its process."""
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
        """Hold the answer against what it must be."""
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
        """Remember what the worker held: recovery is over when somebody else has it, or it is
        done.
        """
        for job, record in self._running(running):
            if record.worker == worker:
                self._hit[job.id, record.id, record.epoch] = time.monotonic()

    def look(self, random: Random, running: list[Job], report: Report) -> None:
        """Double some messages of running nodes, and see which hit nodes have recovered."""
        by_id = {job.id: job for job in running}
        for job, record in self._running(running):
            key = (job.id, record.id, record.epoch)
            if key not in self._seen:
                self._seen.add(key)
                if random.random() < DOUBLED:
                    self._client.session.delivery.resend(job.id, [record.id])
                    report.doubled += 1
        for key, since in list(self._hit.items()):
            job_id, node, epoch = key
            records = self._client.ledger.records(job_id, [node]) if job_id in by_id else []
            if not records or records[0].epoch > epoch or records[0].state not in "qr":
                report.slowest_recovery_s = max(report.slowest_recovery_s, time.monotonic() - since)
                del self._hit[key]

    def finish(self, jobs: list[Job], report: Report) -> None:
        """Count what the ledger had to do, and who is in quarantine."""
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
        """Open a job of the same size; none has poison, which plain Celery redelivers for ever."""
        n, ms = random.randint(60, 400), random.choice([1, 3, 8])
        result = nested_chords.work.apply_async((0, n, 15, ms), retry=False)
        self._expected[result.id] = n
        return AsyncResult(result.id, app=nested_chords.app)

    def outcome(self, job: AsyncResult) -> str:
        """Hold the answer against what it must be."""
        if not job.ready():
            return ""
        if not job.successful():
            return "failed"
        return "right" if job.result == list(range(self._expected[job.id])) else "wrong"

    def hit(self, worker: str, running: list[Any]) -> None:
        """Nothing tells who held what."""

    def look(self, random: Random, running: list[Any], report: Report) -> None:
        """Double some messages: whatever is in the queue stands for them all."""
        client = nested_chords.app.backend.client
        if random.random() < DOUBLED and (message := client.lindex("nested", -1)):
            client.lpush("nested", message)
            report.doubled += 1


class Storm:
    """Workers that are kept alive, and what is done to them."""

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

    def run(self, seconds: float, say: Any) -> Report:
        """Let it rage, then wait for calm."""
        report = Report(self._system.name, seconds)
        jobs: list[Any] = []
        open_: list[Any] = []
        began = time.monotonic()
        kill_at, restart_at = began + KILL_EVERY_S, began + RESTART_EVERY_S / 2
        while (now := time.monotonic()) < began + seconds + CALM_S:
            raging = now < began + seconds
            self._keep_alive(report)
            with suppress(RedisError, StoreUnavailable, OSError):
                while raging and len(open_) < JOBS_AT_ONCE:
                    open_.append(self._system.submit(self._random))
                    jobs.append(open_[-1])
                self._system.look(self._random, open_, report)
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
            say(
                f"{now - began:5.0f} s   {report.right} right, {len(open_)} open, {sum(report.kills.values())} kills"
            )
            time.sleep(0.1)  # ten looks a second
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
        """Do what systemd or Kubernetes does; wake who was stopped for long enough."""
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
                words = (self._folder / f"{name}.log").read_text(errors="replace")[-3000:]
                report.workers_gone.append(f"{name} ended with {worker.returncode}:\n{words}")
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
            return subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def _kill(self, open_: list[Any], report: Report) -> None:
        name = self._random.choice(sorted(self._workers))
        deed = self._random.choice(
            ["pool process", "pool process", "worker", "stop", "term", "term group"]
        )
        try:
            main = psutil.Process(self._workers[name].pid)
            children = main.children()
        except psutil.NoSuchProcess:
            return
        if deed == "pool process" and not (self._folder / f"{name}.ready").exists():
            return  # Celery gives up when a pool process dies before its worker is ready
        with suppress(RedisError, StoreUnavailable, OSError):
            self._system.hit(name, open_)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            self._do(deed, name, main, children)
            report.kills[deed] += 1

    def _do(
        self, deed: str, name: str, main: psutil.Process, children: list[psutil.Process]
    ) -> None:
        if deed == "pool process":
            if children:
                self._random.choice(children).kill()
            return
        if deed == "stop":
            for each in (main, *children):
                each.suspend()
            self._stopped.append(
                (time.monotonic() + 1.5 * LEASE_S, [main.pid, *(each.pid for each in children)])
            )
            return
        self._hit.add(name)
        if deed == "worker":
            for each in (main, *children):
                each.kill()
        elif deed == "term":
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
    """A storm on a durable server of its own."""
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
    """Print what became of the jobs, side by side."""
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
    for words in reports[0].workers_gone:
        print(words)


def main() -> int:
    """Run the storm, then the control."""
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
