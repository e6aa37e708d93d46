"""What happens when too much is asked of two slots: levels rise, less is done for each item, less urgent work is refused.

One command, nothing else is needed:  python docs/examples/under_pressure.py
It starts a server, a worker and beat, and stops them.  A quarter of the time is calm, a quarter is overload, then it is calm.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rlm_tasks import Overloaded, QueueFull, embedded, operation

PRIORITIES = ("critical", "high", "normal", "low")
SETTINGS = {
    "RLM_OPERATIONS": "under_pressure",
    "RLM_PRESSURE__MAX_MEMORY_MB": "512",  # of the worker and its two processes; idle they hold a good third of it
    "RLM_PRESSURE__MONITOR_S": "1",
    "RLM_PRESSURE__RELEASE_S": "3",
    "RLM_ADMISSION__WAIT_HIGH_S": "8",
    "RLM_ADMISSION__WAIT_NORMAL_S": "10",
    "RLM_ADMISSION__WAIT_LOW_S": "15",
}


@operation("look_up")
def look_up(item, ctx):
    """A small item: it waits for somebody, and looks at up to 40 entities."""
    time.sleep(0.02)
    return [hashlib.sha256(f"{item} {entity}".encode()).hexdigest()[:8] for entity in range(ctx.limit(40))]


def skim(item, ctx):
    """The same as `digest`, of an abstract."""
    return fingerprint(40)


@operation("digest", simplified=skim)
def digest(item, ctx):
    """A large item: 130 MB while it is looked at, and less when it is asked for less."""
    return fingerprint(ctx.limit(130), passes=1 if ctx.skip_expensive else 2)


def fingerprint(megabytes, passes=1):
    """Hold so much memory, and work on it."""
    text = b"x" * (megabytes * 2**20)
    return [hashlib.blake2b(text).hexdigest() for _ in range(passes)][0]


@operation("knock")
def knock(item):
    """Say when the item has begun."""
    return time.time()


class Run:
    """The load of one run, and what is seen of it once a second."""

    def __init__(self, client, seconds):
        self.client, self.seconds, self.second = client, seconds, 0
        self.jobs = {"calm": [], "overload": [], "recovery": []}
        self.refused, self.knocks, self.starts = Counter(), [], []
        self.executed = 0

    @property
    def phase(self):
        """What is asked of the platform now."""
        quarter = int(4 * self.second / self.seconds)
        return ("calm", "overload", "recovery", "recovery")[quarter]

    def ask(self):
        """Submit what comes in this second: small jobs always, large ones in the overload, a critical one now and then."""
        for priority in PRIORITIES[1:]:
            self.submit(priority, "look_up", 12)
        if self.phase == "overload":
            starts = self.second == 0 or self.second * 4 // self.seconds != (self.second - 1) * 4 // self.seconds
            for priority in PRIORITIES[1:] * (10 if starts else 1):
                self.submit(priority, "digest", 6)
        if self.second % 2:
            self.knocks.append((self.second, time.time(), self.client.submit(operation="knock", items=[0], priority="critical")))

    def submit(self, priority, name, items):
        """Submit a job, or note that it was refused."""
        try:
            job = self.client.submit(operation=name, items=range(items), priority=priority)
        except (Overloaded, QueueFull) as refused:
            self.refused[refused.code] += 1
        else:
            self.jobs[self.phase].append(job)

    def look(self):
        """Return what is seen now, as plain data."""
        status = self.client.status()
        for each in [knock for knock in self.knocks if knock[2].ready()]:
            self.knocks.remove(each)
            second, asked, job = each
            self.starts.append({"at": second, "after_s": round(job.get()[0] - asked, 3)})
        executed = sum(usage.total_executions for usage in self.client.usage.all())
        before, self.executed = self.executed, executed
        queues = {name.rpartition(".")[2]: report for name, report in status.queues.items()}
        return {
            "second": self.second, "phase": self.phase, "level": status.level, "why": status.why,
            "queued": {priority: queues[priority].depth for priority in PRIORITIES},
            "oldest_s": round(max(report.oldest_s or 0.0 for report in queues.values()), 1),
            "items": executed - before, "memory_pct": status.resource_usage["memory_percent"], "refused": dict(self.refused),
        }  # fmt: skip

    def receipts(self):
        """Return what was left out of the answers, by the phase in which they were asked for."""
        return {phase: told(jobs) for phase, jobs in self.jobs.items()}


def told(jobs):
    """Add the receipts of jobs up."""
    items = Counter()
    for job in jobs:
        items.update({(each.strategy, each.level): each.items for each in job.receipt()})
    shaped = [{"strategy": strategy, "level": level, "items": n} for (strategy, level), n in sorted(items.items())]
    return {"jobs": len(jobs), "shaped": shaped}


def in_words(row):
    """Return one second as a line."""
    queued = "  ".join(f"{priority} {row['queued'][priority]:2}" for priority in PRIORITIES)
    return (
        f"{row['second']:3} s  {row['level']:<9}  waiting: {queued}  oldest {row['oldest_s']:4} s  {row['items']:3} items/s  "
        f"memory {row['memory_pct']:3.0f} %  refused {sum(row['refused'].values())}"
    )


@contextlib.contextmanager
def beat(environment, log):
    """Run beat for the length of a block: it has the monitor look at the whole platform."""
    command = [sys.executable, "-m", "celery", "-A", "rlm_tasks", "beat", "-l", "WARNING"]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield
    finally:
        embedded.end(process)


def record(client, seconds):
    """Run the load; return what was seen."""
    while not client.status().monitored:
        time.sleep(0.1)
    run, rows, began = Run(client, seconds), [], time.monotonic()
    for run.second in range(seconds):
        run.ask()
        time.sleep(max(0.0, began + run.second + 1 - time.monotonic()))
        rows.append(run.look())
        print(in_words(rows[-1]), flush=True)
    return {"rows": rows, "critical": run.starts, "receipts": run.receipts()}


def main():
    """Start what is needed, run, and print the receipts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for what was seen")
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    embedded.clean_up_on_sigterm()
    with tempfile.TemporaryDirectory() as folder, embedded.server() as server:
        environment = {**SETTINGS, "RLM_REDIS_URL": server.url, "PYTHONPATH": str(Path(__file__).parent)}
        os.environ.update(environment)
        from rlm_tasks import Client  # it reads the environment when it is imported

        log = Path(folder) / "log"
        with embedded.worker(environment, log=log), beat(environment, log), Client() as client:
            seen = record(client, asked.seconds)
    for phase, about in seen["receipts"].items():
        left_out = "; ".join("{strategy} at {level}: {items} items".format(**each) for each in about["shaped"])
        print(f"{phase}: {about['jobs']} jobs, {left_out or 'nothing was left out'}")
    if asked.out:
        asked.out.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
