"""Measure a job of a million nodes at every stage of its life: `make big-tree`.

The ledger's own scripts write the nodes on a real server, run them, cancel and expire them; clients
look at the job in each stage.  The figures are times of looks, the commands of Redis that took
long, by the name of their script, and the bytes that records take for each finished node.

A command of a server that is preempted takes long, too.  So the server runs before other processes
where the system permits it, and each stage prints the time for which it had no processor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from rlm_tasks import Client
from rlm_tasks.engine.node import MAX_FAILURES
from rlm_tasks.engine.outcome import FAILURES_FULL_AT
from rlm_tasks.flower import pages
from rlm_tasks.jobs import codec
from rlm_tasks.jobs.spec import SCHEMA, JobSpec
from rlm_tasks.jobs.splitting import MAX_FANOUT, Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger import ledger as ledger_module
from rlm_tasks.ledger import reader
from rlm_tasks.ledger.records import PROCESS, ROOT, Child, Report
from rlm_tasks.testing import embedded
from tests.integration import ops  # noqa: F401  (its operations)
from tests.integration.conftest import client_of, environment_of

SLOW_MS = 20
SHOWN_MS = 5
LARGE = 200
FAILURE = msgspec.json.encode({"message": "x" * 200, "traceback": "y" * 2000}).decode()
ONE = codec.pack(["the output of an item"])
SCRIPTS = {each.sha: each.name for each in (*ledger_module._SCRIPTS.values(), reader._PIECES)}


# --- the server's log of slow commands ---------------------------------------------------------


class Stage:
    """The commands of one stage: which took long; `slow` counts those of all stages."""

    def __init__(self, client: Client, server: embedded.Server) -> None:
        self._redis = client.ledger.store.client
        assert server.process is not None
        self._schedstat = Path(f"/proc/{server.process.pid}/schedstat")
        with contextlib.suppress(AttributeError, PermissionError):
            os.sched_setscheduler(server.process.pid, os.SCHED_RR, os.sched_param(1))
        self._redis.config_set("slowlog-log-slower-than", SHOWN_MS * 1000)
        self._redis.config_set("slowlog-max-len", 100_000)
        self.slow = 0
        self.begin()

    def begin(self) -> None:
        """Forget what was slow before."""
        self._redis.slowlog_reset()
        self._began, self._waited = time.perf_counter(), self._waited_ms()

    def _waited_ms(self) -> float:
        """Return the time that the server was ready to run and had no processor; 0: unknown."""
        try:
            return int(self._schedstat.read_text().split()[1]) / 1e6
        except OSError:
            return 0.0

    def end(self, name: str) -> None:
        """Print the commands of the stage that took long, and begin the next one."""
        took, waited = time.perf_counter() - self._began, self._waited_ms() - self._waited
        print(f"{name}: {took:.1f} s; the server waited {waited:.0f} ms for a processor")
        slow: dict[str, list[float]] = defaultdict(list)
        for entry in self._redis.slowlog_get(100_000):
            slow[named(entry["command"])].append(entry["duration"] / 1000)
        for what, times in sorted(slow.items(), key=lambda each: -max(each[1])):
            above = sum(each > SLOW_MS for each in times)
            print(
                f"    {what:30} {len(times):6} above {SHOWN_MS} ms,"
                f" {above:4} above {SLOW_MS} ms, longest {max(times):.1f} ms"
            )
            self.slow += above
        self.begin()


def named(command: bytes) -> str:
    """Return the name of a script, or a command with the kind of its key."""
    words = command.decode(errors="replace").split()
    if words[0].startswith("EVAL"):
        return f"script {SCRIPTS.get(words[1], words[1][:8])}"
    return " ".join((words[0], *(word.rpartition(":")[2] for word in words[1:2])))


def timed(what: str, call: Callable[[], Any], turns: int = 5) -> None:
    """Print the ms of the fastest of some calls."""
    took = []
    for _ in range(turns):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1000)
    print(f"    {what:40} {min(took):10.1f} ms")


# --- a tree -----------------------------------------------------------------------------------


class Tree:
    """A job of a root, its parts, and one leaf for each item."""

    def __init__(self, client: Client, job: str, nodes: int, **options: Any) -> None:
        self.client, self.job, self.nodes = client, job, nodes
        self.parts: list[Child] = []
        shape = Shape("flat")
        spec = JobSpec(job, "echo", RangeSource(0, 1), nodes, shape, "big.normal", **options)
        client.ledger.open([(spec, "none")], 3600)

    def write(self) -> None:
        """Cut the root and its parts; each cut has the most children that one node may have."""
        self.parts = self._cut(ROOT, 0, self.nodes, -(-self.nodes // MAX_FANOUT))
        for part in self.parts:
            self._cut(part.id, part.lo, part.hi, part.hi - part.lo)

    def _children(self, lo: int, hi: int, parts: int) -> Iterator[Child]:
        step = -(-(hi - lo) // parts)
        for at in range(lo, hi, step):
            end = min(at + step, hi)
            yield Child(f"{at:x}-{end - at:x}", at, end, 1, "", 0, f"{self.job}.{at:x}", "hungry")

    def _cut(self, node: str, lo: int, hi: int, parts: int) -> list[Child]:
        claim = self.client.ledger.claim(self.job, node, node, "writer")
        kids = list(self._children(lo, hi, parts))
        self.client.ledger.finish(claim, Report(mid=lo, kids=kids), b"")
        return kids

    def run(self, parts: Iterable[Child]) -> str:
        """Run the leaves of some parts, of which a third fails; return the last token."""
        for part in parts:
            leaves = list(self._children(part.lo, part.hi, part.hi - part.lo))
            self._run(leaves)
        return leaves[-1].id

    def _run(self, leaves: list[Child]) -> None:
        """Run leaves with the scripts of all in one round trip."""
        ledger, limit = self.client.ledger, self.client.settings.ledger.death_limit
        calls = []
        for leaf in leaves:
            claim = (leaf.id, leaf.id, 30_000, "w0@host", limit, SCHEMA, 0)
            bad = [leaf.lo] if leaf.lo % 3 == 0 else []
            report = msgspec.json.encode(Report(mid=leaf.hi, done=1 - len(bad), failed=bad))
            partial = b"" if bad else ONE
            calls.append(ledger._script("claim", self.job, *claim))
            calls.append(
                ledger._script("finish", self.job, leaf.id, leaf.id, report, partial, 30_000, 0, 0)
            )
        ledger.store.call(*calls)

    def hold(self, count: int) -> None:
        """Let leaves that wait run, without an end."""
        for leaf in self._children(self.nodes - count, self.nodes, count):
            self.client.ledger.claim(self.job, leaf.id, leaf.id, "w0@host")

    def look(self) -> None:
        """Measure each look at the job."""
        job = self.client.job(self.job)
        print(f"    {job.explain()}")
        timed("explain", job.explain)
        timed("progress", job.progress)
        timed("tree", job.tree)
        timed("failures", job.failures)
        timed("page of the job in Flower", lambda: pages.job(self.client, self.job))
        timed("page of all jobs in Flower", lambda: pages.jobs(self.client))
        timed("sweep", lambda: self.client.ledger.sweep(self.job))
        timed("nodes of all jobs", self.client.at_work)
        timed("listed", self.client.listed)

    def memory(self) -> None:
        """Print the memory of the page, and the bytes of records in Redis."""
        tracemalloc.start()
        pages.job(self.client, self.job)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"    {'memory of the page, at most':40} {most / 1e6:10.1f} MB")
        store, keys = self.client.ledger.store.client, self.client.ledger.keys.of(self.job)
        done = int(self.client.ledger.facts(self.job)["nodes"])
        each = (store.memory_usage(keys.nodes, samples=1000) or 0) / store.hlen(keys.nodes)
        kept = store.llen(keys.ended)
        used = kept * each + (store.memory_usage(keys.ended, samples=0) or 0)
        print(f"    {'records of finished nodes':40} {kept:10,} of {done:,}")
        print(f"    {'bytes for each finished node':40} {used / done:10.1f}")


# --- the stages -------------------------------------------------------------------------------


def run(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job that runs to its end."""
    tree = Tree(client, "runs", nodes, continue_on_error=True)
    tree.write()
    stage.end(f"{nodes:,} nodes written")
    tree.look()
    stage.end("looks at a job whose nodes all wait")
    tenth = len(tree.parts) // 10
    for name, some in (("a tenth", tree.parts[:tenth]), ("half", tree.parts[tenth : 5 * tenth])):
        tree.run(some)
        stage.end(f"{name} of the nodes run")
        tree.look()
        stage.end(f"looks at a job of which {name} has ended")
    tree.run(tree.parts[5 * tenth : -1])
    tree.hold(50)
    stage.end("all but the last thousand run")
    tree.look()
    tree.memory()
    stage.end("looks at a job of which nearly all has ended")
    last = tree.run(tree.parts[-1:])
    stage.end("the last nodes run")
    print(f"    {sum(1 for _ in client.ledger.pieces('runs', 0, nodes)):,} partials are read")
    stage.end("the merge reads")
    timed("partial", client.job("runs").partial, 1)
    stage.end("a partial answer")
    print(f"    {client.ledger.close('runs', last, 'succeeded')}")
    stage.end("the job is closed")
    tree.look()
    result = client.job("runs").result()
    print(f"    {len(result.output):,} outputs, {result.failed_count:,} failed")
    timed("successful", lambda: list(result.successful), 1)
    stage.end("looks at the job that has ended")
    again = client.job("runs").retry_failed()
    stage.end("the failed items are submitted again")
    again.cancel()


def cancel(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job that is cancelled while all its nodes wait."""
    Tree(client, "cancelled", nodes, continue_on_error=True).write()
    stage.end(f"{nodes:,} nodes written")
    print(f"    {client.job('cancelled').cancel()}")
    stage.end("the job is cancelled")
    client.job("cancelled").result(propagate=False)
    stage.end("its result is read")


def expire(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job that expires while all its nodes wait."""
    Tree(client, "expires", nodes, continue_on_error=True).write()
    client.ledger.store.client.hset(client.ledger.keys.of("expires").job, "deadline", 1)
    stage.end(f"{nodes:,} nodes written")
    sweeps = 1
    while client.ledger.sweep("expires").state != "expired":
        sweeps += 1
    stage.end(f"the job expires in {sweeps} sweeps")


def recover(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job whose messages are all lost."""
    tree = Tree(client, "recovers", nodes, continue_on_error=True)
    tree.write()
    store: Any = client.ledger.store.client
    waiting = client.ledger.keys.of("recovers").waiting
    for at in range(0, nodes, 1000):
        store.zadd(waiting, dict.fromkeys(store.zrange(waiting, at, at + 999), 1))
    store.hset(client.ledger.keys.of("recovers").job, "seen_ms", 10**13)
    stage.end(f"{nodes:,} nodes written")
    sent = sum(len(client.ledger.sweep("recovers").send) for _ in range(100))
    stage.end(f"100 sweeps send {sent:,} nodes again")


def validate(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job of which each second item fails in validation."""
    Tree(client, "validates", nodes, continue_on_error=True, validate=True)
    claim = client.ledger.claim("validates", ROOT, "root", "w0@host")
    step = 2 * FAILURES_FULL_AT
    for lo in range(0, nodes, step):
        hi = min(lo + step, nodes)
        rest = [Child(f"v{hi}", hi, nodes, 1, "", 0, "t", "full")] if hi < nodes else []
        bad = list(range(lo, hi, 2))
        full = [(at, FAILURE) for at in bad[:MAX_FAILURES]]
        report = Report(mid=hi, done=hi - lo - len(bad), failed=bad, failures=full, kids=rest)
        client.ledger.finish(claim, report, b"")
        if rest:
            claim = client.ledger.claim("validates", f"v{hi}", f"v{hi}", "w0@host")
    stage.end("items fail in validation")
    claim = client.ledger.claim("validates", PROCESS, "process", "w0@host")
    print(f"    {len(claim.known_failed):,} items are known to have failed")
    stage.end("the first node of the next phase is claimed")


def read(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job whose partials are large."""
    tree = Tree(client, "large", LARGE, continue_on_error=True)
    tree.write()
    for at in range(LARGE):
        claim = client.ledger.claim("large", f"{at:x}-1", "mine", "w0@host")
        client.ledger.finish(claim, Report(mid=at + 1, done=1), b"\0" + os.urandom(1 << 20))
    stage.end(f"{LARGE} partials of 1 MB are written")
    print(f"    {sum(1 for _ in client.ledger.pieces('large', 0, LARGE)):,} partials are read")
    stage.end("they are read")


def submit(client: Client, stage: Stage, nodes: int) -> None:
    """Measure a job of many items that a client submits and cancels."""
    job = client.submit(operation="echo", items=[f"item {at}" for at in range(nodes)])
    stage.end(f"{nodes:,} items are submitted")
    job.cancel()
    stage.end("they are cancelled")


STAGES: dict[str, Callable[[Client, Stage, int], None]] = {
    each.__name__: each for each in (submit, run, cancel, expire, recover, validate, read)
}


def main() -> None:
    """Measure the stages and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("stages", nargs="*", default=list(STAGES), help=", ".join(STAGES))
    given = parser.parse_args()
    slow = 0
    for name in given.stages:
        print(f"--- {name}", flush=True)
        with embedded.server() as server, client_of(environment_of(server.url, "big")) as client:
            stage = Stage(client, server)
            STAGES[name](client, stage, given.nodes)
            slow += stage.slow
    print(f"{slow} commands above {SLOW_MS} ms")


if __name__ == "__main__":
    main()
