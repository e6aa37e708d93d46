"""Overload two slots: levels rise, items get less work, and less urgent jobs are refused.

    python docs/examples/under_pressure.py

It starts a server, a worker and beat, and stops them at the end; it needs nothing else.  One sixth
of the time is calm, one sixth is overload, and the rest is recovery.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from rlm_tasks import Overloaded, QueueFull, operation
from rlm_tasks.testing import embedded

SETTINGS = {
    "RLM_OPERATIONS": "under_pressure",
    # For the worker and its two processes; idle, they use a third of it.
    "RLM_PRESSURE__MAX_MEMORY_MB": "512",
    "RLM_PRESSURE__MONITOR_S": "1",
    "RLM_PRESSURE__RELEASE_S": "3",
    "RLM_ADMISSION__WAIT_HIGH_S": "8",
    "RLM_ADMISSION__WAIT_NORMAL_S": "10",
    "RLM_ADMISSION__WAIT_LOW_S": "12",
}
PRIORITIES = ("critical", "high", "normal", "low")
MB = 2**20


@operation("look_up")
def look_up(item, ctx):
    """Do a small item: wait 20 ms, then hash up to 40 entities."""
    time.sleep(0.02)
    return [hashlib.sha256(b"%d" % entity).hexdigest()[:8] for entity in range(ctx.limit(40))]


def skim(item, ctx):
    """Digest 60 MB instead of 180 MB, and once: the simple method of `digest`."""
    return hashlib.blake2b(b"x" * (60 * MB)).hexdigest()


@operation("digest", simplified=skim)
def digest(item, ctx):
    """Do a large item: digest 180 MB, or fewer under pressure.

    The second digest is expensive work, which may be skipped.
    """
    text = b"x" * (ctx.limit(180) * MB)
    return [hashlib.blake2b(text).hexdigest() for _ in range(1 if ctx.skip_expensive else 2)]


@operation("knock")
def knock(item):
    """Return the time at which the item begins, in seconds since the epoch."""
    return time.time()


class Run:
    """One run: the jobs that each second submits, and the samples of the platform."""

    def __init__(self, client, seconds):
        self.client, self.seconds, self.second, self.phase = client, seconds, 0, "calm"
        self.jobs = {"calm": [], "overload": [], "recovery": []}
        self.knocks, self.refused, self.executed = [], Counter(), Counter()

    def ask(self):
        """Submit the jobs of this second.

        Small jobs come at any time, large jobs in the overload, a critical job every other second.
        """
        overload, recovery = self.seconds // 6, self.seconds // 3
        self.phase = (
            "calm"
            if self.second < overload
            else "overload"
            if self.second < recovery
            else "recovery"
        )
        large = {"calm": 0, "overload": 10 if self.second == overload else 1, "recovery": 0}[
            self.phase
        ]
        for priority in PRIORITIES[1:]:
            for name in ["look_up", *["digest"] * large]:
                self.submit(name, priority)
        if self.second % 2:
            self.knocks.append(
                (time.time(), self.client.submit(operation="knock", items=[0], priority="critical"))
            )

    def submit(self, name, priority):
        """Submit a job of six items, or count its refusal."""
        try:
            self.jobs[self.phase].append(
                self.client.submit(operation=name, items=range(6), priority=priority)
            )
        except (Overloaded, QueueFull) as refused:
            self.refused[f"{refused.code} {priority}"] += 1

    def look(self):
        """Return a sample of the platform as plain data."""
        status, before = self.client.status(), self.executed
        self.executed = Counter(
            {each.executor_id: each.total_executions for each in self.client.usage.all()}
        )
        queues = {name.rpartition(".")[2]: report for name, report in status.queues.items()}
        return {
            "second": self.second,
            "phase": self.phase,
            "level": status.level,
            "queued": {priority: queues[priority].depth for priority in PRIORITIES},
            "oldest_s": round(max(report.oldest_s or 0.0 for report in queues.values()), 1),
            "items": {name: self.executed[name] - before[name] for name in ("look_up", "digest")},
            "memory_pct": status.resource_usage["memory_percent"],
            "refused": dict(self.refused),
        }

    def told(self):
        """Return the seconds that critical items waited for a slot, and the receipts of all jobs.

        Receipts are sorted by the phase in which the job was submitted.
        """
        waits = [round(job.get(timeout=30)[0] - asked, 3) for asked, job in self.knocks]
        receipts = {phase: Counter() for phase in self.jobs}
        for phase, shaped in (
            (phase, each)
            for phase, jobs in self.jobs.items()
            for job in jobs
            for each in job.receipt()
        ):
            receipts[phase][f"{shaped.strategy} at {shaped.level}"] += shaped.items
        return {"critical_waits_s": waits, "receipts": receipts}


def in_words(row):
    """Return a sample as one line of text."""
    queued = "  ".join(f"{priority} {row['queued'][priority]:3}" for priority in PRIORITIES)
    return (
        f"{row['second']:3} s  {row['level']:<9}  memory {row['memory_pct']:3.0f} %"
        f"  waiting: {queued}, {row['oldest_s']:4} s"
        f"  {sum(row['items'].values()):3} items/s  refused {sum(row['refused'].values()):3}"
    )


def record(client, seconds):
    """Do the run, and return its samples, waits and receipts."""
    while not client.status().monitored:
        time.sleep(0.1)
    run, rows, began = Run(client, seconds), [], time.monotonic()
    for run.second in range(seconds):
        run.ask()
        time.sleep(max(0.0, began + run.second + 1 - time.monotonic()))
        rows.append(run.look())
        print(in_words(rows[-1]), flush=True)
    return {"rows": rows, **run.told()}


@contextmanager
def beat(environment):
    """Run beat for the length of a block; it sends the monitor task."""
    command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "beat", "-l", "ERROR"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        yield
    finally:
        embedded.end(process)


def main():
    """Start a server, a worker and beat, do the run, and print the receipts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the samples to this JSON file")
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    embedded.clean_up_on_sigterm()
    with tempfile.TemporaryDirectory() as folder, embedded.server() as server:
        environment = {
            **SETTINGS,
            "RLM_REDIS_URL": server.url,
            "PYTHONPATH": str(Path(__file__).parent),
        }
        os.environ.update(environment)
        from rlm_tasks import Client  # it reads the environment when it is imported

        with (
            embedded.worker(environment, log=Path(folder) / "log"),
            beat(environment),
            Client() as client,
        ):
            seen = record(client, asked.seconds)
    print(f"critical items waited {max(seen['critical_waits_s'])} s at most")
    for phase, receipt in seen["receipts"].items():
        print(
            f"{phase}:",
            "; ".join(f"{what}: {n} items" for what, n in receipt.items())
            or "nothing was left out",
        )
    if asked.out:
        asked.out.write_text(json.dumps(seen) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
