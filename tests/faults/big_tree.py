"""Measure a look at a job of a million nodes: `make big-tree`.

The ledger's own scripts write the nodes on a real server, and end some of them; the others wait.
The figures are the time of `explain`, of the job's page in Flower and of a sweep, the memory of the
page, the number of slow commands, and the bytes that records take for each finished node.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from rlm_tasks import Client
from rlm_tasks.flower import pages
from rlm_tasks.jobs.spec import SCHEMA, JobSpec
from rlm_tasks.jobs.splitting import Shape
from rlm_tasks.jobs.stored_items import RangeSource
from rlm_tasks.ledger.records import ROOT, Child, Report
from rlm_tasks.testing import embedded
from tests.integration.conftest import client_of, environment_of

JOB, PART = "big", 1000
SLOW_US = 20_000


def children(lo: int, hi: int, parts: int) -> Iterator[Child]:
    """Yield the nodes of equal parts of a range."""
    step = (hi - lo) // parts
    for at in range(lo, hi, step):
        yield Child(f"{at:x}-{step:x}", at, at + step, 1, "", 0, f"{JOB}.{at:x}", "hungry")


def cut(client: Client, node: str, lo: int, hi: int, parts: int) -> list[Child]:
    """Claim a node and cut it into equal parts."""
    claim = client.ledger.claim(JOB, node, node, "writer")
    kids = list(children(lo, hi, parts))
    client.ledger.finish(claim, Report(mid=lo, kids=kids), b"")
    return kids


def write(client: Client, nodes: int, ended: int) -> None:
    """Write a tree of a root, its parts, and one leaf for each item; end the first leaves."""
    spec = JobSpec(JOB, "sum", RangeSource(0, 1), nodes, Shape("flat"), "q", continue_on_error=True)
    client.ledger.open([(spec, "none")], 3600)
    for part in cut(client, ROOT, 0, nodes, nodes // PART):
        leaves = cut(client, part.id, part.lo, part.hi, PART)
        if part.hi <= ended:
            run(client, leaves)
    for leaf in leaves[:50]:
        client.ledger.claim(JOB, leaf.id, leaf.id, "w0@host")


def run(client: Client, leaves: list[Child]) -> None:
    """Run leaves to their end, with the scripts of all in one round trip."""
    ledger, limit = client.ledger, client.settings.ledger.death_limit
    calls = []
    for leaf in leaves:
        token = leaf.id
        claim = (leaf.id, token, 30_000, "w0@host", limit, SCHEMA, 0)
        report = msgspec.json.encode(Report(mid=leaf.hi, done=1))
        calls.append(ledger._script("claim", JOB, *claim))
        calls.append(ledger._script("finish", JOB, leaf.id, token, report, b"", 30_000))
    ledger.store.call(*calls)


def timed(what: str, call: Callable[[], Any]) -> float:
    """Print and return the ms of the fastest of five calls."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1000)
    print(f"{what:32} {min(took):10.1f} ms")
    return min(took)


def main() -> None:
    """Write the tree and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--ended", type=int, default=100_000)
    given = parser.parse_args()
    nodes = given.nodes
    with embedded.server() as server, client_of(environment_of(server.url, "big")) as client:
        store = client.ledger.store.client
        began = time.perf_counter()
        write(client, nodes, given.ended)
        print(f"{nodes:,} nodes written in {time.perf_counter() - began:.0f} s")
        store.config_set("slowlog-log-slower-than", SLOW_US)
        store.slowlog_reset()
        job = client.job(JOB)
        print(job.explain())
        timed("explain", job.explain)
        timed("progress", job.progress)
        timed("page of the job in Flower", lambda: pages.job(client, JOB))
        timed("sweep", lambda: client.ledger.sweep(JOB))
        timed("nodes of all jobs", client.at_work)
        tracemalloc.start()
        pages.job(client, JOB)
        _, most = tracemalloc.get_traced_memory()
        print(f"{'memory of the page, at most':32} {most / 1e6:10.1f} MB")
        print(f"{'commands above 20 ms':32} {store.slowlog_len():10}")
        keys = client.ledger.keys.of(JOB)
        done = int(client.ledger.facts(JOB)["nodes"])
        each = store.memory_usage(keys.nodes, samples=1000) / store.hlen(keys.nodes)
        kept = store.llen(keys.ended)
        used = kept * each + store.memory_usage(keys.ended, samples=0)
        print(f"{'records in Redis':32} {store.hlen(keys.nodes):10,}")
        print(f"{'records of finished nodes':32} {kept:10,} of {done:,}")
        print(f"{'bytes for each finished node':32} {used / done:10.1f}")


if __name__ == "__main__":
    main()
